"""Damaged samples: the run stops at the first, or goes on without as many as it may lose."""

import shutil

import numpy as np
import pytest
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader, eval_batches
from mbv3dist.data.plan import Plan
from mbv3dist.data.reader import Reader

CROP = ViewConfig(name="random_resized_crop")
DAMAGED = (3, 17)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(29):
        path = root / "src" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(path)
    convert_imagefolder(root / "src", root / "out", split="train", workers=1, shard_bytes=15_000)
    return root / "out"


@pytest.fixture
def split(original, tmp_path):
    """Two pictures with a flipped byte."""
    shutil.copytree(original, tmp_path / "out")
    split = open_split(tmp_path / "out", "train")
    for index in DAMAGED:
        number, position = split.locate(index)
        with Reader(split) as reader:
            offset = int(reader._shard(number).index.image_offset[position]) + 400
        path = split.shards[number].path
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x10
        path.write_bytes(data)
    return split


def make_loader(split, **options):
    plan = Plan(split.shard_sizes, global_batch_size=6, epochs=3)
    return Loader(split, plan, view=CROP, size=16, seed=0, **options)


def test_the_default_is_to_stop(split):
    with pytest.raises(DamagedShardError, match=r"train/.*checksum of its .jpg member"):
        list(make_loader(split))
    with pytest.raises(DamagedShardError, match="checksum"):
        list(eval_batches(split, view=CROP, size=16, batch_size=4))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_within_the_budget_they_weigh_nothing_and_are_listed(split, original, num_threads):
    loader = make_loader(split, error_budget=2, verify="always", num_threads=num_threads)
    clean = make_loader(open_split(original, "train"))
    seen = []
    for (_, batch), (_, whole) in zip(loader, clean, strict=True):
        assert batch.index.tolist() == whole.index.tolist()
        for place, index in enumerate(batch.index.tolist()):
            if index in DAMAGED:
                assert batch.weight[place] == 0
                fill = batch.image[place].permute(1, 2, 0).reshape(-1, 3).unique(dim=0)
                assert fill.tolist() == [list(CROP.fill)]
                seen.append(index)
            else:
                assert batch.weight[place] == whole.weight[place]
                assert (batch.image[place] == whole.image[place]).all()
    assert set(seen) == set(DAMAGED) and len(seen) >= 6  # each epoch again, counted once
    assert sorted(loader.budget.damaged) == sorted(DAMAGED)
    assert all("checksum" in reason for reason in loader.budget.damaged.values())


def test_beyond_the_budget_it_stops(split):
    with pytest.raises(
        DamagedShardError, match=r"2 samples are damaged and --data.error_budget al"
    ):
        list(make_loader(split, error_budget=1))


def test_a_lost_shard_is_as_many_samples_as_it_held(split):
    shard = split.shards[split.locate(DAMAGED[0])[0]]
    shard.path.unlink()
    lost = shard.num_samples + 1  # the other damaged one lies elsewhere
    assert split.locate(DAMAGED[0])[0] != split.locate(DAMAGED[1])[0]
    loader = make_loader(split, error_budget=lost)
    list(loader)
    assert len(loader.budget.damaged) == lost
    with pytest.raises(DamagedShardError, match=f"{lost} samples are damaged"):
        list(make_loader(split, error_budget=lost - 1))
