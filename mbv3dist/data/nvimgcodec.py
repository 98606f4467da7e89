"""nvImageCodec's C interface (nvimgcodec.h, 0.9): the structures and handles that jpeg.py needs.

The C interface instead of the Python package, because it decodes into memory of ours: a buffer per
thread that stays, where a new one per picture costs page faults, 20 % of the time at 256 pixels;
because compiled code can call it for many pictures without the GIL; and because only the JPEG
module is loaded, without messages about GPU libraries that are not there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

CPU_ONLY = -99999  # NVIMGCODEC_DEVICE_CPU_ONLY
INTERLEAVED_RGB, SRGB, UINT8, HOST_MEMORY = 8, 1, 0x0802, 2
SUCCESS = 1  # of a picture; of a call it is 0

_HEAD: list[Any] = [("type", ctypes.c_int), ("size", ctypes.c_size_t), ("next", ctypes.c_void_p)]


class Struct(ctypes.Structure):
    """A structure of the interface: its kind and size stand in its head."""

    NUMBER = 0

    def __init__(self, **values: Any):
        super().__init__(type=self.NUMBER, size=ctypes.sizeof(self), **values)


class Instance(Struct):
    """How the library starts."""

    NUMBER = 2
    _fields_ = [
        *_HEAD,
        ("builtin_modules", ctypes.c_int),
        ("extension_modules", ctypes.c_int),
        ("modules_path", ctypes.c_char_p),
        ("messenger", ctypes.c_int),
        ("messenger_desc", ctypes.c_void_p),
        ("severity", ctypes.c_uint32),
        ("category", ctypes.c_uint32),
    ]


class DecodeParams(Struct):
    """How pictures are decoded."""

    NUMBER = 5
    _fields_ = [*_HEAD, ("apply_exif_orientation", ctypes.c_int)]


class Orientation(Struct):
    """How a picture is turned."""

    NUMBER = 7
    _fields_ = [
        *_HEAD,
        ("rotated", ctypes.c_int),
        ("flip_x", ctypes.c_int),
        ("flip_y", ctypes.c_int),
    ]


class Region(Struct):
    """A part of a picture: start and end of rows, then of columns."""

    NUMBER = 8
    _fields_ = [
        *_HEAD,
        ("ndim", ctypes.c_int),
        ("start", ctypes.c_int * 5),
        ("end", ctypes.c_int * 5),
        ("outside_policy", ctypes.c_int),
        ("outside_samples", ctypes.c_int * 10),
    ]


class View(Struct):
    """Which part of a code stream is meant."""

    NUMBER = 9
    _fields_ = [
        *_HEAD,
        ("image", ctypes.c_size_t),
        ("region", Region),
        ("offset", ctypes.c_size_t),
    ]


class Plane(Struct):
    """Size and layout of a picture in memory."""

    NUMBER = 12
    _fields_ = [
        *_HEAD,
        ("width", ctypes.c_uint32),
        ("height", ctypes.c_uint32),
        ("row_stride", ctypes.c_size_t),
        ("num_channels", ctypes.c_uint32),
        ("sample_type", ctypes.c_int),
        ("precision", ctypes.c_uint8),
    ]


class ImageInfo(Struct):
    """A picture in memory."""

    NUMBER = 11
    _fields_ = [
        *_HEAD,
        ("codec", ctypes.c_char * 256),
        ("color_spec", ctypes.c_int),
        ("subsampling", ctypes.c_int),
        ("sample_format", ctypes.c_int),
        ("orientation", Orientation),
        ("num_planes", ctypes.c_uint32),
        ("planes", Plane * 32),
        ("buffer", ctypes.c_void_p),
        ("buffer_kind", ctypes.c_int),
        ("cuda_stream", ctypes.c_void_p),
    ]


class BackendParams(Struct):
    """How work is divided between backends."""

    NUMBER = 29
    _fields_ = [*_HEAD, ("load_hint", ctypes.c_float), ("load_hint_policy", ctypes.c_int)]


class Backend(Struct):
    """What decodes: CPU, GPU or the GPU's JPEG engine."""

    NUMBER = 17
    _fields_ = [*_HEAD, ("kind", ctypes.c_int), ("params", BackendParams)]


class Extension(Struct):
    """A module: the JPEG decoder."""

    NUMBER = 27
    _fields_ = [
        *_HEAD,
        ("instance", ctypes.c_void_p),
        ("id", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
        ("create", ctypes.c_void_p),
        ("destroy", ctypes.c_void_p),
    ]


class Execution(Struct):
    """Where and with how many threads decoding runs."""

    NUMBER = 30
    _fields_ = [
        *_HEAD,
        ("device_allocator", ctypes.c_void_p),
        ("pinned_allocator", ctypes.c_void_p),
        ("num_threads", ctypes.c_int),
        ("executor", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("pre_init", ctypes.c_int),
        ("skip_pre_sync", ctypes.c_int),
        ("num_backends", ctypes.c_int),
        ("backends", ctypes.c_void_p),
    ]


class Properties(Struct):
    """What version of the library this is."""

    NUMBER = 1
    _fields_ = [*_HEAD, ("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32)]


@functools.cache
def problem() -> str:
    """Return why nvImageCodec cannot be used here, or an empty string."""
    try:
        library()
    except (OSError, ImportError) as error:
        return str(error)
    return ""


@functools.cache
def version() -> str:
    """Return the version of nvImageCodec, such as "0.9.0"."""
    properties = Properties()
    check(library()[0].nvimgcodecGetProperties(ctypes.byref(properties)), "properties")
    number = properties.version
    return f"{number // 1000}.{number % 1000 // 100}.{number % 100}"


@functools.cache
def library() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Load the library and its JPEG module.

    Raises:
        ImportError: It is not installed.
        OSError: It cannot be loaded, or its interface is not the one that is known here.
    """
    # Found, not imported: the Python package would load all modules and talk about each.
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "nvimgcodec"
        modules = sorted((folder / "extensions").glob("libjpeg_turbo_ext.so*"))
        if (folder / "libnvimgcodec.so.0").is_file() and modules:
            codec = ctypes.CDLL(str(folder / "libnvimgcodec.so.0"))
            properties = Properties()
            if codec.nvimgcodecGetProperties(ctypes.byref(properties)) != 0:
                raise OSError("nvImageCodec has another interface than 0.9")
            return codec, ctypes.CDLL(str(modules[-1]))
    raise ImportError("nvidia-nvimgcodec-cu13 (or -cu12) is not installed")


class _Process:
    """The library's instance in this process: a forked child needs one of its own."""

    lock = threading.Lock()
    pid = 0
    instance = ctypes.c_void_p()


def instance() -> int:
    """Return the handle of this process's instance; it lives as long as the process."""
    with _Process.lock:
        if _Process.pid != os.getpid():
            codec, module = library()
            instance, extension = ctypes.c_void_p(), ctypes.c_void_p()
            created = Instance(builtin_modules=1)
            check(
                codec.nvimgcodecInstanceCreate(ctypes.byref(instance), ctypes.byref(created)),
                "instance",
            )
            description = Extension()
            check(module.nvimgcodecExtensionModuleEntry(ctypes.byref(description)), "module")
            check(
                codec.nvimgcodecExtensionCreate(
                    instance, ctypes.byref(extension), ctypes.byref(description)
                ),
                "JPEG module",
            )
            _Process.pid, _Process.instance = os.getpid(), instance
        return _Process.instance.value or 0


def check(status: int, what: str) -> None:
    """Raise OSError if a call failed."""
    if status != 0:
        raise OSError(f"nvImageCodec: {what} failed with status {status}")
