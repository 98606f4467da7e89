"""`mbv3dist plan`: every figure of the forecast against counting what the plan really reads."""

import itertools
import json
import time

import numpy as np
import pytest
from conftest import write_imagefolder
from hypothesis import given, settings
from hypothesis import strategies as st

from mbv3dist.cli import main
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.forecast import forecast, make_world, plan_lines, plan_summary
from mbv3dist.data.index import open_split
from mbv3dist.data.needs import rank_needs
from mbv3dist.data.passes import WeightedPass
from mbv3dist.data.plan import Plan
from mbv3dist.data.spread import (
    Sizes,
    World,
    bytes_read,
    cache_bytes,
    open_bound,
    places_met,
    rank_bounds,
    reads_below,
    step_shards,
)


@st.composite
def runs(draw):
    """A small plan with anything in it, the bytes of its shards, and a world that divides it."""
    sizes = draw(st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any))
    world = World(
        num_ranks=draw(st.sampled_from([1, 2, 3, 4, 6, 12])),
        ranks_per_node=1,
    )
    per_node = [n for n in range(1, world.num_ranks + 1) if world.num_ranks % n == 0]
    world = World(world.num_ranks, draw(st.sampled_from(per_node)))
    batch = world.num_ranks * draw(st.integers(1, 8))
    lanes = draw(st.sampled_from([None] + [n for n in range(1, batch + 1) if batch % n == 0]))
    samples = None
    if draw(st.booleans()):
        cut = draw(st.integers(0, len(sizes)))
        weights = draw(st.sampled_from([(1, 1), (0.5, 2), (1.7, 0.3)]))
        samples = WeightedPass(np.array(sizes), num_shards=(cut, len(sizes) - cut), weights=weights)
        if samples.num_entries == 0:
            samples = None
    num_entries = samples.num_entries if samples else sum(sizes)
    plan = Plan(
        sizes,
        global_batch_size=batch,
        epochs=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
        lanes=lanes,
        block_shards=draw(st.integers(1, 4)),
        tail=draw(st.sampled_from(["carry", "drop"] if num_entries >= batch else ["carry"])),
        samples=samples,
    )
    num_bytes = np.array([size * draw(st.integers(1, 9)) * 100 for size in sizes])
    return plan, num_bytes, world


def shards_of(plan, index):
    """The shard of each sample."""
    starts = np.concatenate(([0], np.cumsum(plan.shard_sizes)))
    return np.searchsorted(starts, index, side="right") - 1


def reads_of_epoch(plan, rank, world):
    """The samples that a rank reads in the first epoch."""
    found = [np.zeros(0, np.int64)]
    for step in range(plan.num_steps):
        part = plan.step(step, rank=rank, world_size=world.num_ranks)
        found.append(part.index[part.epoch == 0])
    return np.concatenate(found)


@settings(max_examples=60, deadline=None)
@given(runs())
def test_samples_and_bytes_of_an_epoch(run):
    plan, num_bytes, world = run
    samples = np.diff(reads_below(plan, 0, rank_bounds(plan, world.num_ranks)))
    reads = [reads_of_epoch(plan, rank, world) for rank in range(world.num_ranks)]
    assert samples.tolist() == [len(part) for part in reads]
    # What a rank reads is known to the byte where it shares no lane.
    mean = num_bytes / np.maximum(plan.shard_sizes, 1)
    real = np.array([mean[shards_of(plan, part)].sum() for part in reads])
    sizes = Sizes(plan, plan.layout(0), num_bytes)
    expected = bytes_read(plan, sizes, 0, world.num_ranks)
    assert expected.sum() == pytest.approx(real.sum())
    if plan.lanes % world.num_ranks == 0:
        assert expected == pytest.approx(real)
    by_node = bytes_read(plan, sizes, 0, world.num_nodes)
    assert by_node == pytest.approx(expected.reshape(world.num_nodes, -1).sum(axis=1))


@settings(max_examples=60, deadline=None)
@given(runs())
def test_shards_met_are_those_that_nodes_need(run):
    plan, num_bytes, world = run
    met = places_met(plan, 0, world.num_nodes)
    order = plan.layout(0).shard_order
    whole = Sizes(plan, plan.layout(0), num_bytes).whole
    for node in range(world.num_nodes):
        ranks = range(node * world.ranks_per_node, (node + 1) * world.ranks_per_node)
        needed = set()
        for lane in plan.rank_lanes(ranks, world.num_ranks):
            for block, _, _ in plan.lane_blocks(lane):
                if block.epoch > 0:
                    break
                needed |= set(order[block.places.start : block.places.stop].tolist())
        assert set(order[met.low[node] : met.high[node]].tolist()) == needed
        fetched = whole[met.high[node]] - whole[met.low[node]]
        assert fetched == num_bytes[sorted(needed)].sum()


@settings(max_examples=60, deadline=None)
@given(runs(), st.data())
def test_shards_open_and_read_in_a_step(run, data):
    plan, _, world = run
    step = data.draw(st.integers(0, plan.num_steps - 1))
    found = step_shards(plan, step, world)
    opened, read = [], []
    for rank in range(world.num_ranks):
        opened.append(open_in_step(plan, step, rank, world))
        part = plan.step(step, rank=rank, world_size=world.num_ranks)
        read.append(set(shards_of(plan, part.index).tolist()))
    nodes = [
        set().union(*opened[first : first + world.ranks_per_node])
        for first in range(0, world.num_ranks, world.ranks_per_node)
    ]
    assert found.read_by_all == len(set().union(*read))
    for counts, sets in (
        (found.open_by_rank, opened),
        (found.open_by_node, nodes),
        (found.read_by_rank, read),
    ):
        # Of steps that read the data over and over, not everybody is counted.
        assert len(counts) == len(sets) or plan.global_batch_size > 64 * plan.num_samples
        assert counts.tolist() == [len(shards) for shards in sets[: len(counts)]]


def open_in_step(plan, step, rank, world):
    """The shards of the blocks that a rank reads from, position by position."""
    part = plan.global_batch_size // world.num_ranks
    found = set()
    for place in range(rank * part, (rank + 1) * part):
        position = step * plan.global_batch_size + place
        epoch, lane = plan.epoch_of(position), place // plan.lane_size
        first = plan.lane_place(epoch, lane, plan.layout(epoch).lane_starts[lane])
        read = step * plan.lane_size + place - lane * plan.lane_size - first
        block = plan.find_block(epoch, lane, plan.layout(epoch).lane_starts[lane] + read)
        layout = plan.layout(epoch)
        found |= set(layout.shard_order[block.places.start : block.places.stop].tolist())
    return found


@settings(max_examples=60, deadline=None)
@given(runs())
def test_no_step_opens_more_than_the_bound(run):
    plan, _, world = run
    if not isinstance(plan.samples, WeightedPass):  # its shards differ in size from pass to pass
        for groups, size in ((world.num_ranks, 1), (world.num_nodes, world.ranks_per_node)):
            most = 0
            for step, group in itertools.product(range(min(plan.num_steps, 40)), range(groups)):
                ranks = range(group * size, (group + 1) * size)
                shards = [open_in_step(plan, step, rank, world) for rank in ranks]
                most = max(most, len(set().union(*shards)))
            assert most <= open_bound(plan, groups)


def test_a_rank_of_one_lane_has_a_block_or_two_open():
    plan = Plan([100] * 384, global_batch_size=64, epochs=2, lanes=16)
    facts = forecast(plan, make_world(16), shard_bytes=np.full(384, 1000))
    assert facts["shards_open_per_rank"] == {"mean": 4.0, "max": 4, "bound": 16}
    assert facts["shards_open_per_node"]["max"] == 32
    assert facts["nodes"] == 2
    assert facts["fetches_per_shard"] == 1
    assert facts["cache_bytes_needed"] == 8 * 2 * 4 * 1000  # lanes x blocks x shards
    assert facts["bytes_per_rank"] == {"min": 24_000, "mean": 24_000, "max": 24_000}
    assert facts["balance"]["samples_per_rank"] == 1
    assert facts["advice"] == []


@settings(max_examples=60, deadline=None)
@given(
    num_shards=st.integers(1, 60),
    shard_samples=st.integers(1, 40),
    lanes=st.sampled_from([1, 2, 4, 8]),
    lane_size=st.integers(1, 6),
    num_ranks=st.sampled_from([1, 2, 4]),
    per_node=st.sampled_from([1, 2, 4]),
    block_shards=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_the_cache_holds_what_is_read_and_what_comes_next(
    num_shards, shard_samples, lanes, lane_size, num_ranks, per_node, block_shards, epochs
):
    batch = lanes * lane_size
    num_ranks = max(n for n in (1, 2, 4) if n <= num_ranks and batch % n == 0)
    world = World(num_ranks, min(per_node, num_ranks))
    plan = Plan(
        [shard_samples] * num_shards,
        global_batch_size=batch,
        epochs=epochs,
        lanes=lanes,
        block_shards=block_shards,
    )
    sizes = Sizes(plan, plan.layout(0), np.full(num_shards, 100))
    needed = cache_bytes(plan, sizes, 0, world)
    assert (needed <= num_shards * 100).all()
    needs = [list(rank_needs(plan, rank=rank, world_size=num_ranks)) for rank in range(num_ranks)]
    for node, step in itertools.product(range(world.num_nodes), range(plan.num_samples // batch)):
        # A step of the first epoch, and those that the loader prepares meanwhile.
        last = min(step + 4, plan.num_samples // batch - 1)
        mine = range(node * world.ranks_per_node, (node + 1) * world.ranks_per_node)
        held = {
            need.shard
            for need in itertools.chain(*(needs[rank] for rank in mine))
            if need.first_step <= last and step <= need.last_step
        }
        assert 100 * len(held) <= needed[node]


def test_advice_names_lanes_shards_and_cache():
    plan = Plan([100] * 400, global_batch_size=256, epochs=1, lanes=4)
    facts = forecast(plan, make_world(256), shard_bytes=np.full(400, 10**6))
    (line,) = facts["advice"]
    assert facts["fetches_per_shard"] == pytest.approx(8, rel=0.05)
    assert "--lanes 32 would bring it to" in line
    better = Plan([100] * 400, global_batch_size=256, epochs=1, lanes=32)
    found = forecast(better, make_world(256), shard_bytes=np.full(400, 10**6))
    assert f"bring it to {found['fetches_per_shard']:.3g}" in line
    assert found["fetches_per_shard"] <= 1.1
    # More nodes than lanes can help: the shards are too large.
    plan = Plan([100] * 40, global_batch_size=256, epochs=1)
    facts = forecast(plan, make_world(256), shard_bytes=np.full(40, 10**6), cache_limit_bytes=10**6)
    assert "shards of" in facts["advice"][0]
    assert "--data.cache_gb" in facts["advice"][1]
    small = Plan([1000] * 4, global_batch_size=5000, epochs=1)
    assert "1.25 times" in forecast(small, World(1, 1), shard_bytes=np.ones(4))["advice"][0]


def test_nodes_must_be_full():
    assert make_world(1) == World(1, 1)
    assert make_world(12) == World(12, 6)
    assert make_world(10_000).num_nodes == 1250
    assert make_world(16, 4).num_nodes == 4
    with pytest.raises(ValueError, match=r"nodes of 8; choose 6 or 12 \(--ranks-per-node\)"):
        make_world(12, 8)


def test_lines_and_summary():
    plan = Plan([5, 5], global_batch_size=4, epochs=1)

    def keys(index):
        return [f"k{n}" for n in index.tolist()]

    lines = [line.split("\t") for line in plan_lines(plan, keys=keys, world_size=2)]
    assert [line[:2] for line in lines] == [[str(s), str(r)] for s in range(3) for r in range(2)]
    read = sorted(itertools.chain(*(line[2:] for line in lines)))
    assert read == [f"k{n}" for n in range(10)]
    wanted = ["1", "0", *keys(plan.step(1).index)]
    assert list(plan_lines(plan, keys=keys, steps=range(1, 2))) == ["\t".join(wanted)]
    summary = json.loads(json.dumps(plan_summary(plan, world_size=2)))
    assert summary["samples"] == 10
    assert summary["steps_per_epoch"] == 2.5
    assert (summary["steps"], summary["overrun"]) == (3, 2)
    drop = Plan([5, 5], global_batch_size=4, epochs=3, tail="drop")
    assert plan_summary(drop)["left_out_per_epoch"] == 2


def what_if(capfd, *flags):
    main(["plan", *map(str, flags), "--json"])
    return json.loads(capfd.readouterr().out)


def test_a_cluster_nobody_has_answers_in_seconds(capfd):
    started = time.process_time()
    facts = what_if(
        capfd, "--samples", 1_281_167, "--world-size", 10_000, "--global-batch", 320_000
    )
    assert facts["nodes"] == 1250
    assert facts["shards"] == 1282
    assert facts["samples_per_rank"]["max"] == 160
    assert facts["fetches_per_shard"] > 10
    assert any("--lanes 1250" in line for line in facts["advice"])
    many = ("--world-size", 10_000, "--global-batch", 320_000, "--lanes", 1250)
    facts = what_if(capfd, "--samples", 10**9, *many)
    assert facts["fetches_per_shard"] == 1
    assert facts["shards_open_per_node"]["max"] <= facts["shards_open_per_node"]["bound"]
    # A data set that each step reads over and over.
    facts = what_if(capfd, "--samples", 10, "--shard-samples", 5, *many[:4])
    assert facts["shards_per_global_batch"] == {"mean": 2, "max": 2}
    assert facts["shards_open_per_rank"]["max"] == 2
    assert time.process_time() - started < 20  # 3 s where nothing else runs


@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for name, per_class in (("a", 5), ("b", 4)):
        source = write_imagefolder(root / f"{name}-pictures", per_class=per_class, seed=per_class)
        convert_imagefolder(
            source, root / name, split="train", workers=1, shard_bytes=15_000, seed=per_class
        )
    return [str(root / "a"), str(root / "b")]


def test_several_data_sets_with_weights(two_data_sets, capfd):
    words = ["plan", *two_data_sets, "--split", "train", "--global-batch", "6"]
    main([*words, "--json"])
    facts = json.loads(capfd.readouterr().out)
    splits = [open_split(path, "train") for path in two_data_sets]
    assert facts["samples"] == sum(map(len, splits)) == 27
    assert facts["shards"] == sum(len(split.shards) for split in splits) > 4
    assert facts["bytes"] == sum(int(split.shard_bytes.sum()) for split in splits)
    assert facts["bytes_per_rank"]["max"] == facts["bytes"]
    assert facts["cache_bytes"] is None  # nothing is remote
    main([*words, "--keys", "--weights", "2", "0.5", "--epochs", "2"])
    lines = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    keys = list(itertools.chain(*(line[2:] for line in lines)))
    assert len(keys) == 2 * (30 + 6)
    assert {key: keys.count(key) for key in keys} == {
        **{f"0:{n:09d}": 4 for n in range(15)},
        **{f"1:{n:09d}": 1 for n in range(12)},
    }


def test_balanced_classes_and_a_page_to_read(two_data_sets, capfd):
    words = ["plan", two_data_sets[0], "--split", "train", "--global-batch", "6"]
    main([*words, "--balance-classes", "--world-size", "2"])
    page = capfd.readouterr().out
    assert page.startswith("15 samples in ")
    for text in ("samples per rank", "open at once", "cache needed", "fetches per shard"):
        assert text in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--global-batch 4", "--samples"),
        ("DATA --global-batch 4", "--split NAME"),
        ("DATA --split train --samples 10 --global-batch 4", "imagines a data set"),
        ("--samples 10 --weights 1 --global-batch 4", "imagines a data set"),
        ("--samples 0 --global-batch 4", "--samples"),
        ("--samples 9 --global-batch 12 --world-size 12 --ranks-per-node 8", "6 or 12"),
        ("--samples 9 --global-batch 4 --world-size 3", "--global-batch"),
        ("--samples 9 --global-batch 4 --steps 0:2", "--keys"),
        ("--samples 9 --global-batch 4 --keys --steps 3:2", "0 <= A <= B <= 3"),
        ("DATA --split train --global-batch 4 --weights 1 2", "2 weights for 1 data sets"),
    ],
)
def test_mistakes_are_one_line(words, message, two_data_sets, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words.replace("DATA", two_data_sets[0]).split()])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1, error
