"""JPEG regions on the CPU: nvImageCodec's C interface, called from compiled code without the GIL.

nvImageCodec's CPU backend is libjpeg-turbo, which decodes only the rows and columns of a region;
the pixels equal Pillow's. Why the C interface: see nvimgcodec.py.

`decode_region` runs in any thread with a `JpegDecoder` of that thread's own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mbv3dist.data import nvimgcodec
from mbv3dist.data.compiled import compiled
from mbv3dist.data.nvimgcodec import ImageInfo, Plane, Region, View, check

_SUCCESS = nvimgcodec.SUCCESS
_KEPT_BYTES = 32 << 20  # a decoder's memory beyond this goes again when it is not needed

# Places in JpegDecoder.words; the handles are written by the library.
_INSTANCE, _DECODER, _STREAM, _PART, _IMAGE, _FUTURE, _STATUS, _COUNT = range(8)
_PARAMS, _VIEW, _INFO = range(8, 11)  # addresses of structures
_OPEN, _SELECT, _WRAP, _DECODE, _WAIT, _RESULT, _DROP = range(11, 18)  # addresses of functions
_NUM_WORDS = 18

# The start and end of a region and the size of an image, counted in words of 4 bytes.
_START = (View.region.offset + Region.start.offset) // 4
_END = (View.region.offset + Region.end.offset) // 4
_WIDTH = (ImageInfo.planes.offset + Plane.width.offset) // 4
_HEIGHT = (ImageInfo.planes.offset + Plane.height.offset) // 4
_STRIDE = (ImageInfo.planes.offset + Plane.row_stride.offset) // 4  # 8 bytes, the lower half
_BUFFER = ImageInfo.buffer.offset // 8


class JpegDecoder:
    """What one thread needs to decode regions; see `decode_region`.

    Attributes:
        words: int64 [18], handles and addresses.
        view: int32 view of the structure that says which region is wanted.
        info: int32 view of the structure that says where pixels go.
        pixels: uint8 [n], where they go; grows with `reserve`.
        pid: The process it belongs to.
    """

    def __init__(self) -> None:
        library, _ = nvimgcodec.library()
        self._view = View(region=Region(ndim=2))
        plane = Plane(num_channels=3, sample_type=nvimgcodec.UINT8, precision=8)
        self._info = ImageInfo(
            color_spec=nvimgcodec.SRGB,
            sample_format=nvimgcodec.INTERLEAVED_RGB,
            orientation=nvimgcodec.Orientation(),
            num_planes=1,
            buffer_kind=nvimgcodec.HOST_MEMORY,
        )
        self._info.planes[0] = plane
        self._params = nvimgcodec.DecodeParams()
        self.view = np.frombuffer(memoryview(self._view).cast("B"), np.int32)
        self.info = np.frombuffer(memoryview(self._info).cast("B"), np.int32)
        self.words = np.zeros(_NUM_WORDS, np.int64)
        self.words[_INSTANCE] = nvimgcodec.instance()
        self.words[_DECODER] = self._make_decoder(library)
        for place, struct in ((_PARAMS, self._params), (_VIEW, self._view), (_INFO, self._info)):
            self.words[place] = ctypes.addressof(struct)
        for place, name in (
            (_OPEN, "CodeStreamCreateFromHostMem"),
            (_SELECT, "CodeStreamGetSubCodeStream"),
            (_WRAP, "ImageCreate"),
            (_DECODE, "DecoderDecode"),
            (_WAIT, "FutureWaitForAll"),
            (_RESULT, "FutureGetProcessingStatus"),
            (_DROP, "FutureDestroy"),
        ):
            function = getattr(library, f"nvimgcodec{name}")
            self.words[place] = ctypes.cast(function, ctypes.c_void_p).value or 0
        self.pid = os.getpid()
        self.pixels = np.empty(0, np.uint8)
        self.reserve(1 << 20)
        # Not at exit: a thread that nobody waited for may still be decoding then.
        weakref.finalize(self, _destroy, library, self.words, self.pid).atexit = False

    def reserve(self, num_bytes: int) -> None:
        """Make room for a region of so many bytes."""
        room = len(self.pixels)
        if num_bytes > room or (room > _KEPT_BYTES and room > 4 * num_bytes):
            self.pixels = np.empty(max(num_bytes, min(2 * room, _KEPT_BYTES)), np.uint8)
            aim(self.info, self.pixels.ctypes.data)

    def _make_decoder(self, library: ctypes.CDLL) -> int:
        # One thread: a picture is then decoded in the thread that asks for it.
        backend = nvimgcodec.Backend(
            kind=1, params=nvimgcodec.BackendParams(load_hint=1.0, load_hint_policy=2)
        )
        execution = nvimgcodec.Execution(
            num_threads=1,
            device=nvimgcodec.CPU_ONLY,
            num_backends=1,
            backends=ctypes.addressof(backend),
        )
        decoder = ctypes.c_void_p()
        instance = ctypes.c_void_p(int(self.words[_INSTANCE]))
        check(
            library.nvimgcodecDecoderCreate(
                instance, ctypes.byref(decoder), ctypes.byref(execution), None
            ),
            "decoder",
        )
        return decoder.value or 0


def _destroy(library: ctypes.CDLL, words: np.ndarray, pid: int) -> None:
    """Let go of a decoder's handles, in the process that made them."""
    if pid != os.getpid():
        return
    for place, name in (
        (_PART, "CodeStream"),
        (_STREAM, "CodeStream"),
        (_IMAGE, "Image"),
        (_DECODER, "Decoder"),
    ):
        if words[place]:
            getattr(library, f"nvimgcodec{name}Destroy")(ctypes.c_void_p(int(words[place])))


_thread = threading.local()


def thread_decoder() -> JpegDecoder:
    """Return this thread's decoder.

    Raises:
        OSError: nvImageCodec does not work (see `nvimgcodec.problem`).
    """
    decoder: JpegDecoder | None = getattr(_thread, "decoder", None)
    if decoder is None or decoder.pid != os.getpid():
        decoder = _thread.decoder = JpegDecoder()
    return decoder


@intrinsic
def _call(_context: Any, address: Any, arguments: Any) -> Any:
    """Call a C function at an address with up to six words; returns its int32."""
    signature = types.int32(address, arguments)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        words = [
            builder.extract_value(values[1], number) for number in range(signature.args[1].count)
        ]
        kind = ir.FunctionType(ir.IntType(32), [word] * len(words))
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), words)

    return signature, generate


@compiled
def aim(info: np.ndarray, address: int) -> None:
    """Let a decoder write elsewhere than into its own pixels; it must be set back."""
    info[2 * _BUFFER] = np.int32(address & 0xFFFFFFFF)
    info[2 * _BUFFER + 1] = np.int32(address >> 32)


@compiled
def decode_region(
    words: np.ndarray,
    view: np.ndarray,
    info: np.ndarray,
    address: int,
    num_bytes: int,
    x0: int,
    y0: int,
    x1: int,
    y1: int,
) -> bool:
    """Decode a region of a JPEG into the decoder's pixels, rows of 3 * (x1 - x0) bytes.

    Args:
        words: Of the thread's `JpegDecoder`, as are `view` and `info`. Its room must suffice.
        view: See `words`.
        info: See `words`.
        address: Of the JPEG's first byte.
        num_bytes: Its length.
        x0: Left edge of the region in pixels, inside the picture.
        y0: Top edge.
        x1: Right edge, not included.
        y1: Bottom edge, not included.

    Returns:
        Whether it could be decoded.
    """
    here = np.int64(words.ctypes.data)
    zero = np.int64(0)
    opened = _call(
        words[_OPEN],
        (words[_INSTANCE], here + 8 * _STREAM, np.int64(address), np.int64(num_bytes), zero),
    )
    if opened != 0:
        return False
    view[_START], view[_START + 1], view[_END], view[_END + 1] = y0, x0, y1, x1
    if _call(words[_SELECT], (words[_STREAM], here + 8 * _PART, words[_VIEW])) != 0:
        return False
    info[_WIDTH], info[_HEIGHT], info[_STRIDE] = x1 - x0, y1 - y0, 3 * (x1 - x0)
    if _call(words[_WRAP], (words[_INSTANCE], here + 8 * _IMAGE, words[_INFO])) != 0:
        return False
    started = _call(
        words[_DECODE],
        (
            words[_DECODER],
            here + 8 * _PART,
            here + 8 * _IMAGE,
            np.int64(1),
            words[_PARAMS],
            here + 8 * _FUTURE,
        ),
    )
    if started != 0:
        return False
    words[_STATUS], words[_COUNT] = 0, 1
    _call(words[_WAIT], (words[_FUTURE],))
    _call(words[_RESULT], (words[_FUTURE], here + 8 * _STATUS, here + 8 * _COUNT))
    _call(words[_DROP], (words[_FUTURE],))
    return bool(words[_STATUS] & 0xFFFFFFFF == _SUCCESS)
