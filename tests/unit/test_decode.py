"""Decoding: Pillow's pixels, upright RGB whatever comes in, and reasons for what cannot be read."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from mbv3dist.convert.pictures import load_picture
from mbv3dist.data.decode import MAX_PIXELS, Picture
from mbv3dist.data.views import View, resize_view
from tests.resized import resized


def encoded(image, kind="JPEG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def decoded(data):
    """The whole upright picture, uint8 [H, W, 3]."""
    return np.asarray(Picture(data).image())


def size_of(data):
    picture = Picture(data)
    return picture.height, picture.width


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def test_pixels_are_those_of_pillow(image):
    data = encoded(image, quality=95)
    reference = Image.open(io.BytesIO(data))
    for box in ((0, 0, 160, 120), (10.5, 3.25, 90.75, 100.5), (40, 20, 60, 50)):
        out = np.empty((64, 48, 3), np.uint8)
        Picture(memoryview(data)).draw(View(box, (0, 0, 48, 64)), out)
        expected = resized(reference, (48, 64), box)
        assert (out == np.asarray(expected)).all()


def test_an_integer_crop_of_the_same_size_is_copied(image):
    data = encoded(image)
    out = np.empty((30, 40, 3), np.uint8)
    Picture(data).draw(View((7, 9, 47, 39), (0, 0, 40, 30)), out)
    assert (out == decoded(data)[9:39, 7:47]).all()
    whole = np.empty((120, 160, 3), np.uint8)
    Picture(data).draw(View((0, 0, 160, 120), (0, 0, 160, 120), flip=True), whole)
    assert (whole == decoded(data)[:, ::-1]).all()


def test_the_canvas_outside_is_filled(image):
    out = np.empty((50, 60, 3), np.uint8)
    Picture(encoded(image)).draw(View((0, 0, 160, 120), (10, 5, 50, 35)), out, fill=(1, 2, 3))
    assert (out[:5] == (1, 2, 3)).all()
    assert (out[:, :10] == (1, 2, 3)).all()
    assert (out[35:] == (1, 2, 3)).all()
    assert (out[:, 50:] == (1, 2, 3)).all()
    assert not (out[5:35, 10:50] == (1, 2, 3)).all(axis=2).any()


def test_a_part_of_a_larger_array_can_be_the_canvas(image):
    large = np.zeros((50, 60, 3), np.uint8)
    view = View((0, 0, 160, 120), (0, 0, 10, 10))
    Picture(encoded(image)).draw(view, large[5:25, 5:35], fill=(9,) * 3)
    assert (large[5:25, 15:35] == 9).all()
    assert (large[25:] == 0).all()
    assert (large[:, 35:] == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert size_of(data) == (upright.height, upright.width)
    assert (decoded(data) == np.asarray(upright)).all()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpeg_modes_become_rgb(image, mode):
    data = encoded(image.convert(mode))
    assert (decoded(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_other_formats_can_be_read(image, kind):
    assert size_of(encoded(image, kind)) == (120, 160)
    difference = decoded(encoded(image, kind)).astype(int) - np.asarray(image)
    assert np.abs(difference).mean() < 12


def test_transparency_is_laid_on_white():
    data = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")
    assert (decoded(data) == 255).all()
    one_colour = encoded(Image.new("RGB", (4, 4), (255, 0, 0)), "PNG", transparency=(255, 0, 0))
    assert (decoded(one_colour) == 255).all()


def test_pictures_of_any_mode_are_the_same_here_and_in_convert(image):
    """A picture must not look different in predict from what was trained on."""
    exif = Image.Exif()
    exif[0x0112] = 6
    depth = Image.fromarray(np.arange(256, dtype=np.uint16)[None] * 257)
    assert decoded(encoded(depth, "PNG"))[0, :, 1].tolist() == list(range(256))
    files = [encoded(depth, kind) for kind in ("PNG", "TIFF")]
    files += [encoded(image.convert(mode), "PNG", exif=exif) for mode in ("1", "L", "LA", "P")]
    files += [encoded(image, kind, exif=exif) for kind in ("JPEG", "WEBP", "TIFF")]
    files.append(encoded(image, "JPEG", xmp=b'<x tiff:Orientation="3"/>'))
    for data in files:
        assert (decoded(data) == np.asarray(load_picture(data).image)).all()
    with pytest.raises(ValueError, match="pixels of 32 bits"):
        decoded(encoded(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: d[: len(d) // 2], "cannot be decoded: .*truncated"),
        (lambda d: b"", "not a picture"),
        (lambda d: b"<html></html>", "not a picture"),
        (lambda d: d[:10], "header is damaged"),
        (lambda d: d[:2] + b"\0" * 500, "header is damaged"),
    ],
)
def test_damage_has_a_reason(image, damage, reason):
    out = np.empty((8, 8, 3), np.uint8)
    view = resize_view(width=160, height=120, size=8)
    with pytest.raises(ValueError, match=reason):
        Picture(damage(encoded(image))).draw(view, out)


def huge_png(width, height):
    """A PNG that only claims its size."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_and_many_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert size_of(huge_png(13_000, 13_000)) == (13_000, 13_000)
        with pytest.raises(ValueError, match=f"100000 x 2000 pixels .* limit of {MAX_PIXELS}"):
            Picture(huge_png(100_000, 2_000))
