"""Which pictures a prediction is about, and under which names their drawings are written."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

from mbv3dist.data.formats import PICTURE_SUFFIXES, is_picture


def find_pictures(sources: Sequence[str | Path], *, out: Path) -> list[Path]:
    """Pictures that the sources name, each once, in the order of the sources, sorted within.

    Folders are searched with all below them for the usual extensions, hidden files and `out` left
    out; a file named itself may have any extension.

    Args:
        sources: Pictures, folders or globs (`**` allowed).
        out: Folder for results; it must not hold a picture that was asked for.

    Raises:
        ValueError: A source has no picture, or results would be mixed with pictures.
    """
    found: dict[Path, Path] = {}  # resolved path -> path as given
    target = out.resolve()
    for source in sources:
        path = Path(source)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = _pictures_among(path.rglob("*"))
            if target != path.resolve():  # results of an earlier run are no pictures to predict
                matches = [match for match in matches if target not in match.resolve().parents]
        else:
            matches = _pictures_among(map(Path, glob.glob(str(source), recursive=True)))
        if not matches:
            what = "no picture in this folder" if path.is_dir() else "no such picture or folder"
            suffixes = " ".join(sorted(PICTURE_SUFFIXES))
            raise ValueError(f"{source}: {what}; give pictures ({suffixes}), a folder or a glob")
        for match in matches:
            found.setdefault(match.resolve(), match)
    for resolved, path in found.items():
        if resolved.parent == target:
            raise ValueError(
                f"--out {out} holds the picture {path.name} itself, which could be overwritten; "
                "give a folder of its own"
            )
    return list(found.values())


def drawing_names(files: Sequence[Path]) -> list[str]:
    """A file name for each drawing: the stem; equal ones (in any case of letters) get a number."""
    used: set[str] = set()
    names = []
    for path in files:
        stem, number = path.stem, 1
        while stem.lower() in used:
            number += 1
            stem = f"{path.stem}-{number}"
        used.add(stem.lower())
        names.append(f"{stem}.jpg")
    return names


def _pictures_among(paths: Iterable[Path]) -> list[Path]:
    """Visible files with a picture's extension, sorted."""
    return sorted(
        path
        for path in paths
        if is_picture(path) and not path.name.startswith(".") and path.is_file()
    )
