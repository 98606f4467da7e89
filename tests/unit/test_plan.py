"""The plan: every sample once an epoch, the same batches on every world size, exact resume."""

import hashlib
import itertools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbv3dist.data import draws
from mbv3dist.data.division import evaluation_range
from mbv3dist.data.needs import next_use, rank_needs
from mbv3dist.data.plan import Plan

WORLD_SIZES = (1, 2, 3, 4, 6, 8, 12)
LAYOUTS = {
    "one shard": [97],
    "even shards": [10] * 10,
    "prime, uneven, empty shards": [0, 7, 31, 0, 0, 1, 13, 40, 5, 0],
    "a shard per sample": [1] * 53,
}


def whole_run(plan, world_size=1, start=0):
    """Global batches as int64 [steps, G] and their weights, put together from the ranks' parts."""
    index, weight = [], []
    for step in range(start, plan.num_steps):
        parts = [plan.step(step, rank=r, world_size=world_size) for r in range(world_size)]
        index.append(np.concatenate([p.index for p in parts]))
        weight.append(np.concatenate([p.weight for p in parts]))
    return np.array(index), np.array(weight)


def assert_each_once(plan):
    """Every epoch of a carry run holds every sample once; the overrun has weight 0."""
    index, weight = whole_run(plan)
    stream, num_samples = index.ravel(), plan.num_samples
    for epoch in range(plan.epochs):
        part = np.sort(stream[epoch * num_samples : (epoch + 1) * num_samples])
        assert (part == np.arange(num_samples)).all()
    length = plan.epochs * num_samples
    assert (weight.ravel()[:length] == 1).all()
    assert (weight.ravel()[length:] == 0).all()
    assert stream.min() >= 0
    assert stream.max() < num_samples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_world_size_does_not_change_global_batches(layout):
    plan = Plan(LAYOUTS[layout], global_batch_size=24, epochs=4, seed=3)
    assert_each_once(plan)
    alone, weight = whole_run(plan)
    for world_size in WORLD_SIZES[1:]:
        fresh = Plan(LAYOUTS[layout], global_batch_size=24, epochs=4, seed=3)
        index, weight_there = whole_run(fresh, world_size)
        assert (index == alone).all()
        assert (weight_there == weight).all()


def test_every_epoch_and_seed_has_another_order():
    orders = set()
    for seed in (0, 1):
        plan = Plan([10] * 10, global_batch_size=10, epochs=4, seed=seed)
        index, _ = whole_run(plan)
        orders |= {tuple(index.ravel()[e * 100 : (e + 1) * 100]) for e in range(4)}
    assert len(orders) == 8


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    batch=st.integers(1, 60),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
    block_shards=st.integers(1, 5),
    data=st.data(),
)
def test_any_layout_is_exact(sizes, batch, epochs, seed, block_shards, data):
    lanes = data.draw(st.sampled_from([None] + [n for n in range(1, batch + 1) if batch % n == 0]))
    plan = Plan(
        sizes,
        global_batch_size=batch,
        epochs=epochs,
        seed=seed,
        lanes=lanes,
        block_shards=block_shards,
    )
    assert plan.num_steps == -(-epochs * sum(sizes) // batch)
    assert_each_once(plan)
    step = data.draw(st.integers(0, plan.num_steps - 1))
    assert (plan.step(step).index == whole_run(plan, start=step)[0][0]).all()


@pytest.mark.parametrize("tail", ["carry", "drop"])
def test_resume_at_every_step_equals_the_uninterrupted_run(tail):
    def make():
        return Plan([11, 5, 0, 30, 1], global_batch_size=12, epochs=3, tail=tail, block_shards=2)

    whole, _ = whole_run(make(), world_size=3)
    for start in range(len(whole)):
        plan = make()
        assert (plan.step(start, rank=1, world_size=3).index == whole[start][4:8]).all()
    backwards = make()
    for start in reversed(range(len(whole))):
        assert (backwards.step(start).index == whole[start]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 17, 400, 4000])
def test_a_part_of_a_permutation_is_that_part(count):
    for key in range(40):
        options = {"seed": key, "purpose": 9, "epoch": 0}
        whole = draws.permutation(count, **options)
        assert sorted(whole.tolist()) == list(range(count))
        start = count * key // 40
        part = range(start, min(start + 1 + key % 5, count))
        assert (
            draws.permutation(count, **options, part=part).tolist()
            == whole[part.start : part.stop].tolist()
        )
    # Words that are far from uniform, and ties, fall back on sorting all.
    words = np.array([7, 7, 3, 2**64 - 1, 3] * 20, dtype=np.uint64)
    expected = np.argsort(words, kind="stable")
    assert draws.stable_order(words).tolist() == expected.tolist()
    for start in range(0, 100, 3):
        part = draws._part_of_order(words, start, start + 3)
        assert part.tolist() == expected[start : start + 3].tolist()


def test_drop_leaves_another_remainder_out_each_epoch():
    for sizes in ([50], [7, 13, 11, 19]):
        plan = Plan(sizes, global_batch_size=12, epochs=5, tail="drop")
        assert (plan.num_steps, plan.steps_per_epoch) == (20, 4)
        index, weight = whole_run(plan)
        assert (weight == 1).all()
        left_out = set()
        for epoch in range(5):
            part = index[epoch * 4 : epoch * 4 + 4].ravel()
            assert len(set(part.tolist())) == 48
            left_out.add(tuple(sorted(set(range(50)) - set(part.tolist()))))
        assert len(left_out) > 1


def test_tiny_data_sets_fill_large_batches():
    assert_each_once(Plan([1], global_batch_size=8, epochs=3))
    plan = Plan([3, 4], global_batch_size=64, epochs=20)
    assert plan.num_steps == 3
    assert_each_once(plan)
    assert plan.step(0).epoch.tolist() == (np.arange(64) // 7).tolist()


def test_one_shard_is_shuffled_over_the_whole():
    """A lane of a one-shard set must not be stuck with one stretch of it."""
    plan = Plan([3200], global_batch_size=32, epochs=1)
    index, _ = whole_run(plan)
    assert plan.lanes == 32
    means = index.mean(axis=0) / 3200  # by lane: 100 uniform samples each, sigma 0.029
    assert np.abs(means - 0.5).max() < 0.15
    means = index.mean(axis=1) / 3200  # by batch: 32 samples each, sigma 0.051
    assert np.abs(means - 0.5).max() < 0.25


def test_a_batch_needs_few_shards_and_a_rank_its_own():
    plan = Plan([100] * 400, global_batch_size=64, epochs=1, block_shards=4, lanes=16)
    seen = []
    for rank in range(16):
        parts = [plan.step(s, rank=rank, world_size=16).index for s in range(plan.num_steps)]
        seen.append(set((np.concatenate(parts) // 100).tolist()))
        busy = max(len(set((part // 100).tolist())) for part in parts)
        assert busy <= 4
    assert sum(map(len, seen)) <= 400 + 2 * 16


def test_epoch_arithmetic():
    plan = Plan([10], global_batch_size=4, epochs=3)
    assert plan.num_steps == 8
    assert [plan.epochs_finished(s) for s in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 3]
    assert plan.epochs_done(1) == pytest.approx(0.4)
    assert plan.epochs_done(8) == 3.0
    drop = Plan([10], global_batch_size=4, epochs=3, tail="drop")
    assert [drop.epochs_finished(s) for s in range(7)] == [0, 0, 1, 1, 2, 2, 3]


def test_the_order_is_frozen():
    """These orders may never change within plan version 2: saved runs depend on them."""
    plan = Plan([4, 3, 5], global_batch_size=6, epochs=2, seed=7)
    assert plan.version == 2
    index, _ = whole_run(plan)
    assert index.tolist() == FROZEN
    # With shards that no lane shares, an empty one, and a last one that is cut.
    plan = Plan([7] * 50 + [0, 3], global_batch_size=12, epochs=3, seed=7, lanes=3)
    steps = [plan.step(step).index.tolist() for step in range(plan.num_steps)]
    assert hashlib.sha256(json.dumps(steps).encode()).hexdigest() == FROZEN_DIGEST


FROZEN = [[4, 6, 9, 7, 0, 3], [5, 11, 8, 10, 1, 2], [10, 9, 1, 0, 4, 6], [11, 8, 7, 3, 2, 5]]
FROZEN_DIGEST = "bf8b70fa33d0488c7ee562aba511f5a1d4ddeeb99cb7aaf5a633e18013b7fc64"


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "world_size"), [(103, 8, 4), (5, 8, 3), (64, 16, 5), (7, 1, 2)]
)
def test_evaluation_batches_are_the_same_on_any_world_size(num_samples, batch_size, world_size):
    batches = []
    for rank in range(world_size):
        mine = evaluation_range(
            num_samples, rank=rank, world_size=world_size, batch_size=batch_size
        )
        batches += [list(mine[at : at + batch_size]) for at in range(0, len(mine), batch_size)]
    everything = list(range(num_samples))
    assert batches == [everything[at : at + batch_size] for at in range(0, num_samples, batch_size)]


@pytest.mark.parametrize("tail", ["carry", "drop"])
def test_needs_name_the_shards_of_every_step_and_the_next_use(tail):
    sizes = [7, 3, 0, 11, 5, 9, 2, 6, 8, 4]
    options = {"global_batch_size": 12, "epochs": 3, "lanes": 4, "block_shards": 2, "tail": tail}
    plan = Plan(sizes, **options)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    for world_size in (1, 2, 3, 4):
        used = {}
        for rank in range(world_size):
            needs = list(rank_needs(plan, rank=rank, world_size=world_size))
            assert [n.first_step for n in needs] == sorted(n.first_step for n in needs)
            for step in range(plan.num_steps):
                read = plan.step(step, rank=rank, world_size=world_size).index
                shards = set((np.searchsorted(starts, read, side="right") - 1).tolist())
                live = {n.shard for n in needs if n.first_step <= step <= n.last_step}
                assert shards <= live, "whatever is read is needed"
                used.setdefault(step, set()).update(live)
            late = rank_needs(plan, 7, rank=rank, world_size=world_size)
            ends = {(n.shard, n.last_step) for n in needs if n.last_step >= 7}
            assert {(n.shard, n.last_step) for n in late} == ends
        everyone = range(world_size)
        for step in range(plan.num_steps):
            for shard in range(len(sizes)):
                found = next_use(plan, shard, step, ranks=everyone, world_size=world_size)
                later = [s for s, shards in used.items() if s >= step and shard in shards]
                if found is None:
                    assert not any(s < step + plan.steps_per_epoch for s in later)
                elif later:
                    assert found <= later[0] <= found + plan.steps_per_epoch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shard_sizes": [0]}, "no samples"),
        (
            {"tail": "drop", "global_batch_size": 200},
            r"tail=carry \(--data.tail, or --tail of plan\)",
        ),
        ({"tail": "wrap"}, "carry or drop"),
        ({"global_batch_size": 0}, "--data.global_batch_size, or --global-batch of plan"),
        ({"lanes": 5}, r"choose 4 or 6 \(--data.lanes, or --lanes of plan\)"),
        ({"epochs": 0}, "--epochs"),
        ({"seed": -1}, "--seed"),
        ({"block_shards": 0}, "--data.block_shards"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    good = {"shard_sizes": [100], "global_batch_size": 24, "epochs": 1}
    with pytest.raises(ValueError, match=message) as caught:
        Plan(**(good | arguments))
    assert "\n" not in str(caught.value)


def test_world_sizes_that_do_not_divide_are_refused_with_valid_values():
    plan = Plan([100], global_batch_size=24, epochs=1)
    plan.check_world(4, 3)
    flags = r"\(--data.global_batch_size, or --global-batch of plan\)"
    with pytest.raises(ValueError, match=f"size of 20 or 25 {flags}, or start 4 or 6 processes"):
        plan.check_world(5)
    with pytest.raises(ValueError, match=r"4 processes x 5 accumulation .* 20 or 40 \([^)]*\)$"):
        plan.check_world(4, 5)
    with pytest.raises(ValueError, match=r"of 100 \(.*\), or start 24 processes"):
        plan.step(0, rank=0, world_size=100)
    with pytest.raises(ValueError, match="outside the run"):
        plan.step(plan.num_steps)


def test_huge_batches_are_refused_at_once():
    """Looking for valid values must not try every number up to the batch size."""
    started = time.process_time()
    plan = Plan([100], global_batch_size=3_000_000_019, epochs=1)  # a prime
    assert plan.lanes == 1
    with pytest.raises(ValueError, match="or start 1 or 3000000019 processes"):
        plan.check_world(2)
    plan = Plan([100], global_batch_size=3_000_000_000, epochs=1)
    with pytest.raises(ValueError, match="or start 6 or 8 processes"):
        plan.check_world(7)
    assert time.process_time() - started < 2


def test_state_is_json_and_knows_what_decides_the_order():
    plan = Plan([100], global_batch_size=24, epochs=1)
    saved = json.loads(json.dumps(plan.state()))
    assert saved == Plan([100], global_batch_size=24, epochs=9).state()
    assert saved != Plan([100], global_batch_size=48, epochs=1).state()
    assert saved != Plan([100], global_batch_size=24, epochs=1, seed=1).state()


@given(num_samples=st.integers(0, 1000), world_size=st.integers(1, 40))
def test_evaluation_ranges_cover_each_sample_once(num_samples, world_size):
    parts = [
        evaluation_range(num_samples, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert list(itertools.chain(*parts)) == list(range(num_samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_plan_needs_no_torch():
    code = "import sys, mbv3dist.data.plan, mbv3dist.data.views, mbv3dist.data.decode; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
