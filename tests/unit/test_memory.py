"""Memory, open files and threads stay as they are, epoch after epoch, on any number of threads."""

import ctypes
import gc
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ranks import SSD, run_ranks, write_tiny_voc

from mbv3dist.config import ViewConfig
from mbv3dist.convert.voc import convert_voc

NUM_PICTURES, BATCH_SIZE, CANVAS = 64, 16, 320
EPOCHS, WARM_UP = 20, 5
STEP_BYTES = BATCH_SIZE * CANVAS * CANVAS * 3
LEAK = 0.01  # of a batch per step: what has to be noticed
LEAK_BYTES = LEAK * STEP_BYTES * NUM_PICTURES / BATCH_SIZE  # per epoch
# Some pages more each epoch for a while are no leak: the heap's highest mark of many threads is
# reached late. In 150 epochs of 16 threads that was 1.8 MB, half of them in the first 20.
NOISE_BYTES = LEAK_BYTES / 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path("/proc/self/statm").exists() and hasattr(ctypes.CDLL(None), "malloc_trim")),
        reason="needs Linux's /proc and glibc",
    ),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("data")
    source = write_tiny_voc(root / "VOC", NUM_PICTURES)
    convert_voc([source], root / "out", split="train", workers=1, shard_bytes=20_000)
    return str(root / "out")


def resident_bytes() -> int:
    """What of this process is in memory, when its threads have nothing to do.

    The allocator is told to give back what is free: else what it keeps for later, some MB more
    with each thread, would hide a leak for long.
    """
    gc.collect()
    before, tries = -1, 0
    while True:
        ctypes.CDLL(None).malloc_trim(0)
        now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        tries += 1
        if now == before or tries == 100:  # the batches ahead are ready
            return now
        before = now
        time.sleep(0.01)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def watch_epochs(*, rank, world_size, data, num_threads, leak, out):
    """A run with an evaluation after each epoch; leaves [bytes, files, threads] of each epoch."""
    from mbv3dist.data.index import open_split
    from mbv3dist.data.loader import Loader, eval_batches
    from mbv3dist.data.plan import Plan

    gc.freeze()  # what is imported needs no collecting
    # One arena, and large blocks apart from it: less of a page here and there that stays in use
    # because of its neighbours (M_ARENA_MAX, M_MMAP_THRESHOLD).
    for option, value in ((-8, 1), (-3, 65536)):
        assert ctypes.CDLL(None).mallopt(option, value) == 1
    split = open_split(data, "train")
    plan = Plan(split.shard_sizes, global_batch_size=BATCH_SIZE, epochs=EPOCHS)
    options = {"size": CANVAS, "num_threads": num_threads}
    leaked, rows = [], []
    files_before = num_open_files()
    for step, _ in Loader(split, plan, view=SSD, seed=0, **options):
        leaked.append(os.urandom(int(leak * STEP_BYTES)))
        if plan.epochs_finished(step + 1) > plan.epochs_finished(step):
            plain = ViewConfig(name="resize")
            batches = eval_batches(split, view=plain, batch_size=BATCH_SIZE, **options)
            assert sum(len(batch) for batch in batches) == NUM_PICTURES
            rows.append([resident_bytes(), num_open_files(), threading.active_count()])
    assert len(leaked) == plan.num_steps
    assert num_open_files() == files_before
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/task")) > 1:  # the kernel's account may be a moment late
        assert time.monotonic() < deadline
        time.sleep(0.01)
    out.write_text(json.dumps(rows))


def growth(data: str, out: Path, *, num_threads: int, leak: float = 0.0) -> float:
    """Bytes per epoch after the warm-up: the median slope of all pairs of epochs."""
    run_ranks(watch_epochs, 1, data=data, num_threads=num_threads, leak=leak, out=out)
    resident, files, threads = np.array(json.loads(out.read_text())).T
    assert len(set(files.tolist())) == 1
    # The main thread, the planner's, which ends when the last step is planned, and the decoding.
    assert set(threads[:-1].tolist()) == {2 + num_threads}
    later = resident[WARM_UP:]
    first, second = np.triu_indices(len(later), 1)
    return float(np.median((later[second] - later[first]) / (second - first)))


@pytest.mark.parametrize("num_threads", [1, 4, 16])
def test_nothing_grows(data, tmp_path, num_threads):
    assert abs(growth(data, tmp_path / "seen", num_threads=num_threads)) < NOISE_BYTES


@pytest.mark.parametrize("num_threads", [1, 16])
def test_a_leak_of_a_hundredth_of_a_batch_would_be_noticed(data, tmp_path, num_threads):
    grown = growth(data, tmp_path / "seen", num_threads=num_threads, leak=LEAK)
    assert grown > NOISE_BYTES
    assert grown == pytest.approx(LEAK_BYTES, abs=NOISE_BYTES)
