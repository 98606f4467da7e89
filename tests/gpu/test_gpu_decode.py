"""JPEG regions decoded by a real GPU, resized there, against Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mbv3dist.data.gpu_decode import (
    NvImageCodecEngine,
    TorchvisionEngine,
    check_engine,
    decode_regions,
    open_engine,
)
from mbv3dist.ops.resample import resample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=[NvImageCodecEngine, TorchvisionEngine], ids=lambda kind: kind.NAME)
def engine(request):
    try:
        made = request.param(DEVICE)
        check_engine(made)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        pytest.skip(f"{request.param.NAME} does not decode on this GPU: {error}")
    return made


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Soft colours with a little noise: what JPEG is made for."""
    small = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-6, 7, soft.shape)
    return Image.fromarray(np.clip(soft + noise, 0, 255).astype(np.uint8))


def encode(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def by_pillow(data: bytes, region: np.ndarray) -> np.ndarray:
    try:
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"picture cannot be decoded: {error}") from error
    x0, y0, x1, y1 = region.tolist()
    return whole[y0:y1, x0:x1]


def draw(engine, data: list[bytes], sizes: np.ndarray, regions: np.ndarray, is_jpeg=None):
    """The crops at their own size on a canvas that fits all of them, and the report of decoding."""
    crops = decode_regions(
        engine,
        data,
        sizes,
        regions,
        device=DEVICE,
        decode_on_cpu=lambda place: by_pillow(data[place], regions[place]),
        is_jpeg=is_jpeg,
    )
    sides = (regions[:, 2:] - regions[:, :2]).astype(np.float32)
    places = np.concatenate([0 * sides, sides, 0 * sides, sides], axis=1)
    places[list(crops.damaged)] = 0
    size = (int(sides[:, 1].max()), int(sides[:, 0].max()))
    canvas = resample(
        crops.pixels, crops.layout, torch.from_numpy(places).cuda(), size=size, fill=(9, 9, 9)
    )
    torch.cuda.synchronize()
    return canvas.permute(0, 2, 3, 1).cpu().numpy(), crops


def test_regions_are_pillows_within_a_few_levels(engine):
    rng = np.random.default_rng(0)
    sizes = rng.integers(40, 600, (24, 2)).astype(np.int32)
    kinds = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}]
    data = [
        encode(photograph(rng, width, height), **kinds[n % 4])
        for n, (width, height) in enumerate(sizes.tolist())
    ]
    data[5] = encode(photograph(rng, *sizes[5].tolist()).convert("L"))
    low = (rng.uniform(0, 0.5, sizes.shape) * sizes).astype(np.int64)
    high = low + 1 + (rng.uniform(0, 1, sizes.shape) * (sizes - low - 1)).astype(np.int64)
    regions = np.concatenate([low, high], axis=1)
    canvases, crops = draw(engine, data, sizes, regions)
    assert not crops.damaged
    means = []
    for n, (width, height) in enumerate((high - low).tolist()):
        expected = by_pillow(data[n], regions[n]).astype(int)
        means.append(np.abs(canvases[n, :height, :width] - expected).mean())
    print(f"mean difference {np.mean(means):.3f} levels, worst picture {max(means):.3f}")
    assert np.mean(means) < 1
    assert max(means) < 4


def test_refused_pictures_are_the_cpus_and_damaged_ones_are_named(engine):
    rng = np.random.default_rng(1)
    good = encode(photograph(rng, 200, 150))
    data = [
        good,
        encode(photograph(rng, 200, 150).convert("CMYK")),
        b"\xff\xd8\xff\xe0 is no picture",
        b"",
        good,
    ]
    sizes = np.full((5, 2), (200, 150), np.int32)
    regions = np.full((5, 4), (10, 20, 190, 140), np.int64)
    # As the loader says it: CMYK is not for the GPU, which may make another RGB of it.
    is_jpeg = np.array([True, False, True, True, True])
    canvases, crops = draw(engine, data, sizes, regions, is_jpeg)
    assert sorted(crops.damaged) == [2, 3]
    assert (canvases[[2, 3]] == 9).all()
    for place in (0, 1, 4):
        expected = by_pillow(data[place], regions[place]).astype(int)
        assert np.abs(canvases[place, :120, :180] - expected).mean() < 4


def test_many_batches_do_not_grow_memory(engine):
    rng = np.random.default_rng(2)
    data = [encode(photograph(rng, 500, 375)) for _ in range(32)]
    sizes = np.full((32, 2), (500, 375), np.int32)
    regions = np.full((32, 4), (50, 50, 450, 325), np.int64)
    used = []
    for _ in range(12):
        first, _ = draw(engine, data, sizes, regions)
        used.append(torch.cuda.mem_get_info()[0])
    assert used[4] - used[-1] < 64 << 20
    again, _ = draw(engine, data, sizes, regions)
    assert np.array_equal(first, again)


def test_something_decodes_here():
    _, name = open_engine(DEVICE)
    print(f"decodes on the GPU: {name}")
