"""Which files count as pictures, by their names; needs no Pillow."""

from __future__ import annotations

import os

# In order of preference, should a picture lie there in several formats.
PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
)


class PictureError(ValueError):
    """A file that is no picture we can use; the message is the reason."""


def is_picture(name: str | os.PathLike[str]) -> bool:
    """Return whether a file name ends like a picture's, in any case."""
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES
