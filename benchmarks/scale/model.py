"""What a data-parallel step costs on n ranks, from its cost on one: the model behind scaling.py.

Pure arithmetic, NumPy alone. Times are in seconds and sizes in bytes unless a name says otherwise.

A step of n ranks is predicted as the sum of

- compute: the mean step of a rank that does all of DDP's work but talks to nobody;
- stragglers: the mean of the slowest of n such steps (independent draws), less that mean;
- gradients: of the all-reduces of DDP's buckets, what the backward pass does not hide.

A message costs latency + bytes / rate on each link that it crosses (the alpha-beta model). Ways of
an all-reduce:

- ring: 2 (n - 1) messages in a row of 1/n of the bytes each; the slowest link sets the pace;
- hierarchical: reduce-scatter in the node by a ring, all-reduce among nodes by a double binary tree
  (2 log2 N latencies, the bytes of a ring: Sanders, Speck, Traeff, 2009), all-gather in the node.

A node's ranks use their links to other nodes at once; a link that they share is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

RESAMPLES = 400  # each fits the link and predicts all rounds again
LEAST_SHARE = 0.001  # of its time that the largest message of a sweep spends on its bytes
QUANTILES = 4001  # of a normal distribution that stands for measured steps


@dataclass(frozen=True)
class Link:
    """One direction of a connection between ranks.

    Attributes:
        title: For tables.
        gbytes_per_s: 1e9 bytes a second that a large message gets.
        latency_us: Of each message in a chain of them.
        shared: Whether all ranks of a node use the same one.
        source: Where the figures come from.
    """

    title: str
    gbytes_per_s: float
    latency_us: float
    shared: bool = False
    source: str = "given"


# Rates are what large all-reduces were seen to reach, not nominal ones. Latencies are those that
# NCCL's own cost table has for a step of its ring with the Simple protocol (src/graph/tuning.cc:
# 3.4 us on NVLink, 5.7 on PCIe, 9.6 over a network), but for TCP, where 30 us is our assumption.
LINKS = {
    "nvlink4": Link(
        "NVLink 4 (H100, H200)",
        360.0,
        3.4,
        source="450 GB/s a direction nominal, of which a ring gets about 80 %; reports of "
        "nccl-tests on 8 GPUs show up to 475 with in-switch sums, which are not counted on",
    ),
    "nvlink3": Link(
        "NVLink 3 (A100)",
        230.0,
        3.4,
        source="300 GB/s a direction nominal; NCCL itself caps its estimate at 235",
    ),
    "pcie4": Link(
        "PCIe 4.0 x16", 20.0, 5.7, source="32 GB/s nominal; 20 GB/s in reports of nccl-tests"
    ),
    "ndr400": Link(
        "InfiniBand NDR, a 400 Gb/s port for each GPU",
        47.0,
        9.6,
        source="50 GB/s nominal; NCCL's developers expect 46 to 48 GB/s of such a port",
    ),
    "hdr200": Link(
        "InfiniBand HDR, a 200 Gb/s port for each GPU", 23.5, 9.6, source="half of NDR's"
    ),
    "eth100": Link(
        "100 Gb/s Ethernet, a port for each node",
        12.0,
        30.0,
        shared=True,
        source="12.5 GB/s nominal; NCCL's developers call 12.2 as good as a 100 Gb/s card gets",
    ),
    "eth10": Link(
        "10 Gb/s Ethernet, a port for each node",
        1.15,
        30.0,
        shared=True,
        source="1.25 GB/s nominal, less what TCP's headers and pauses take",
    ),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of `ranks_per_node` ranks each."""

    intra: Link
    inter: Link
    ranks_per_node: int

    def shape(self, ranks: int) -> tuple[int, int]:
        """Return (ranks of a node, nodes).

        Raises:
            ValueError: When the ranks do not fill nodes.
        """
        if ranks <= self.ranks_per_node:
            return ranks, 1
        if ranks % self.ranks_per_node:
            raise ValueError(
                f"{ranks} ranks do not fill nodes of {self.ranks_per_node}; change --curve-ranks "
                "or --ranks-per-node"
            )
        return self.ranks_per_node, ranks // self.ranks_per_node

    def node_rate(self, local: int) -> float:
        """Return the bytes a second that a node's ranks together send to other nodes."""
        return 1e9 * self.inter.gbytes_per_s * (1 if self.inter.shared else local)


def ring_s(num_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of a ring all-reduce over all ranks."""
    if ranks == 1:
        return 0.0
    local, nodes = cluster.shape(ranks)
    rate = 1e9 * cluster.intra.gbytes_per_s if local > 1 else math.inf
    latency = cluster.intra.latency_us if local > 1 else 0.0
    if nodes > 1:
        rate = min(rate, cluster.node_rate(local))
        latency = max(latency, cluster.inter.latency_us)
    return 2 * (ranks - 1) * (1e-6 * latency + num_bytes / ranks / rate)


def hierarchical_s(num_bytes: float, ranks: int, cluster: Cluster) -> float:
    """Return the time of an all-reduce in nodes, then among them."""
    local, nodes = cluster.shape(ranks)
    inside = local - 1
    took = 2 * inside * 1e-6 * cluster.intra.latency_us
    took += 2 * inside / local * num_bytes / (1e9 * cluster.intra.gbytes_per_s)
    took += 2 * math.ceil(math.log2(nodes)) * 1e-6 * cluster.inter.latency_us
    return took + 2 * (nodes - 1) / nodes * num_bytes / cluster.node_rate(local)


def all_reduce_s(num_bytes: float, ranks: int, cluster: Cluster) -> tuple[float, str]:
    """Return the time of the faster way, as libraries choose it by size, and its name."""
    ways = {
        "ring": ring_s(num_bytes, ranks, cluster),
        "hierarchical": hierarchical_s(num_bytes, ranks, cluster),
    }
    name = min(ways, key=lambda way: ways[way])
    return ways[name], name


def fit_link(
    sizes: Sequence[float], seconds: Sequence[float], *, ranks: int, title: str = "measured"
) -> Link:
    """Return the link that explains measured all-reduces of a ring best, by relative errors.

    Raises:
        ValueError: With fewer than two ranks or sizes.
    """
    if ranks < 2 or len(set(sizes)) < 2:
        raise ValueError("a link is fitted to two sizes or more, between two ranks or more")
    took = np.asarray(seconds, dtype=float)
    messages = 2 * (ranks - 1)
    volume = messages / ranks * np.asarray(sizes, dtype=float)
    rows = np.stack((np.full_like(took, messages), volume), axis=1) / took[:, None]
    (latency, per_byte), *_ = np.linalg.lstsq(rows, np.ones_like(took), rcond=None)
    if latency < 0:  # noise: the small messages were as fast as the clock can tell
        latency, per_byte = 0.0, float(np.sum(rows[:, 1]) / np.sum(rows[:, 1] ** 2))
    least = LEAST_SHARE * float(np.min(took / volume))
    if per_byte < least:  # noise: bytes cost less than can be told
        per_byte = least
        rest = 1 - rows[:, 1] * per_byte
        latency = float(np.sum(rows[:, 0] * rest) / np.sum(rows[:, 0] ** 2))
    return Link(title, 1e-9 / float(per_byte), 1e6 * float(latency), source="measured here")


@dataclass(frozen=True)
class Bucket:
    """One of DDP's: its gradients are there `ready_s` into the step."""

    num_bytes: int
    ready_s: float


@dataclass(frozen=True)
class Shape:
    """A step without communication, seen from its start.

    Attributes:
        step_s: Its length.
        backward_end_s: When the last gradient is there.
        buckets: In the order in which DDP sends them.
    """

    step_s: float
    backward_end_s: float
    buckets: tuple[Bucket, ...]

    def scaled(self, step_s: float) -> Shape:
        """Return the same step, stretched to this length."""
        factor = step_s / self.step_s
        buckets = tuple(replace(b, ready_s=b.ready_s * factor) for b in self.buckets)
        return replace(
            self,
            step_s=step_s,
            backward_end_s=self.backward_end_s * factor,
            buckets=buckets,
        )


def exposed_s(shape: Shape, times: Sequence[float], *, overlap: float) -> float:
    """Return how much longer the backward pass takes for its buckets' all-reduces.

    They run one after the other, each when its gradients are there. While one runs, the backward
    pass goes on at full speed for the share `overlap` of the time; the rest of it is taken from
    computation, as where both want the same cores.
    """
    stolen, end = 0.0, 0.0
    for bucket, took in zip(shape.buckets, times, strict=True):
        ready = bucket.ready_s + stolen
        end = max(ready, end) + took
        stolen += (1 - overlap) * took if bucket.ready_s < shape.backward_end_s else 0.0
    return max(end, shape.backward_end_s + stolen) - shape.backward_end_s


def expected_max(values: Sequence[float], draws: int) -> float:
    """Return the mean of the largest of `draws` values, drawn with replacement from these."""
    ranked = np.sort(np.asarray(values, dtype=float))
    below = (np.arange(len(ranked) + 1) / len(ranked)) ** draws
    return float(np.sum(ranked * np.diff(below)))


def normal_steps(step_s: float, jitter: float) -> list[float]:
    """Return steps that stand for a normal distribution, by its quantiles."""
    shares = (np.arange(QUANTILES) + 0.5) / QUANTILES
    normal = NormalDist(1.0, jitter) if jitter > 0 else None
    return [step_s * (normal.inv_cdf(float(share)) if normal else 1.0) for share in shares]


@dataclass(frozen=True)
class Prediction:
    """A step's parts, which add up to `step_s`, but for a wait for data."""

    step_s: float
    parts: dict[str, float]
    communication_s: float
    algorithm: str


def predict(
    shape: Shape,
    steps: Sequence[float],
    ranks: int,
    cluster: Cluster,
    *,
    overlap: float = 1.0,
    contention: float = 1.0,
    data_s: float = 0.0,
) -> Prediction:
    """Return the step of `ranks` ranks.

    Args:
        shape: A rank's step without communication; it is stretched to the mean of `steps`.
        steps: Such steps as they were measured, for their mean and their spread.
        ranks: How many.
        cluster: What they talk over.
        overlap: Share of a bucket's time that takes nothing from computation.
        contention: How much slower ranks compute beside each other than alone: on a host that they
            share, the last one gets faster when the others wait for it.
        data_s: The time in which the loader delivers a batch, beside the step.
    """
    mean = float(np.mean(steps))
    shape = shape.scaled(mean)
    found = [all_reduce_s(bucket.num_bytes, ranks, cluster) for bucket in shape.buckets]
    times = [took for took, _ in found]
    normalizer = all_reduce_s(4, ranks, cluster)[0]
    parts = {
        "compute": mean,
        "stragglers": (expected_max(steps, ranks) - mean) / max(contention, 1.0),
        "gradients": exposed_s(shape, times, overlap=overlap),
    }
    step_s = sum(parts.values())
    parts["data"] = max(0.0, data_s - step_s)
    largest = max(range(len(times)), key=lambda place: times[place])
    return Prediction(step_s + parts["data"], parts, sum(times) + normalizer, found[largest][1])


def bootstrap(
    statistic: Callable[[list[int]], dict[str, float]], rounds: int
) -> dict[str, dict[str, float]]:
    """Return figures over all rounds, each with its 95 % interval over rounds drawn anew."""
    assert rounds > 0
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(rounds, size=rounds).tolist()) for _ in range(RESAMPLES)]
    found = {}
    for name, value in statistic(list(range(rounds))).items():
        low, high = np.percentile([one[name] for one in drawn], (2.5, 97.5))
        found[name] = {"value": value, "low": float(low), "high": float(high)}
    return found
