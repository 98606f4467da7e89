"""Compilation by Numba: without the GIL, and kept between processes.

Numba's own cache looks at the file a function stands in, not at those it calls: after a change of
resize.py it would go on using the old code in what pixels.py compiled. So compiled code is kept in
a folder named after the contents of all of these files; another version of them is compiled anew.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

FILES = (
    "draws.py",
    "jpeg.py",
    "members.py",
    "nvimgcodec.py",
    "picture_header.py",
    "pixels.py",
    "resize.py",
    "shrunk.py",
    "view_geometry.py",
    "view_kernels.py",
    "view_random.py",
    "views.py",
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function when it is first called; its calls from Python release the GIL."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    folder = cache_folder()
    if folder is None:
        return numba.njit(**options)(function)  # type: ignore[no-any-return]
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)  # read while it decorates
    try:
        return numba.njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = before


@functools.cache
def cache_folder() -> Path | None:
    """Return where compiled code is kept, or None, with a warning, if nothing can be written there.

    It is below $NUMBA_CACHE_DIR, $XDG_CACHE_HOME/mbv3dist or ~/.cache/mbv3dist.
    """
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((Path(__file__).parent / name).read_bytes())
    own, home = os.environ.get("NUMBA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        parent = Path(own) if own else (Path(home) if home else Path.home() / ".cache") / "mbv3dist"
        folder = parent / "compiled" / digest.hexdigest()[:16]
        # Code is loaded from there: only the user may write to it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not writable", str(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(
            f"compiled code cannot be kept ({error}), so every start takes some 20 seconds more; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            stacklevel=2,
        )
        return None
    return folder
