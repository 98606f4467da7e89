"""Around the GPU's JPEG decoders: regions, refusals, damage. Their part is played on the CPU."""

import ctypes
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.data import gpu_decode
from mbv3dist.data.gpu_decode import (
    EDGE,
    DeviceCrop,
    NvImageCodecEngine,
    TorchvisionEngine,
    check_engine,
    decode_regions,
    device_crop,
    open_engine,
    widen,
)

CPU = torch.device("cpu")


def jpeg(rng: np.random.Generator, width: int, height: int, mode: str = "RGB") -> bytes:
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height)).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def pixels_of(data: bytes, region: np.ndarray) -> np.ndarray:
    """A region by Pillow; ValueError for damage, as the loader's decoder raises it."""
    try:
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except OSError as error:
        raise ValueError(f"picture cannot be decoded: {error}") from error
    x0, y0, x1, y1 = region.tolist()
    return whole[y0:y1, x0:x1]


def crop_of(pixels: np.ndarray, pad: int = 0) -> DeviceCrop:
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 3 * width + pad), np.uint8)
    rows[:, : 3 * width] = pixels.reshape(height, -1)
    return DeviceCrop(rows.ctypes.data, rows.shape[1], height, width, rows)


def read_crop(crops: gpu_decode.Crops, place: int) -> np.ndarray:
    """What lies where the layout says, uint8 [h, w, 3]."""
    first, pitch, height, width = crops.layout[place].tolist()
    size = (height - 1) * pitch + 3 * width
    flat = np.frombuffer(ctypes.string_at(crops.pixels.data_ptr() + first, size), np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (height, width, 3), (pitch, 3, 1)).copy()


def random_regions(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    low = np.floor(rng.uniform(0, 1, (len(sizes), 2)) * sizes).astype(np.int64)
    high = low + 1 + np.floor(rng.uniform(0, 1, (len(sizes), 2)) * (sizes - low - 1))
    return np.concatenate([low, high.astype(np.int64)], axis=1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 7))
def test_crops_are_exactly_the_regions(seed, refused_mask):
    """Whatever the engine refuses, each crop holds its region; padded rows and edges are left."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, (3, 2)).astype(np.int32)
    data = [jpeg(rng, width, height) for width, height in sizes.tolist()]
    regions = random_regions(rng, sizes)
    on_cpu = []

    def engine(arrays, areas):
        return [
            None if refused_mask >> n & 1 else crop_of(pixels_of(bytes(array), area), pad=n)
            for n, (array, area) in enumerate(zip(arrays, areas, strict=True))
        ]

    def decode_on_cpu(place):
        on_cpu.append(place)
        return pixels_of(data[place], regions[place])

    crops = decode_regions(engine, data, sizes, regions, device=CPU, decode_on_cpu=decode_on_cpu)
    assert on_cpu == [n for n in range(3) if refused_mask >> n & 1]
    assert crops.num_on_cpu == len(on_cpu) and not crops.damaged
    assert len(crops.owners) == 3 - len(on_cpu)
    for n in range(3):
        assert np.array_equal(read_crop(crops, n), pixels_of(data[n], regions[n]))


def test_engine_sees_only_jpegs_and_damage_is_named_by_its_place():
    rng = np.random.default_rng(0)
    good = jpeg(rng, 40, 30)
    data = [good, b"no picture", good[: len(good) // 2], good]
    sizes = np.full((4, 2), (40, 30), np.int32)
    regions = np.full((4, 4), (4, 5, 30, 20), np.int64)
    asked = []

    def engine(arrays, areas):
        asked.append((len(arrays), len(areas)))
        return [crop_of(pixels_of(good, areas[0])), None, None]

    crops = decode_regions(
        engine,
        data,
        sizes,
        regions,
        device=CPU,
        decode_on_cpu=lambda place: pixels_of(data[place], regions[place]),
        is_jpeg=np.array([True, False, True, True]),
    )
    assert asked == [(3, 3)]
    assert sorted(crops.damaged) == [1, 2]
    assert all("cannot be decoded" in str(error) for error in crops.damaged.values())
    assert crops.layout[[1, 2]].eq(0).all()
    assert crops.num_on_cpu == 1
    for place in (0, 3):
        assert np.array_equal(read_crop(crops, place), pixels_of(good, regions[place]))


def test_a_batch_without_jpegs_does_not_ask_the_engine():
    def engine(arrays, areas):
        raise AssertionError("asked")

    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    crops = decode_regions(
        engine,
        [b""],
        np.array([[5, 4]], np.int32),
        np.array([[0, 0, 5, 4]]),
        device=CPU,
        decode_on_cpu=lambda place: pixels,
        is_jpeg=np.array([False]),
    )
    assert np.array_equal(read_crop(crops, 0), pixels)


@given(st.integers(0, 2**32))
def test_widened_regions_stay_inside_and_contain_the_region(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 500, (5, 2)).astype(np.int32)
    regions = random_regions(rng, sizes)
    wide = widen(regions, sizes)
    assert (wide[:, :2] >= 0).all() and (wide[:, 2:] <= sizes).all()
    missing_low, missing_high = regions[:, :2] - wide[:, :2], wide[:, 2:] - regions[:, 2:]
    assert ((missing_low == EDGE) | (wide[:, :2] == 0)).all()
    assert ((missing_high == EDGE) | (wide[:, 2:] == sizes)).all()


class CodecOnCpu:
    """nvImageCodec's package with decoders that ignore the device they are asked for."""

    def __init__(self):
        with gpu_decode._quiet_stderr():
            self.real = pytest.importorskip("nvidia.nvimgcodec")
        for name in ("Backend", "BackendKind", "CodeStream", "DecodeParams", "Region"):
            setattr(self, name, getattr(self.real, name))
        self.asked = {}

    def Decoder(self, **asked):  # noqa: N802
        """A decoder on the CPU."""
        self.asked = asked
        decoder = self.real.Decoder(
            device_id=self.real.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[self.real.Backend(self.real.BackendKind.CPU_ONLY)],
            max_num_cpu_threads=1,
            options=asked["options"],
        )

        def decode(streams, **options):
            images = decoder.decode(streams, **options)
            return [
                image
                and SimpleNamespace(__cuda_array_interface__=image.__array_interface__, image=image)
                for image in images
            ]

        return SimpleNamespace(decode=decode)


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    codec = CodecOnCpu()
    made = NvImageCodecEngine(torch.device("cuda:3"), codec)
    kinds = [backend.backend_kind for backend in codec.asked["backends"]]
    assert codec.asked["device_id"] == 3
    assert kinds == [codec.BackendKind.HW_GPU_ONLY, codec.BackendKind.HYBRID_CPU_GPU]
    return made


def test_nvimgcodec_is_called_as_it_wants(engine, capfd):
    """The real package, its CPU backend: regions, refusals and broken files."""
    check_engine(engine)
    rng = np.random.default_rng(1)
    good = jpeg(rng, 60, 44)
    data = [good, b"\xff\xd8 no picture", b"", good[: len(good) // 3], jpeg(rng, 33, 21, "L")]
    sizes = np.array([(60, 44), (9, 9), (9, 9), (60, 44), (33, 21)], np.int32)
    regions = np.array(
        [(3, 5, 51, 44), (0, 0, 9, 9), (0, 0, 9, 9), (0, 0, 60, 44), (1, 1, 30, 20)], np.int64
    )

    def decode_on_cpu(place):
        return pixels_of(data[place], regions[place])

    crops = decode_regions(engine, data, sizes, regions, device=CPU, decode_on_cpu=decode_on_cpu)
    assert sorted(crops.damaged) == [1, 2, 3]
    assert crops.num_on_cpu == 0
    for place in (0, 4):
        expected = decode_on_cpu(place).astype(int)
        assert np.abs(read_crop(crops, place) - expected).max() <= 1


def test_an_engine_that_refuses_everything_is_found_out():
    with pytest.raises(ValueError, match="nvJPEG library"):
        check_engine(lambda data, regions: [None])


def test_an_engine_that_ignores_regions_is_found_out():
    whole = crop_of(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(RuntimeError, match="asked for a region of 32 x 32 pixels"):
        check_engine(lambda data, regions: [whole])


def test_torchvisions_whole_pictures_are_cut_and_one_bad_one_spoils_no_other(monkeypatch):
    """Torchvision raises for a batch with a bad picture in it, without saying which."""
    engine = TorchvisionEngine(torch.device("cuda"))
    monkeypatch.setattr(engine, "_device", CPU)  # torchvision's own decoder, on the CPU
    rng = np.random.default_rng(2)
    data = [jpeg(rng, 40, 30), b"\xff\xd8 no picture", jpeg(rng, 50, 20)]
    sizes = np.array([(40, 30), (8, 8), (50, 20)], np.int32)
    regions = np.array([(4, 2, 39, 30), (0, 0, 8, 8), (10, 3, 41, 18)], np.int64)

    def decode_on_cpu(place):
        return pixels_of(data[place], regions[place])

    crops = decode_regions(engine, data, sizes, regions, device=CPU, decode_on_cpu=decode_on_cpu)
    assert sorted(crops.damaged) == [1]
    for place in (0, 2):
        expected = decode_on_cpu(place).astype(int)
        assert np.abs(read_crop(crops, place) - expected).max() <= 2  # another libjpeg


def test_pictures_that_are_not_rgb_bytes_are_not_read():
    interface = {"shape": (4, 5, 1), "typestr": "|u1", "data": (0, False), "strides": None}
    with pytest.raises(RuntimeError, match="8-bit RGB"):
        device_crop(SimpleNamespace(__cuda_array_interface__=interface), owner=None)
    interface = {"shape": (4, 5, 3), "typestr": "|u1", "data": (64, False), "strides": (32, 3, 1)}
    crop = device_crop(SimpleNamespace(__cuda_array_interface__=interface), owner=None)
    assert crop[:4] == (64, 32, 4, 5)


def test_without_a_gpu_one_line_says_so(monkeypatch):
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        open_engine(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is none"):
        open_engine(torch.device("cuda"))


def test_missing_libraries_are_one_line_and_the_next_one_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Missing:
        NAME = "nvImageCodec"

        def __init__(self, device):
            raise ModuleNotFoundError("No module named\n'nvidia.nvimgcodec'")

    class Refusing:
        NAME = "torchvision"

        def __init__(self, device):
            pass

        def __call__(self, data, regions):
            return [None]

    class Working(Refusing):
        def __call__(self, data, regions):
            return [crop_of(pixels_of(bytes(data[0]), regions[0]))]

    monkeypatch.setattr(gpu_decode, "NvImageCodecEngine", Missing)
    monkeypatch.setattr(gpu_decode, "TorchvisionEngine", Refusing)
    with pytest.raises(ValueError, match=r"no library here decodes.*pip install") as error:
        open_engine(torch.device("cuda"))
    assert "No module named 'nvidia.nvimgcodec'" in str(error.value)
    assert "nvJPEG library" in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(gpu_decode, "TorchvisionEngine", Working)
    assert open_engine(torch.device("cuda"))[1] == "torchvision"
