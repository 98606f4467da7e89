"""A picture made smaller in one call: Pillow's pixels, or none at all."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.pictures import open_picture
from mbv3dist.convert.pixels import pixels_at, shrink
from mbv3dist.data import nvimgcodec
from mbv3dist.data.shrunk import shrunk

SIZE, WANTED = (61, 43), (20, 14)


def jpeg(mode="RGB", **save):
    noise = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **save)
    return buffer.getvalue()


def by_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        return shrink(np.asarray(image.convert("RGB")), WANTED)


@pytest.mark.parametrize("save", [{}, {"subsampling": 0}, {"progressive": True}])
def test_pixels_are_those_of_pillow(save):
    if sys.platform != "linux":  # elsewhere the decoder is no dependency, and Pillow does it
        pytest.skip("no nvImageCodec")
    assert not nvimgcodec.problem()
    data = jpeg(**save)
    assert (shrunk(data, SIZE, WANTED) == by_pillow(data)).all()


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (jpeg("CMYK"), SIZE),
        (jpeg("L"), SIZE),
        (jpeg(keep_rgb=True), SIZE),
        (jpeg(), (SIZE[0] + 1, SIZE[1])),
        (jpeg()[:-30], SIZE),
        (b"", SIZE),
    ],
)
def test_what_is_not_plain_is_left_to_pillow(data, size):
    assert shrunk(data, size, WANTED) is None


@pytest.mark.parametrize("data", [jpeg(), jpeg(keep_rgb=True)])
def test_without_the_decoder_pillow_does_it(data, monkeypatch):
    expected = by_pillow(data)
    assert (pixels_at(open_picture(data), WANTED) == expected).all()
    monkeypatch.setattr(nvimgcodec, "problem", lambda: "not here")
    assert (pixels_at(open_picture(data), WANTED) == expected).all()
