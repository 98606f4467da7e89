"""Folders for results: what stands in the way is said in one line, with the flag to change."""

from __future__ import annotations

from pathlib import Path


def check_folder(folder: str | Path, *, flag: str = "--out") -> None:
    """Refuse a folder that cannot be made because a file is there; makes nothing.

    Raises:
        ValueError: It, or a folder above it, is a file.
    """
    folder = Path(folder)
    for path in (folder, *folder.parents):
        if path.is_dir():
            return
        if path.exists():
            where = f"{flag} {folder}" if path == folder else f"{flag} {folder}: {path}"
            raise ValueError(f"{where} is a file; give a folder")


def make_folder(folder: str | Path, *, flag: str = "--out") -> Path:
    """Make a folder with all above it, unless it is there; return its path.

    Raises:
        ValueError: It cannot be made.
    """
    folder = Path(folder)
    check_folder(folder, flag=flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: this folder cannot be made ({error.strerror}); "
            "give one in a place that can be written"
        ) from None
    return folder
