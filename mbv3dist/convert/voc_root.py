"""What lies in a VOC folder: annotations, pictures and split lists, matched by id.

An id is the path of an XML in its folder without ``.xml``; it may hold dots and spaces.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mbv3dist.convert.files import (
    MAX_LIST_BYTES,
    MAX_XML_BYTES,
    UnusableFileError,
    read_bounded,
    show,
    walk_files,
)
from mbv3dist.convert.records import MAX_PATH, MAX_PROBLEMS
from mbv3dist.convert.voc_xml import Annotation, AnnotationError, parse_annotation
from mbv3dist.data.formats import PICTURE_SUFFIXES, is_picture

_PICTURE_FOLDERS = ("JPEGImages", "images", "Images")
_LIST_COLUMN = ("1", "-1", "0")


@dataclass(frozen=True)
class VocRoot:
    """An opened VOC folder.

    Attributes:
        folder: The root.
        prefix: Stands before its paths in sources and messages: empty or ``ROOTNAME/``.
        xml_folder: Folder of the annotations relative to the root: ``Annotations/`` or empty.
        annotations: For each id the parsed XML, or why it could not be parsed.
        pictures: For each id-like path (in its folder, without suffix) the pictures' paths
            relative to the root, best first.
        picture_names: Paths of all pictures relative to the root.
        lists: The folder ImageSets/Main, or None if it has no list.
        upper_case: Ids whose XML ends in another case than ``.xml``, with their file names.
        counts: What was found on the way: files linked from outside the root.
    """

    folder: Path
    prefix: str
    xml_folder: str
    annotations: dict[str, Annotation | str]
    pictures: dict[str, list[str]]
    picture_names: list[str]
    lists: Path | None
    upper_case: dict[str, str]
    counts: Counter[str]

    def annotation_name(self, key: str) -> str:
        """Return the path of an id's XML relative to the root."""
        return self.xml_folder + self.upper_case.get(key, f"{key}.xml")


def open_root(folder: Path, prefix: str) -> VocRoot:
    """Read all annotations of a VOC folder and list its pictures.

    Raises:
        ValueError: if it has no annotation.
    """
    xml_folder = "Annotations/" if (folder / "Annotations").is_dir() else ""
    inner = sorted(path.parent.name for path in folder.glob("*/Annotations") if path.is_dir())
    if not xml_folder and inner:
        raise ValueError(
            f"{str(folder)!r} has no Annotations folder itself, but {', '.join(inner)} in it do; "
            f"name these, such as {str(folder / inner[0])!r}"
        )
    annotations: dict[str, Annotation | str] = {}
    upper_case = {}
    counts: Counter[str] = Counter()
    for name in walk_files(folder / xml_folder, counts, inside=os.path.realpath(folder)):
        if not name.lower().endswith(".xml"):
            continue
        key = name[: -len(".xml")]
        if not name.endswith(".xml"):
            upper_case[key] = name
        try:
            data = read_bounded(folder / xml_folder / name, MAX_XML_BYTES)
            annotations[key] = parse_annotation(data)
        except (AnnotationError, UnusableFileError) as error:
            annotations[key] = str(error)
        except OSError as error:
            annotations[key] = f"cannot be read: {error.strerror or type(error).__name__}"
    if not annotations:
        raise ValueError(
            f"no annotation (*.xml) in {str(folder / xml_folder)!r}; name a folder with "
            "Annotations/ and JPEGImages/, or with XML files beside pictures"
        )
    pictures, names = _list_pictures(folder, xml_folder, counts)
    lists = folder / "ImageSets" / "Main"
    has_lists = lists.is_dir() and any(lists.glob("*.txt"))
    return VocRoot(
        folder,
        prefix,
        xml_folder,
        annotations,
        pictures,
        names,
        lists if has_lists else None,
        upper_case,
        counts,
    )


def _list_pictures(
    folder: Path, xml_folder: str, counts: Counter[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Return pictures by path without suffix, and all of them, relative to the root."""
    inner = next((name for name in _PICTURE_FOLDERS if (folder / name).is_dir()), None)
    # Without such a folder pictures lie beside the XML, or at the root beside Annotations/.
    places = [f"{inner}/"] if inner else [xml_folder, ""] if xml_folder else [""]
    pictures: dict[str, list[str]] = {}
    names: list[str] = []
    for place in places:
        # Where XML and pictures lie in one place, its links are counted already.
        seen = counts if place != xml_folder else None
        for name in walk_files(folder / place, seen, inside=os.path.realpath(folder)):
            if not is_picture(name) or (place == "" and name.startswith("Annotations/")):
                continue
            names.append(place + name)
            pictures.setdefault(name.rpartition(".")[0], []).append(place + name)
    for candidates in pictures.values():
        candidates.sort(key=_preference)
    return pictures, names


def _preference(name: str) -> tuple[int, str]:
    return PICTURE_SUFFIXES.index("." + name.rpartition(".")[2].lower()), name


def find_picture(root: VocRoot, key: str, filename: str) -> str | None:
    """Return the picture of an annotation, relative to the root, or None.

    The XML's own name decides; <filename> chooses between several, or serves where none has
    that name, unless it names the picture of another XML, as copies and renamed files do.
    """
    candidates = root.pictures.get(key, [])
    for name in candidates:
        if name.rpartition("/")[2] == filename:
            return name
    if candidates:
        return candidates[0]
    if not filename:
        return None
    subfolder = key[: key.rfind("/") + 1]
    stem = filename.rpartition(".")[0] if is_picture(filename) else filename
    if subfolder + stem in root.annotations:
        return None
    candidates = root.pictures.get(subfolder + stem, [])
    exact = [name for name in candidates if name.rpartition("/")[2] == filename]
    return next(iter(exact or candidates), None)


def choose_ids(root: VocRoot, split: str) -> tuple[list[str], int | None]:
    """Return the ids of a split, sorted, and how many lines of its list repeat another.

    Without lists these are all ids, and None.

    Raises:
        ValueError: if the root has lists, but none of that name, or that one is no such list.
    """
    if root.lists is None:
        return sorted(root.annotations), None
    path = root.lists / f"{split}.txt"
    if not path.is_file():
        present = sorted(item.stem for item in root.lists.glob("*.txt"))
        short = [name for name in present if "_" not in name] or present
        raise ValueError(
            f"{str(root.folder)!r} has no list ImageSets/Main/{split}.txt; it has "
            f"{', '.join(short[:10])}: name one with --split"
        )
    ids: set[str] = set()
    num_lines = 0
    try:
        file = io.TextIOWrapper(io.BytesIO(read_bounded(path, MAX_LIST_BYTES)), "utf-8-sig")
        while line := file.readline(MAX_PATH + 1):
            if len(line) > MAX_PATH:
                raise ValueError(f"{str(path)!r} has a line of more than {MAX_PATH} characters")
            if line.strip():
                num_lines += 1
                ids.add(_line_to_id(line.strip(), root))
            if len(ids) > len(root.annotations) + MAX_PROBLEMS:
                raise ValueError(
                    f"{str(path)!r} names far more annotations than there are, such as "
                    f"{show(line.strip(), 80)!r}; check that it belongs to this folder"
                )
    except UnusableFileError as error:
        raise ValueError(f"{str(path)!r} is not read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text; save it as UTF-8") from error
    return sorted(ids), num_lines - len(ids)


def _line_to_id(line: str, root: VocRoot) -> str:
    """Return the id that a list's line means.

    A line may end in VOC's column of 1, -1 or 0, or name the file with its suffix; what is an id
    as it stands is taken as it stands.
    """
    if line in root.annotations:
        return line
    start, _, last = line.rpartition(" ")
    if start.strip() and last in _LIST_COLUMN:
        line = start.strip()
    if line in root.annotations:
        return line
    stem, dot, suffix = line.rpartition(".")
    if stem in root.annotations and f"{dot}{suffix.lower()}" in (*PICTURE_SUFFIXES, ".xml"):
        return stem
    return line
