"""The scaling model: what must hold for any link, any buckets and any number of ranks."""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling
from scale import figures
from scale.model import (
    LINKS,
    Bucket,
    Cluster,
    Link,
    Shape,
    all_reduce_s,
    bootstrap,
    expected_max,
    exposed_s,
    fit_link,
    hierarchical_s,
    normal_steps,
    predict,
    ring_s,
)

rates = st.floats(0.01, 1000)
latencies = st.floats(0, 500)
links = st.builds(Link, st.just("link"), rates, latencies, shared=st.booleans())
local_ranks = st.sampled_from((1, 2, 4, 8))
clusters = st.builds(Cluster, links, links, local_ranks)
sizes = st.integers(1, 10**9)
worlds = st.sampled_from((1, 8, 16, 64, 1024))
steps = st.lists(st.floats(0.001, 1), min_size=1, max_size=40)


@st.composite
def shapes(draw):
    """A step whose last bucket is ready when the backward pass ends, as in DDP."""
    end = draw(st.floats(0.01, 1))
    shares = sorted(draw(st.lists(st.floats(0.01, 1), max_size=5)))
    ready = [share * end for share in shares] + [end]
    buckets = tuple(Bucket(draw(sizes), at) for at in ready)
    step_s = end + draw(st.floats(0, 0.1))
    return Shape(step_s, end, buckets)


def free(link):
    return replace(link, latency_us=0.0)


@given(sizes, clusters)
def test_one_rank_sends_nothing(num_bytes, cluster):
    for cost in (ring_s, hierarchical_s):
        assert cost(num_bytes, 1, cluster) == 0


@given(sizes, rates, st.integers(2, 1024))
def test_each_rank_of_a_ring_sends_its_share_twice(num_bytes, rate, ranks):
    link = Link("link", rate, 0)
    took = ring_s(num_bytes, ranks, Cluster(link, link, ranks))
    assert took * rate * 1e9 == pytest.approx(2 * (ranks - 1) / ranks * num_bytes)


@given(sizes, latencies, st.integers(2, 1024))
def test_a_ring_is_two_rounds_of_messages(num_bytes, latency, ranks):
    link = Link("link", 1e30, latency)
    took = ring_s(num_bytes, ranks, Cluster(link, link, ranks))
    assert took == pytest.approx(2 * (ranks - 1) * 1e-6 * latency)


@given(sizes, rates, local_ranks, worlds)
def test_a_hierarchy_of_equal_links_moves_what_a_ring_moves(num_bytes, rate, local, ranks):
    link = Link("link", rate, 0)
    cluster = Cluster(link, link, local)
    flat = ring_s(num_bytes, ranks, cluster)
    assert hierarchical_s(num_bytes, ranks, cluster) == pytest.approx(flat)


@given(sizes, clusters, worlds, st.floats(1, 100))
def test_more_bandwidth_is_never_slower(num_bytes, cluster, ranks, factor):
    for name in ("intra", "inter"):
        link = getattr(cluster, name)
        faster = replace(cluster, **{name: replace(link, gbytes_per_s=factor * link.gbytes_per_s)})
        for cost in (ring_s, hierarchical_s):
            assert cost(num_bytes, ranks, faster) <= cost(num_bytes, ranks, cluster)


@given(sizes, clusters, worlds)
def test_the_faster_way_is_taken(num_bytes, cluster, ranks):
    took, name = all_reduce_s(num_bytes, ranks, cluster)
    ways = {
        "ring": ring_s(num_bytes, ranks, cluster),
        "hierarchical": hierarchical_s(num_bytes, ranks, cluster),
    }
    assert took == ways[name] == min(ways.values())


def test_a_port_for_the_node_is_slower_than_one_for_each_rank():
    own = LINKS["ndr400"]
    shared = replace(own, shared=True)
    intra = LINKS["nvlink4"]
    times = [ring_s(10**8, 64, Cluster(intra, inter, 8)) for inter in (own, shared)]
    assert times[0] < times[1]
    # Large messages, many nodes: the port is what counts, and eight are eight times one.
    slow = [replace(link, gbytes_per_s=0.01, latency_us=0) for link in (own, shared)]
    times = [hierarchical_s(10**8, 1024, Cluster(intra, inter, 8)) for inter in slow]
    assert times[1] == pytest.approx(8 * times[0], rel=0.05)


def test_ranks_fill_nodes():
    link = LINKS["nvlink4"]
    with pytest.raises(ValueError, match="12 ranks do not fill nodes of 8"):
        ring_s(1, 12, Cluster(link, link, 8))


@given(rates, st.floats(0.1, 500), st.sampled_from((2, 3, 8)), st.integers(0, 2**32 - 1))
def test_a_fit_finds_the_link(rate, latency, ranks, seed):
    link = Link("link", rate, latency)
    swept = [4, 1 << 16, 1 << 20, 1 << 23]
    times = np.array([ring_s(size, ranks, Cluster(link, link, ranks)) for size in swept])
    found = fit_link(swept, times, ranks=ranks)
    assert found.gbytes_per_s == pytest.approx(rate, rel=1e-3)
    assert found.latency_us == pytest.approx(latency, rel=1e-3, abs=1e-3)
    noisy = times * np.random.default_rng(seed).uniform(0.95, 1.05, len(times))
    found = fit_link(swept, noisy, ranks=ranks)
    fitted = [ring_s(size, ranks, Cluster(found, found, ranks)) for size in swept]
    assert fitted == pytest.approx(times, rel=0.15)


def test_a_fit_never_has_negative_latency():
    found = fit_link([1000, 10**6], [0.5e-6, 1e-3], ranks=2)
    assert found.latency_us == 0
    assert found.gbytes_per_s > 0
    flat = fit_link([4, 10**6], [1e-3, 0.9e-3], ranks=2)  # bytes cannot cost less than nothing
    assert math.isfinite(flat.gbytes_per_s)
    assert 0.8 * 500 < flat.latency_us < 500
    with pytest.raises(ValueError, match="two sizes or more"):
        fit_link([1000], [1e-3], ranks=2)


@given(shapes(), st.lists(st.floats(0, 1), min_size=6, max_size=6), st.floats(0, 1))
def test_what_overlap_can_hide(shape, times, overlap):
    times = times[: len(shape.buckets)]
    found = exposed_s(shape, times, overlap=overlap)
    hidden = exposed_s(shape, times, overlap=1.0)
    assert times[-1] - 1e-9 <= hidden <= found + 1e-9  # the last bucket has nothing to hide behind
    assert found <= sum(times) + 1e-9
    paid = exposed_s(shape, times, overlap=0.0)
    assert paid == pytest.approx(sum(times))


@given(shapes())
def test_fast_links_hide_all_but_the_last_bucket(shape):
    gaps = [b.ready_s - a.ready_s for a, b in pairwise(shape.buckets)]
    times = [*gaps, 0.25]  # each is through just when the next is ready
    assert exposed_s(shape, times, overlap=1.0) == pytest.approx(0.25)


@given(steps, st.integers(1, 1024))
def test_the_slowest_of_many(values, draws):
    found = expected_max(values, draws)
    assert np.mean(values) * (1 - 1e-9) <= found <= max(values) * (1 + 1e-9)
    assert expected_max(values, 1) == pytest.approx(np.mean(values))
    assert found <= expected_max(values, draws + 1) * (1 + 1e-9)


def test_the_slowest_as_drawn():
    values = [1.0, 2.0, 4.0, 8.0]
    drawn = np.random.default_rng(0).choice(values, (200_000, 3)).max(1).mean()
    assert expected_max(values, 3) == pytest.approx(drawn, rel=0.01)
    # Of a normal distribution: 1.267 deviations for 5, 3.24 for 1000 (tables of order statistics).
    normal = normal_steps(2.0, 0.1)
    assert expected_max(normal, 5) == pytest.approx(2.0 * (1 + 0.1 * 1.163), rel=1e-3)
    assert expected_max(normal, 1000) == pytest.approx(2.0 * (1 + 0.1 * 3.241), rel=3e-3)
    assert set(normal_steps(2.0, 0.0)) == {2.0}


@given(shapes(), steps, clusters, worlds, st.floats(0, 1), st.floats(0, 2))
def test_a_prediction_is_the_sum_of_its_parts(shape, values, cluster, ranks, overlap, data_s):
    found = predict(shape, values, ranks, cluster, overlap=overlap, data_s=data_s)
    assert found.step_s == pytest.approx(sum(found.parts.values()))
    assert all(part >= -1e-9 for part in found.parts.values())
    assert found.step_s >= data_s - 1e-9
    efficiency = np.mean(values) / found.step_s
    assert 0 < efficiency <= 1 + 1e-9
    if ranks == 1 and data_s == 0:
        assert efficiency == pytest.approx(1)
        assert found.communication_s == 0


@given(shapes(), steps, clusters)
def test_more_ranks_are_never_more_efficient(shape, values, cluster):
    found = [predict(shape, values, ranks, cluster).step_s for ranks in (1, 8, 16, 64, 1024)]
    if cluster.intra.gbytes_per_s >= cluster.inter.gbytes_per_s or cluster.ranks_per_node == 1:
        assert all(a <= b * (1 + 1e-9) for a, b in pairwise(found))
    assert found[0] == min(found)


@given(shapes(), steps, clusters, st.floats(1, 10))
def test_a_shared_host_helps_its_last_rank(shape, values, cluster, contention):
    plain = predict(shape, values, 8, cluster).parts["stragglers"]
    shared = predict(shape, values, 8, cluster, contention=contention).parts["stragglers"]
    assert shared == pytest.approx(plain / contention)


@settings(max_examples=20)
@given(st.lists(st.floats(1, 2), min_size=2, max_size=12))
def test_the_bootstrap_draws_rounds(values):
    found = bootstrap(
        lambda picks: {"mean": float(np.mean([values[i] for i in picks]))}, len(values)
    )
    row = found["mean"]
    assert row["value"] == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= row["low"] <= row["high"] <= max(values) + 1e-9
    same = bootstrap(lambda picks: {"mean": 3.0}, len(values))["mean"]
    assert same == {"value": 3.0, "low": 3.0, "high": 3.0}


def test_the_bootstrap_covers_about_95_percent():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        values = generator.normal(10, 1, 30)
        row = bootstrap(lambda picks, v=values: {"m": float(v[picks].mean())}, 30)["m"]
        covered += row["low"] <= 10 <= row["high"]
    assert 50 <= covered <= 60


def test_what_a_trace_says_is_counted_once():
    """Two ranks: the second comes late, so the first one waits for it; buckets overlap."""

    def rank(late, buckets):
        return {
            "steps_s": [1.0],
            "traces": [
                {
                    "normalizer": [0.0 + late, 0.2],
                    "buckets": buckets,
                    "backward_end": 0.9,
                }
            ],
        }

    first = rank(0.0, [[8, 0.5, 0.7], [8, 0.6, 0.65], [4, 0.8, 0.9]])
    second = rank(0.1, [[8, 0.5, 0.7], [8, 0.6, 0.65], [4, 0.8, 0.9]])
    found = figures._traced_ms([first, second])
    assert found["overlapped"] == pytest.approx(200)  # 0.5 to 0.7: the second bucket lies within
    assert found["exposed"] == pytest.approx(100 + (200 + 100) / 2)
    assert found["busy"] == pytest.approx(found["overlapped"] + found["exposed"])
    assert found["waiting"] == pytest.approx(50)  # a tenth of a second on one of two
    assert found["transfer"] == pytest.approx(100 + 200 + 50 + 100)
    assert found["step"] == pytest.approx(1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "3"], "--batch 3: in strong scaling each rank gets an equal part"),
        (["--models", "resnet"], "--models resnet: choose of mobilenetv3_small"),
        (["--batch", "8", "--ranks", "6"], "for 6 rank(s) give a multiple of 12, at least 12"),
        (["--link-inter", "string"], "--link-intra and --link-inter: choose of nvlink4"),
        (["--curve-ranks", "8,x"], "--curve-ranks 8,x: give numbers"),
        (["--given-rate", "10"], "--given-rate is of one model"),
        (["--data-rate", "-1"], "--data-rate must not be negative"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--ranks", "1", "--link-intra", "measured"], "needs two ranks"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert scaling.main(["--device", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_links_say_where_their_figures_come_from():
    for link in LINKS.values():
        assert link.gbytes_per_s > 0
        assert math.isfinite(link.latency_us)
        assert len(link.source) > 10
