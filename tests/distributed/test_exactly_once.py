"""Every epoch holds each sample once, in one order, on any number of real processes and threads."""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import Part, Reading, whole_run, write_tiny_voc

from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import Split, open_split
from mbv3dist.data.reader import Reader

pytestmark = pytest.mark.slow

EPOCHS = 3
SIZES = (311, 101)  # primes, so that nothing divides them
SOME_LAYOUTS = [(1, 2), (3, 5), (8, 1)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """Two data sets of many shards."""
    root = tmp_path_factory.mktemp("data")
    for number, size in enumerate(SIZES):
        source = write_tiny_voc(root / f"VOC{number}", size, seed=number)
        convert_voc([source], root / str(number), split="train", workers=1, shard_bytes=20_000)
    return str(root / "0"), str(root / "1")


def sha256(run: list[Part], name: str) -> str:
    """Of what every position of the run got, in order."""
    text = "\n".join(str(item) for part in run for item in getattr(part, name))
    return hashlib.sha256(text.encode()).hexdigest()


def read_on_all(reading: Reading, layouts: list[tuple[int, int]], out: Path) -> list[Part]:
    """Reads on each number of ranks and threads; all give one SHA-256, and one run is returned."""
    hashes, run = {}, []
    for ranks, threads in layouts:
        run = whole_run(replace(reading, num_threads=threads), ranks, out / f"{ranks}x{threads}")
        names = ("keys", "epochs", "weights", "digests")
        hashes[ranks, threads] = [sha256(run, name) for name in names]
    first = hashes[layouts[0]]
    assert {layout: found for layout, found in hashes.items() if found != first} == {}
    return run


def epochs_of(run: list[Part]) -> list[list[tuple[str, str]]]:
    """Key and digest of what each epoch read, in order; what has weight 0 does not count."""
    epochs: list[list[tuple[str, str]]] = [[] for _ in range(EPOCHS)]
    for part in run:
        for key, epoch, weight, digest in zip(
            part.keys, part.epochs, part.weights, part.digests, strict=True
        ):
            assert weight == (1.0 if epoch < EPOCHS else 0.0)
            if weight:
                epochs[epoch].append((key, digest))
    return epochs


def test_each_sample_once_an_epoch_in_one_order(data, tmp_path):
    reading = Reading(data[:1], epochs=EPOCHS)
    split, plan = reading.open()
    assert len(split) == SIZES[0] and len(split.shards) > 20
    overrun = plan.num_steps * plan.global_batch_size - EPOCHS * SIZES[0]
    assert overrun > 0
    layouts = [(ranks, threads) for ranks in (1, 2, 3, 4, 6, 8) for threads in (1, 2, 5)]
    run = read_on_all(reading, layouts, tmp_path)
    assert sum(part.weights.count(0.0) for part in run) == overrun
    wanted = Counter(split.keys(np.arange(len(split))))
    epochs = epochs_of(run)
    for epoch in epochs:
        found = Counter(key for key, _ in epoch)
        assert wanted - found == Counter(), "missing"
        assert found - wanted == Counter(), "doubled"
    # Each epoch in an order of its own, and no sample twice with the same pixels and boxes.
    assert len({tuple(key for key, _ in epoch) for epoch in epochs}) == EPOCHS
    assert len({read for epoch in epochs for read in epoch}) == EPOCHS * SIZES[0]


def read_by_turns(members: np.ndarray, quota: int) -> list[Counter[int]]:
    """How often each pass reads each of a group's samples, if these are read by turns for ever."""
    turns = [int(members[place % len(members)]) for place in range(EPOCHS * quota)]
    return [Counter(turns[epoch * quota : (epoch + 1) * quota]) for epoch in range(EPOCHS)]


def check_passes(split: Split, run: list[Part], groups: list[tuple[np.ndarray, int]]) -> None:
    """Each pass reads each group's quota of samples, by turns, and no sample twice alike."""
    epochs = epochs_of(run)
    for number, epoch in enumerate(epochs):
        wanted: Counter[str] = Counter()
        for members, quota in groups:
            turns = read_by_turns(members, quota)[number]
            wanted.update({split.key(index): count for index, count in turns.items()})
        assert Counter(key for key, _ in epoch) == wanted
        assert len(epoch) == sum(quota for _, quota in groups)
    reads = [read for epoch in epochs for read in epoch]
    assert len(set(reads)) == len(reads)


def test_weights_of_data_sets_are_kept_in_every_pass(data, tmp_path):
    reading = Reading(data, epochs=EPOCHS, weights=(0.3, 2.6))
    split, _ = reading.open()
    run = read_on_all(reading, SOME_LAYOUTS, tmp_path)
    first, second = np.split(np.arange(sum(SIZES)), SIZES[:1])
    check_passes(split, run, [(first, round(0.3 * SIZES[0])), (second, round(2.6 * SIZES[1]))])


def rarest_classes(data: str) -> np.ndarray:
    """For each picture its class that the fewest pictures have; -1 without boxes."""
    split = open_split(data, "train")
    with Reader(split) as reader:
        classes = [set(reader.target(index).labels.tolist()) for index in range(len(split))]
    pictures = Counter(label for labels in classes for label in labels)
    return np.array([min(labels, key=lambda n: (pictures[n], n), default=-1) for labels in classes])


def test_balanced_classes_are_kept_in_every_pass(data, tmp_path):
    reading = Reading(data[:1], epochs=EPOCHS, balance_classes=True)
    split, _ = reading.open()
    labels = rarest_classes(data[0])
    assert np.array_equal(split.labels(), labels)
    groups = [np.flatnonzero(labels == label) for label in (-1, 0, 1, 2)]
    sizes = [len(group) for group in groups]
    assert max(sizes[1:]) > 5 * min(sizes[1:]) > 0 and sizes[0] > 0  # there is work to do
    quota = round(sum(sizes[1:]) / 3)
    run = read_on_all(reading, SOME_LAYOUTS, tmp_path)
    quotas = [sizes[0], quota, quota, quota]
    check_passes(split, run, list(zip(groups, quotas, strict=True)))
