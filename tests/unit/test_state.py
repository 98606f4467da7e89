"""The loader's state: free of the rank, exact on the way back, and strict about differences."""

import json

import numpy as np
import pytest
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader
from mbv3dist.data.plan import Plan
from mbv3dist.data.state import ACCEPTABLE, data_state, resume_step

PLAIN = ViewConfig(name="resize")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for number in range(23):
        path = root / "src" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(path)
    convert_imagefolder(root / "src", root / "out", split="train", workers=1, shard_bytes=8000)
    return open_split(root / "out", "train")


def make_plan(split, **options):
    options = {"global_batch_size": 12, "epochs": 3, "seed": 1, **options}
    return Plan(split.shard_sizes, **options)


def make_loader(split, plan, **options):
    return Loader(split, plan, view=PLAIN, size=8, seed=1, **options)


def test_the_state_after_each_step_is_the_same_on_any_rank_and_leads_to_the_next(split):
    plan = make_plan(split)
    whole = [batch.index.tolist() for _, batch in make_loader(split, plan)]
    for world_size in (1, 2, 3):
        loaders = [
            make_loader(split, plan, rank=rank, world_size=world_size, num_threads=1)
            for rank in range(world_size)
        ]
        for step, _ in enumerate(zip(*loaders, strict=True), start=1):
            states = {json.dumps(loader.state()) for loader in loaders}
            assert len(states) == 1
            start, warnings = resume_step(json.loads(states.pop()), split, make_plan(split))
            assert (start, warnings) == (step, [])
            if start < plan.num_steps and step % 2:
                rest = make_loader(split, plan, start_step=start)
                assert next(iter(rest))[1].index.tolist() == whole[step]
    assert list(make_loader(split, plan, start_step=plan.num_steps)) == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("seed", {"seed": 2}), ("lanes", {"lanes": 2}), ("block_shards", {"block_shards": 1})],
)
def test_another_order_is_an_error_unless_accepted(split, name, options):
    state = data_state(split, make_plan(split), 4)
    other = make_plan(split, **options)
    with pytest.raises(ValueError, match=rf"{name} was .* and is now .*accept_changes {name} "):
        resume_step(state, split, other)
    assert name in ACCEPTABLE
    step, warnings = resume_step(state, split, other, accept=[name])
    assert step == 4 and len(warnings) == 1 and name in warnings[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [("global_batch_size", {"global_batch_size": 6}), ("tail", {"tail": "drop"})],
)
def test_another_meaning_of_a_step_is_an_error_in_any_case(split, name, options):
    state = data_state(split, make_plan(split), 4)
    with pytest.raises(ValueError, match=f"{name} was .*changes what a step is"):
        resume_step(state, split, make_plan(split, **options), accept=[*ACCEPTABLE, name])


def test_other_data_another_decoder_and_damaged_states(split):
    plan = make_plan(split)
    state = data_state(split, plan, 4)
    with pytest.raises(ValueError, match=r"data_fingerprint was 'abc' and is now '[0-9a-f]{64}'"):
        resume_step({**state, "data_fingerprint": "abc"}, split, plan)
    with pytest.raises(ValueError, match="decoder_version was '1' and is now"):
        resume_step({**state, "decoder_version": "1"}, split, plan)
    assert resume_step({**state, "decoder_version": "1"}, split, plan, accept=["decoder_version"])
    for step in (-1, plan.num_steps + 1, None, "4"):
        with pytest.raises(ValueError, match="the run has 6 steps"):
            resume_step({**state, "step": step}, split, plan)
    with pytest.raises(ValueError, match="data_fingerprint was None"):
        resume_step({"step": 3}, split, plan)
    assert np.array_equal(plan.shard_sizes, split.shard_sizes)
