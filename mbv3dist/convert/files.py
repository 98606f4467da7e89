"""Files of unknown origin: read with a limit, listed without running in circles, shown printably.

Links to files and folders are followed, because data sets are often built from them; how many
pictures lie outside the folder because of that is counted (``linked_from_outside``).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mbv3dist.data.files import (
    MAX_PICTURE_BYTES,
    UnusableFileError,
    open_regular,
    open_sized,
    read_bounded,
    read_open,
)

__all__ = [
    "MAX_PICTURE_BYTES",
    "UnusableFileError",
    "open_regular",
    "open_sized",
    "read_bounded",
    "read_open",
]

MAX_XML_BYTES = 8 * 1024 * 1024
MAX_LIST_BYTES = 256 * 1024 * 1024
_SHOWN = 300  # characters of a name or reason in a message
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
# What a terminal or an editor could take for something else than a letter.
_UNSHOWABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def walk_files(
    folder: Path,
    counts: Counter[str] | None = None,
    *,
    real: str | None = None,
    inside: str | None = None,
) -> Iterator[str]:
    """Yield all files under a folder, sorted, as relative paths with '/'.

    Hidden files and folders are left out. Links are followed, except to a folder that holds the
    link.

    Args:
        folder: Where to start.
        counts: Gets the number of files reached through links to outside, as
            ``linked_from_outside``.
        real: Its real path, where the caller knows it: to find it takes longer than to list a few
            files.
        inside: Real path of what is inside: by default the folder to start in.

    Raises:
        ValueError: if a folder is reached through two links: each picture would come twice, and
            nested links of that kind never end.
    """
    start = real or os.path.realpath(folder)
    top = inside or start
    linked: dict[str, str] = {}
    outside = 0
    # A folder that is being listed: its path below the top, its entries, the real paths of those
    # that hold it, and whether it lies outside.
    stack: list[tuple[str, Iterator[os.DirEntry[str]], tuple[str, ...], bool]]
    stack = [("", _entries(str(folder)), (start,), start != top and not _is_below(start, top))]
    while stack:
        prefix, entries, parents, is_outside = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        name = prefix + entry.name
        is_link = entry.is_symlink()
        if not _is_folder(entry):
            leaves = is_outside or (is_link and not _is_below(os.path.realpath(entry.path), top))
            outside += leaves
            yield name
            continue
        real = os.path.realpath(entry.path) if is_link else os.path.join(parents[-1], entry.name)
        if real in parents:
            continue
        if is_link and linked.setdefault(real, name) != name:
            raise ValueError(
                f"{show(str(folder))}: the folders {show(linked[real])!r} and {show(name)!r} are "
                "links to one folder, so its files would come twice; take one away"
            )
        leaves = is_outside or (is_link and not _is_below(real, top))
        stack.append((f"{name}/", _entries(entry.path), (*parents, real), leaves))
    if counts is not None and outside:
        counts["linked_from_outside"] += outside


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    return iter([e for e in entries if not e.name.startswith(".") and e.name != "__MACOSX"])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself: whoever reads it says so


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)


def fill(file: int, offset: int, room: memoryview) -> bool:
    """Fill the room with a file's bytes from an offset on; return whether there were enough."""
    done = 0
    while done < len(room):
        count = os.preadv(file, [room[done:]], offset + done)
        if not count:
            return False
        done += count
    return True


def check_folder(path: str | Path, out: str | Path) -> Path:
    """Return a source folder as a path.

    Raises:
        ValueError: if it is no folder, or the data set would be written inside it or over it.
    """
    folder, target = Path(path), Path(out).resolve()
    if not folder.is_dir():
        raise ValueError(f"no folder {str(path)!r} to convert; check the path")
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; name a folder")
    if target.is_relative_to(folder.resolve()):
        raise ValueError(
            f"--out {str(out)!r} lies inside the source {str(path)!r}; put it elsewhere"
        )
    return folder


def name_problem(source: str) -> str:
    """Return why a path cannot stand in a sources file, or an empty string."""
    if _CONTROL.search(source):
        return "its name holds a tab, a line break or another control character; rename it"
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return ""


def show(text: str, limit: int = _SHOWN) -> str:
    """Return a text of unknown origin as one bounded line without anything a terminal obeys."""
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-(limit // 2) :]}"
    return _UNSHOWABLE.sub(lambda match: ascii(match.group())[1:-1], text)
