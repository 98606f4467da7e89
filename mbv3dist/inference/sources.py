"""Which pictures a prediction is about, which cannot be read, and the names of their drawings."""

import glob
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mbv3dist.data.decode import check_header
from mbv3dist.data.formats import PICTURE_SUFFIXES, is_picture
from mbv3dist.messages import one_line

MAX_NAMED = 50  # unreadable pictures in a message
_CURE = "mend {0}, or leave {0} out with --on-error skip"


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


def header_problems(files: Sequence[Path]) -> dict[Path, str]:
    """Pictures whose header shows that they cannot be read, with the reason; nothing is decoded."""

    def look(path: Path) -> str | None:
        try:
            check_header(path)
        except (ValueError, OSError) as error:
            return why(error)
        return None

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = zip(files, pool.map(look, files), strict=True)
        return {path: reason for path, reason in found if reason is not None}


def why(error: Exception) -> str:
    """The reason of an error that reading a picture raised, without the file's name."""
    known = isinstance(error, OSError) and error.strerror
    return one_line(known or str(error) or type(error).__name__)


def problem_lines(problems: Mapping[str, str]) -> list[str]:
    """A line for each file and its reason, bounded in number and length."""
    named = [f"{one_line(file, 1000)}: {reason}" for file, reason in problems.items()]
    rest = len(named) - MAX_NAMED
    return named[:MAX_NAMED] + ([f"and {rest} more"] if rest > 0 else [])


def unreadable_error(problems: Mapping[Path, str]) -> ValueError:
    """One error that names all these pictures and the cure; one line for a single picture."""
    lines = problem_lines({str(path): reason for path, reason in problems.items()})
    if len(problems) == 1:
        return ValueError(f"{lines[0]}; {_CURE.format('it')}")
    head = f"{len(problems)} pictures cannot be read:"
    return ValueError("\n  ".join([head, *lines]) + f"\n{_CURE.format('them')}")


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
