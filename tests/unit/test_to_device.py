"""Pictures that the device finishes: the same as the CPU's within a level, exactly once, named."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.gpu_decode import DeviceCrop
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader
from mbv3dist.data.packed import MAX_CANVASES
from mbv3dist.data.plan import Plan
from mbv3dist.training.to_device import ToDevice, check_decode, choose_for_run
from tests.rewritten import rewrite_members

CPU = torch.device("cpu")
SIZE = 48
VIEWS = {
    "crop": ViewConfig(name="random_resized_crop"),
    "ssd": ViewConfig(name="ssd", brightness=0.2),
}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Pictures of all kinds: small, larger than a packing takes, gray, and stored turned."""
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for n in range(22):
        width, height = (400, 300) if n % 5 == 0 else rng.integers(30, 110, 2).tolist()
        noise = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
        image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        (root / "in" / f"c{n % 2}").mkdir(parents=True, exist_ok=True)
        image.save(root / "in" / f"c{n % 2}" / f"{n:03}.jpg", quality=92)
    convert_imagefolder(root / "in", out=root / "out", split="train")
    return open_split(root / "out", "train")


def batches(split, decode, *, view="crop", to_device=None, **options):
    plan = Plan(split.shard_sizes, global_batch_size=8, epochs=2, seed=3)
    loader = Loader(split, plan, view=VIEWS[view], size=SIZE, seed=5, decode=decode, **options)
    to_device = to_device or ToDevice(CPU)
    out = []
    for _, batch in loader:
        moved = to_device(batch)
        out.append((moved.index.clone(), moved.weight.clone(), moved.image.clone()))
    return out, loader


class PillowEngine:
    """Stands in for the GPU: decodes with Pillow, and refuses every third picture."""

    def __init__(self):
        self.asked = 0

    def __call__(self, data, regions):
        """Decode regions, as an engine does."""
        crops = []
        for array, (x0, y0, x1, y1) in zip(data, regions.tolist(), strict=True):
            self.asked += 1
            if self.asked % 3 == 0:
                crops.append(None)
                continue
            image = Image.open(io.BytesIO(array.tobytes())).convert("RGB")
            # Writable memory of its own, as a decoder's is.
            crop = torch.from_numpy(np.array(image)[y0:y1, x0:x1].copy())
            crops.append(DeviceCrop(crop.data_ptr(), 3 * (x1 - x0), y1 - y0, x1 - x0, crop))
        return crops


@pytest.mark.parametrize("view", VIEWS)
def test_packed_crops_become_the_same_pictures(split, view):
    expected, _ = batches(split, "cpu", view=view)
    ours, _ = batches(split, "hybrid", view=view)
    assert len(ours) == len(expected)
    for (index, weight, image), (index_, weight_, image_) in zip(expected, ours, strict=True):
        assert torch.equal(index, index_)
        assert torch.equal(weight, weight_)
        assert image_.is_contiguous(memory_format=torch.channels_last)
        # The device's weights are rounded in another way, before each of two roundings.
        difference = (image.int() - image_.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.05


def test_packing_depends_on_neither_threads_nor_prefetch(split):
    expected, _ = batches(split, "hybrid", num_threads=1)
    for options in ({"num_threads": 5}, {"num_threads": 3, "prefetch": 1}):
        ours, _ = batches(split, "hybrid", **options)
        for (_, _, image), (_, _, image_) in zip(expected, ours, strict=True):
            assert torch.equal(image, image_)


def test_large_regions_are_resized_by_the_cpu(split):
    """Nothing larger than MAX_CANVASES is packed; what is larger comes as a canvas."""
    plan = Plan(split.shard_sizes, global_batch_size=8, epochs=1, seed=3)
    loader = Loader(
        split, plan, view=ViewConfig(name="resize", flip=0), size=SIZE, seed=5, decode="hybrid"
    )
    canvases = 0
    for _, batch in loader:
        rows = batch.crops.layout
        assert (rows[:, 1] * rows[:, 2] <= MAX_CANVASES * 3 * SIZE * SIZE).all()
        assert batch.image.shape == (8, 3, 0, 0)
        canvases += int(((rows[:, 2] == SIZE) & (rows[:, 3] == SIZE)).sum())
    assert canvases >= 4


def test_files_are_decoded_by_the_device(split, monkeypatch):
    """With a stand-in for the GPU; pictures that it refuses are decoded by the CPU."""
    import mbv3dist.training.to_device as module

    def copied(pixels, layout, places, **options):
        # The reference reads one tensor only: put the crops, wherever they are, behind each other.
        base, parts, rows, end = pixels.data_ptr(), [], layout.clone(), 0
        for n, (first, pitch, height, width) in enumerate(layout.tolist()):
            size = (height - 1) * pitch + 3 * width if height else 0
            memory = (np.ctypeslib.ctypes.c_uint8 * size).from_address(base + first)
            parts.append(np.frombuffer(memory, np.uint8).copy())
            rows[n, 0], end = end, end + size
        return resample(torch.from_numpy(np.concatenate(parts)), rows, places, **options)

    resample = module.resample
    monkeypatch.setattr(module, "resample", copied)
    engine = PillowEngine()
    expected, _ = batches(split, "cpu", view="ssd")
    ours, _ = batches(split, "gpu", view="ssd", to_device=ToDevice(CPU, "gpu", engine))
    assert engine.asked >= 40
    for (index, _, image), (index_, _, image_) in zip(expected, ours, strict=True):
        assert torch.equal(index, index_)
        assert (image.int() - image_.int()).abs().max() <= 2


@pytest.fixture
def damaged(monkeypatch):
    """Sample 4 is cut off, behind the back of its checksum."""
    rewrite_members(
        monkeypatch,
        lambda index, data, target: (data[: len(data) // 3] if index == 4 else data, target),
    )


@pytest.mark.parametrize("decode", ["cpu", "hybrid"])
def test_a_damaged_sample_goes_with_weight_0(split, damaged, decode):
    out, loader = batches(split, decode, error_budget=1)
    assert set(loader.budget.damaged) == {4}
    blank = torch.tensor(VIEWS["crop"].fill, dtype=torch.uint8)[:, None, None]
    met = 0
    for index, weight, image in out:
        for place in (index == 4).nonzero().flatten().tolist():
            met += 1
            assert weight[place] == 0
            assert (image[place] == blank).all()
    assert met == 2
    with pytest.raises(DamagedShardError, match="000000004"):
        batches(split, decode)


def test_what_the_device_cannot_do_is_refused():
    for wanted in ("hybrid", "gpu"):
        with pytest.raises(ValueError, match=f"--data.decode {wanted} needs a CUDA device"):
            check_decode(wanted, CPU)


def test_off_cuda_the_cpu_decodes(split):
    def never(decode):
        plan = Plan(split.shard_sizes, global_batch_size=8, epochs=1, seed=3)
        return Loader(split, plan, view=VIEWS["crop"], size=SIZE, seed=5, decode=decode)

    choice = choose_for_run("auto", CPU, never)
    assert choice.decode == "cpu"
    assert "cpu" in choice.reason
