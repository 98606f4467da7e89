"""The fast lane draws what Pillow draws, and leaves to Pillow what it does not know."""

import io
import multiprocessing
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.data import jpeg, nvimgcodec
from mbv3dist.data.decode import Picture
from mbv3dist.data.pixels import Pictures
from mbv3dist.data.resize import draw_region, reach
from mbv3dist.data.views import View
from tests.resized import resized

needs_codec = pytest.mark.skipif(
    bool(nvimgcodec.problem()), reason=f"fast lane: {nvimgcodec.problem()}"
)
FILL = (9, 200, 31)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="JPEG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def random_view(rng, width, height, size):
    x = np.sort(rng.uniform(0, width, 2)) + np.array((0, 0.01))
    y = np.sort(rng.uniform(0, height, 2)) + np.array((0, 0.01))
    dx = np.sort(rng.choice(size + 1, 2, replace=False))
    dy = np.sort(rng.choice(size + 1, 2, replace=False))
    src = (x[0], y[0], min(x[1], width), min(y[1], height))
    return View(src, (dx[0], dy[0], dx[1], dy[1]), bool(rng.integers(2)))


def draw(data, views, size=64):
    """Draw views of pictures by the fast lane; uint8 [n, size, size, 3], and the object."""
    pictures = Pictures([memoryview(item) for item in data])
    out = np.zeros((len(data), size, size, 3), np.uint8)
    pictures.draw(
        np.array([view.src for view in views], np.float64),
        np.array([view.dst for view in views], np.int32),
        np.array([view.flip for view in views]),
        canvases=out,
        places=np.arange(len(data)),
        fill=FILL,
    )
    return out, pictures


def by_pillow(data, view, size=64):
    out = np.zeros((size, size, 3), np.uint8)
    Picture(data).draw(view, out, fill=FILL)
    return out


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_resizing_has_pillows_bits(seed):
    """Columns first, then rows, as every Pillow before 13: not a single level differs."""
    rng = np.random.default_rng(seed)
    width, height, size = (int(n) for n in rng.integers(1, 90, 3))
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    view = random_view(rng, width, height, size)
    x0, y0, x1, y1 = view.dst
    expected = np.full((size, size, 3), FILL, np.uint8)
    patch = np.asarray(resized(Image.fromarray(pixels), (x1 - x0, y1 - y0), view.src))
    expected[y0:y1, x0:x1] = patch[:, ::-1] if view.flip else patch
    # From no more than the region that `reach` names.
    left, right = reach(view.src[0], view.src[2], x1 - x0, width)
    top, bottom = reach(view.src[1], view.src[3], y1 - y0, height)
    region = np.ascontiguousarray(pixels[top:bottom, left:right])
    canvas = np.zeros((size, size, 3), np.uint8)
    draw_region(
        region.reshape(bottom - top, -1),
        (left, top),
        (width, height),
        np.array(view.src, np.float64),
        np.array(view.dst, np.int32),
        view.flip,
        np.array(FILL, np.uint8),
        canvas,
    )
    assert (canvas == expected).all()


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "optimised": {"optimize": True, "quality": 30},
}


@needs_codec
@pytest.mark.parametrize("kind", JPEGS)
def test_regions_have_pillows_pixels(kind):
    rng = np.random.default_rng(0)
    sizes = [(97, 61), (160, 120), (33, 200), (8, 8), (1, 1)]
    data = [encoded(picture(*size), **JPEGS[kind]) for size in sizes] * 4
    views = [random_view(rng, *size, 64) for size in sizes * 4]
    out, pictures = draw(data, views)
    assert pictures._is_plain.all()
    assert pictures.errors == {}
    for n, (item, view) in enumerate(zip(data, views, strict=True)):
        assert (out[n] == by_pillow(item, view)).all()


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(40, 30), exif=exif)


@needs_codec
def test_what_is_no_plain_jpeg_is_pillows():
    plain = encoded(picture(40, 30))
    cmyk = encoded(picture(40, 30).convert("CMYK"))
    others = {
        "gray": encoded(picture(40, 30).convert("L")),
        "cmyk": cmyk,
        "png": encoded(picture(40, 30), "PNG"),
        "webp": encoded(picture(40, 30), "WEBP"),
        "turned": with_orientation(6),
        "mirrored": with_orientation(2),
        "no end mark": plain + b"\0\0\0",
    }
    view = View((1.5, 2, 29.25, 29), (3, 0, 60, 50), flip=True)
    out, pictures = draw(list(others.values()), [view] * len(others))
    assert not pictures._is_plain.any()
    assert pictures.errors == {}
    for n, item in enumerate(others.values()):
        assert (out[n] == by_pillow(item, view)).all()
    turned = list(others).index("turned")
    assert pictures.sizes[turned].tolist() == [30, 40]
    assert pictures.sizes[0].tolist() == [40, 30]


@needs_codec
def test_an_upright_exif_is_plain():
    for data in (with_orientation(1), encoded(picture(40, 30), exif=Image.Exif())):
        assert Pictures([memoryview(data)])._is_plain.all()


def raw(pixels):
    data = io.BytesIO()
    np.save(data, pixels)
    return data.getvalue()


@needs_codec
def test_raw_members_have_a_fast_lane_of_their_own():
    rng = np.random.default_rng(1)
    sizes = [(97, 61), (1, 1), (33, 200), (32, 32)]
    data = [raw(np.asarray(picture(*size))) for size in sizes]
    views = [random_view(rng, *size, 64) for size in sizes]
    out, pictures = draw([*data, encoded(picture(9, 9))], [*views, random_view(rng, 9, 9, 64)])
    assert (pictures._raw_starts[:4] > 0).all()
    assert pictures._others == {}
    for n, (item, view) in enumerate(zip(data, views, strict=True)):
        assert (out[n] == by_pillow(item, view)).all()
    # What is not to the byte as conversion writes it is looked at by NumPy.
    odd = data[0].replace(b"False, 'shape'", b"False,'shape' ")
    for item in (odd, data[0][:-1], data[0][:30], data[0][:9]):
        assert Pictures([memoryview(item)])._raw_starts[0] == 0
    assert Pictures([memoryview(odd)]).sizes.tolist() == [[97, 61]]


def test_raw_members_are_checked():
    pixels = np.asarray(picture(40, 30))
    assert (np.asarray(Picture(raw(pixels)).image()) == pixels).all()
    wrong = {
        "header": raw(pixels)[:40],
        "bytes of pixels": raw(pixels)[:-1],
        "not uint8": raw(pixels.astype(np.int16)),
        "height, width, 3": raw(pixels[:, :, :1]),
        "damaged": raw(pixels).replace(b"descr", b"d!scr"),
    }
    for reason, data in wrong.items():
        with pytest.raises(ValueError, match=reason):
            Picture(data)


def test_damage_is_named_per_picture():
    good = encoded(picture(80, 60))
    cut = good[: len(good) // 2]
    damaged = bytearray(good)
    damaged[200:] = bytes(len(good) - 202) + good[-2:]
    data = [good, cut, b"", b"hello", good[:50], bytes(damaged), good]
    whole = View((0, 0, 80, 60), (0, 0, 64, 64))
    out, pictures = draw(data, [whole] * len(data))
    assert {1, 2, 3, 4} <= set(pictures.errors)
    assert not {0, 6} & set(pictures.errors)
    assert (out[0] == out[6]).all()
    assert (out[0] == by_pillow(good, whole)).all()
    assert "not a picture" in str(pictures.errors[3])


@needs_codec
def test_what_the_decoder_refuses_goes_to_pillow(monkeypatch):
    """Were the library to fail on a good picture, Pillow would draw it."""
    data = encoded(picture(80, 60))
    view = View((0, 0, 80, 60), (0, 0, 64, 64))
    expected = by_pillow(data, view)
    decoder = jpeg.JpegDecoder()
    decoder.words[jpeg._DECODER] = 0  # no decoder: every call fails
    monkeypatch.setattr(jpeg, "thread_decoder", lambda: decoder)
    out, pictures = draw([data], [view])
    assert pictures.errors == {}
    assert (out[0] == expected).all()


def test_without_the_library_everything_is_pillows(monkeypatch):
    monkeypatch.setattr(nvimgcodec, "problem", lambda: "not installed")
    data = encoded(picture(80, 60))
    view = View((3, 4, 70, 50), (0, 0, 64, 64))
    out, pictures = draw([data], [view])
    assert not pictures._is_plain.any()
    assert (out[0] == by_pillow(data, view)).all()


@needs_codec
def test_threads_and_forks_have_decoders_of_their_own():
    data = [encoded(picture(90, 70, seed)) for seed in range(12)]
    views = [random_view(np.random.default_rng(n), 90, 70, 64) for n in range(12)]
    expected = draw(data, views)[0]
    results = {}

    def work(name):
        for _ in range(10):
            results[name] = (draw(data, views)[0] == expected).all()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)

    parent = jpeg.thread_decoder()
    queue = multiprocessing.get_context("fork").SimpleQueue()

    def child():
        queue.put(bool((draw(data, views)[0] == expected).all()))
        queue.put(jpeg.thread_decoder() is not parent)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    assert queue.get()
    assert queue.get()
    process.join()


@needs_codec
def test_memory_for_a_large_picture_goes_again():
    decoder = jpeg.JpegDecoder()
    decoder.reserve(200 << 20)
    assert len(decoder.pixels) == 200 << 20
    decoder.reserve(1 << 20)
    assert len(decoder.pixels) <= 32 << 20
