"""What a pass holds: exact counts in each pass, and even ones over any number of passes."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbv3dist.data.passes import COPY_SHIFT, BalancedPass, WeightedPass, WholePass
from mbv3dist.data.plan import Plan

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=8)
EPOCHS = st.integers(0, 40)
WEIGHTS = st.floats(0, 5, allow_nan=False)


def one_pass(samples, shard_sizes, epoch):
    """A pass's entries by sample and copy, and that they come in the shape that is promised."""
    starts = np.concatenate(([0], np.cumsum(shard_sizes)))
    sizes = samples.sizes(epoch)
    assert sizes.dtype == np.int64
    assert sizes.shape == (len(shard_sizes),)
    assert sizes.sum() == samples.num_entries
    found = []
    for shard, size in enumerate(sizes.tolist()):
        entries = samples.entries(epoch, shard)
        assert entries.dtype == np.int64
        assert len(entries) == size
        copy, index = entries >> COPY_SHIFT, entries & ((1 << COPY_SHIFT) - 1)
        assert ((starts[shard] <= index) & (index < starts[shard + 1])).all()
        assert (np.diff(index) >= 0).all(), "pack order"
        found += zip(index.tolist(), copy.tolist(), strict=True)
    copies = Counter(index for index, _ in found)
    expected = [(index, n) for index in sorted(copies) for n in range(copies[index])]
    assert found == expected, "copies of a sample are numbered from 0"
    return copies


@st.composite
def weighted(draw):
    """Data sets of random shards, their sizes and weights; one at least is read."""
    parts = draw(st.lists(SIZES, min_size=1, max_size=4))
    weights = [draw(WEIGHTS) for _ in parts]
    samples_read = sum(sum(part) for part, weight in zip(parts, weights, strict=True) if weight)
    if not samples_read:
        parts[0], weights[0] = [*parts[0], 3], 1.5
    return parts, weights


def joined(parts):
    return list(itertools.chain(*parts))


def weighted_pass(parts, weights):
    return WeightedPass(
        np.array(joined(parts)), num_shards=[len(part) for part in parts], weights=weights
    )


@settings(max_examples=100, deadline=None)
@given(weighted(), EPOCHS, st.integers(1, 6))
def test_weighted_counts_are_exact_in_a_pass_and_even_over_many(case, first, num_passes):
    parts, weights = case
    samples = weighted_pass(parts, weights)
    shard_sizes = joined(parts)
    passes = [one_pass(samples, shard_sizes, first + n) for n in range(num_passes)]
    total = sum(passes, Counter())
    start = 0
    for part, weight in zip(parts, weights, strict=True):
        count = sum(part)
        members = range(start, start + count)
        start += count
        quotas = {sum(copies[index] for index in members) for copies in passes}
        assert len(quotas) == 1, "the same in every pass"
        (quota,) = quotas
        if weight == 0 or count == 0:
            assert quota == 0
            continue
        # A whole number near weight x samples, and never so small that nothing is read.
        assert quota == max(1, quota)
        assert abs(quota - weight * count) <= 0.5 or quota == 1
        for times, among in [(num_passes, total), *((1, copies) for copies in passes)]:
            least = times * quota // count
            assert {among[index] - least for index in members} <= {0, 1}
            assert sum(among[index] for index in members) == times * quota


@settings(max_examples=100, deadline=None)
@given(SIZES.filter(any), st.data(), EPOCHS, st.integers(1, 6))
def test_balanced_classes_are_exact_in_a_pass_and_even_over_many(sizes, data, first, num_passes):
    count = sum(sizes)
    labels = data.draw(st.lists(st.integers(-1, 3), min_size=count, max_size=count))
    if max(labels) < 0:
        labels[0] = 2
    labels = np.array(labels, dtype=np.int32)
    samples = BalancedPass(np.array(sizes), labels=labels)
    passes = [one_pass(samples, sizes, first + n) for n in range(num_passes)]
    total = sum(passes, Counter())
    by_class = {label: np.flatnonzero(labels == label).tolist() for label in set(labels.tolist())}
    without = by_class.pop(-1, [])
    each = max(1, round((count - len(without)) / len(by_class)))
    for copies in passes:
        assert [copies[index] for index in without] == [1] * len(without)
        for members in by_class.values():
            assert sum(copies[index] for index in members) == each
    for members in by_class.values():
        least = num_passes * each // len(members)
        assert {total[index] - least for index in members} <= {0, 1}


@given(SIZES.filter(any), EPOCHS)
def test_weight_one_and_balance_of_equals_are_the_whole_pass(sizes, epoch):
    sizes = np.array(sizes)
    whole = WholePass(sizes)
    assert one_pass(whole, sizes, epoch) == Counter(range(sizes.sum()))
    alike = (
        WeightedPass(sizes, num_shards=[len(sizes)], weights=[1.0]),
        BalancedPass(sizes, labels=np.zeros(sizes.sum(), np.int32)),
    )
    for other in alike:
        assert other.num_entries == whole.num_entries
        assert (other.sizes(epoch) == whole.sizes(epoch)).all()
        for shard in range(len(sizes)):
            assert (other.entries(epoch, shard) == whole.entries(epoch, shard)).all()


@settings(max_examples=40, deadline=None)
@given(weighted(), st.integers(1, 5), st.booleans(), st.integers(0, 9), st.sampled_from([1, 2]))
def test_a_plan_reads_each_pass_exactly_on_any_world_size(case, size, balanced, seed, blocks):
    parts, weights = case
    shard_sizes = joined(parts)
    if balanced:
        labels = np.arange(sum(shard_sizes)) ** 2 % 5 % 3
        samples = BalancedPass(np.array(shard_sizes), labels=labels)
    else:
        samples = weighted_pass(parts, weights)
    batch, num_epochs = 12 * size, 3
    streams = []
    for world_size in (1, 2, 3, 4, 12):
        plan = Plan(
            shard_sizes,
            global_batch_size=batch,
            epochs=num_epochs,
            seed=seed,
            block_shards=blocks,
            samples=samples,
        )
        read = [
            plan.step(step, rank=rank, world_size=world_size)
            for step in range(plan.num_steps)
            for rank in range(world_size)
        ]
        streams.append(
            [np.concatenate([getattr(p, name) for p in read]) for name in ("index", "copy")]
        )
        weight = np.concatenate([p.weight for p in read])
        assert weight.sum() == num_epochs * samples.num_entries
    for other in streams[1:]:
        assert (other[0] == streams[0][0]).all()
        assert (other[1] == streams[0][1]).all()
    length = samples.num_entries
    for epoch in range(num_epochs):
        part = slice(epoch * length, (epoch + 1) * length)
        read_pairs = Counter(zip(*(column[part].tolist() for column in streams[0]), strict=True))
        copies = one_pass(samples, shard_sizes, epoch)
        assert read_pairs == Counter(
            (index, n) for index, times in copies.items() for n in range(times)
        )


def test_nothing_is_forgotten_at_a_small_weight():
    samples = WeightedPass(np.array([7, 6]), num_shards=[2], weights=[0.25])
    assert samples.num_entries == 3
    read = [one_pass(samples, [7, 6], epoch) for epoch in range(13)]
    assert sum(read, Counter()) == Counter(dict.fromkeys(range(13), 3))
    # One after the other: nothing comes again before all have come.
    order = list(itertools.chain(*(sorted(copies) for copies in read[:4])))
    assert len(set(order)) == 12


def test_a_class_of_one_sample_comes_as_often_as_the_others():
    samples = BalancedPass(np.array([5, 5]), labels=np.array([0] * 9 + [1]))
    copies = one_pass(samples, [5, 5], 3)
    assert copies[9] == 5
    assert sum(copies.values()) == samples.num_entries == 10


def test_far_epochs_of_large_sets_cost_nothing_more():
    sizes = np.full(1000, 10**6)
    samples = WeightedPass(sizes, num_shards=[600, 400], weights=[0.333, 2.5])
    for epoch in (0, 1, 10**9):
        read = samples.sizes(epoch)
        assert read.sum() == samples.num_entries == 199_800_000 + 1_000_000_000
        # A third of a data set is a stretch of its shards, not a part of each.
        assert 200 <= np.count_nonzero(read[:600]) <= 202
        assert len(samples.entries(epoch, 999)) == read[999] in (2_000_000, 3_000_000)


def test_states_tell_passes_apart():
    sizes = np.array([4, 4])
    states = [
        WholePass(sizes).state(),
        WeightedPass(sizes, num_shards=[1, 1], weights=[1, 2]).state(),
        WeightedPass(sizes, num_shards=[1, 1], weights=[2, 1]).state(),
        WeightedPass(sizes, num_shards=[2], weights=[1]).state(),
        BalancedPass(sizes, labels=np.arange(8) % 2).state(),
    ]
    texts = {json.dumps(state, sort_keys=True) for state in states}
    assert len(texts) == len(states)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "1 weights for 2 data sets"),
        ([1, 2, 3], "3 weights for 2 data sets"),
        ([1, -0.5], "1 -0.5; --data.weights takes numbers of 0 or more"),
        ([0, 0], "0 0; --data.weights"),
        ([1, float("nan")], "nan; --data.weights"),
        ([1, float("inf")], "inf; --data.weights"),
    ],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message) as caught:
        WeightedPass(np.array([3, 4]), num_shards=[1, 1], weights=weights)
    assert "\n" not in str(caught.value)


def test_weights_that_leave_nothing_are_refused():
    """A weight on an empty data set alone."""
    with pytest.raises(ValueError, match="no samples"):
        Plan(
            [0, 4],
            global_batch_size=2,
            epochs=1,
            samples=WeightedPass(np.array([0, 4]), num_shards=[1, 1], weights=[1, 0]),
        )


def test_nothing_to_balance_is_refused():
    with pytest.raises(ValueError, match="no sample has a class to balance"):
        BalancedPass(np.array([3]), labels=np.array([-1, -1, -1]))
