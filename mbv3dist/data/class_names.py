"""Lists of class names, from files or the command line: read, and checked for what breaks later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mbv3dist.data.files import UnusableFileError, read_bounded
from mbv3dist.messages import has_control, shown

MAX_NAME = 1000  # characters of a class name
MAX_CLASSES = 1_000_000
_MAX_BYTES = 16 * 1024 * 1024


def read_class_file(path: str | Path) -> list[str]:
    """Read class names, one foreground name per line; blank lines at the end are ignored.

    Raises:
        ValueError: if the file is missing, empty, names a class twice or names a background.
    """
    path = Path(path)
    try:
        text = read_bounded(path, _MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(
            f"no class file {str(path)!r}; give a text file, one name a line"
        ) from error
    except UnusableFileError as error:
        raise ValueError(f"class file {str(path)!r} is not read: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class file {str(path)!r} is not UTF-8 text; save it as UTF-8") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    return check_classes(names, f"class file {str(path)!r}")


def check_classes(names: Sequence[str], where: str) -> list[str]:
    """Return the class names as a list.

    Raises:
        ValueError: if there is none, one is empty or stands twice, or is a background class.
    """
    if not 1 <= len(names) <= MAX_CLASSES:
        raise ValueError(
            f"{where} names {len(names)} classes; there must be at least one, and at most "
            f"{MAX_CLASSES}"
        )
    for number, name in enumerate(names, start=1):
        if not name or name != name.strip() or len(name) > MAX_NAME or _problem(name):
            raise ValueError(
                f"{where}: name {number} is {shown(name)}; one name a line, none empty, at "
                f"most {MAX_NAME} characters of UTF-8 without control characters"
            )
        if name in ("BACKGROUND", "__background__"):
            raise ValueError(
                f"{where}: name {number} is {name!r}; list foreground classes only, take it out"
            )
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ValueError(f"{where} names {shown(double[0])} twice; take one out")
    return list(names)


def _problem(name: str) -> bool:
    """Whether a name cannot stand in a line of UTF-8 text."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return has_control(name)
