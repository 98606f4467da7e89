"""Runs that are killed again and again and go on, on other numbers of ranks, from the saved state.

All ranks are real processes, and SIGKILL meets them while their threads are decoding ahead. What
every rank got in every step, also in steps that a kill made undone, is compared with the
uninterrupted run: keys, pixels and boxes, weights.
"""

import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import (
    Part,
    Reading,
    join_ranks,
    kill_ranks,
    make_barrier,
    read_in_lockstep,
    start_ranks,
    whole_run,
    write_tiny_voc,
)

from mbv3dist.convert.voc import convert_voc

pytestmark = pytest.mark.slow

WORLD_SIZES = (8, 2, 8, 3)
NUM_THREADS, PREFETCH = 2, 3
SIZES = {"prime": 127, "whole steps": 96, "other": 29}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Data sets of several shards."""
    root = tmp_path_factory.mktemp("data")
    for name, size in SIZES.items():
        source = write_tiny_voc(root / f"VOC {name}", size, seed=size)
        convert_voc([source], root / name, split="train", workers=1, shard_bytes=30_000)
    return {name: str(root / name) for name in SIZES}


class Attempts:
    """A run in the making: its attempts, and how they compare with the uninterrupted run."""

    def __init__(self, reading: Reading, folder: Path):
        self.reading = reading
        self.num_steps = reading.open()[1].num_steps
        self.folder = folder
        self.state = folder / "state.json"
        self.whole = whole_run(reading, 1, folder / "whole")
        assert [part.step for part in self.whole] == list(range(self.num_steps))
        self.count = 0
        self.compared = 0

    @property
    def step(self) -> int:
        """Where the next attempt has to go on."""
        return json.loads(self.state.read_text())["step"] if self.state.exists() else 0

    def start(self, world_size: int, **options: int) -> "Attempt":
        """Starts the ranks."""
        logs = self.folder / f"attempt {self.count}"
        logs.mkdir()
        self.count += 1
        first_step, barrier = self.step, make_barrier(world_size)
        processes = start_ranks(
            read_in_lockstep,
            world_size,
            reading=self.reading,
            state=self.state,
            logs=logs,
            barrier=barrier,
            **options,
        )
        return Attempt(self, first_step, world_size, logs, processes, barrier)


@dataclass
class Attempt:
    """Ranks that go on from a step until they end or are killed."""

    run: Attempts
    first_step: int
    world_size: int
    logs: Path
    processes: list[Any]
    barrier: Any

    def check(self) -> None:
        """Compares what the ranks got with the uninterrupted run; stops at the first difference.

        Each began at the state's step and left out none up to the state that is there now.
        """
        for rank in range(self.world_size):
            log = self.logs / str(rank)
            lines = log.read_text().splitlines() if log.exists() else []
            assert len(lines) >= self.run.step - self.first_step, "a step was lost"
            for number, line in enumerate(lines):
                entry = json.loads(line)
                part = Part(**entry["part"])
                assert part.step == self.first_step + number
                expected = self.run.whole[part.step]
                size = self.run.reading.global_batch_size // self.world_size
                mine = slice(rank * size, (rank + 1) * size)
                for name in ("keys", "epochs", "weights", "digests"):
                    assert getattr(part, name) == getattr(expected, name)[mine], (rank, part.step)
                if part.step + PREFETCH + 2 < self.run.num_steps:
                    assert entry["threads"] == 1 + NUM_THREADS, "threads were decoding ahead"
                self.run.compared += len(part.keys)

    def wait_for_death(self, rank: int) -> None:
        """Waits until a rank has killed itself; then the launcher kills the others."""
        self.processes[rank].join(60)
        codes = kill_ranks(self.processes)
        assert codes[rank] == -9
        # Behind the last step the others end by themselves.
        assert set(codes) <= ({-9, 0} if self.run.step == self.run.num_steps else {-9})
        self.check()

    def wait_for_end(self) -> None:
        """Waits until all ranks have ended by themselves."""
        assert join_ranks(self.processes) == [0] * self.world_size
        self.check()


def kill_at_every_step(reading: Reading, folder: Path) -> Attempts:
    """A run that is killed behind each state it writes, by turns at once and in the next step."""
    run = Attempts(reading, folder)
    sizes = itertools.cycle(WORLD_SIZES)
    while (step := run.step) < run.num_steps:
        if step % 4 == 1:
            for world_size in (next(sizes), next(sizes)):  # twice in a row without progress
                dying = (step + 1) % world_size
                run.start(world_size, die_rank=dying, die_step=step).wait_for_death(dying)
                assert run.step == step
        world_size = next(sizes)
        dying = step % world_size
        late = step % 2 == 0 or step == run.num_steps - 1
        where = {"die_step": step, "die_late": True} if late else {"die_step": step + 1}
        run.start(world_size, die_rank=dying, **where).wait_for_death(dying)
        assert run.step == step + 1
    for world_size in sorted(set(WORLD_SIZES)):  # at the end there is nothing more to read
        run.start(world_size).wait_for_end()
        assert run.step == run.num_steps
    return run


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["prime"], {}),
        (["prime"], {"tail": "drop"}),
        (["whole steps"], {}),
        (["prime", "other"], {"weights": (0.5, 1.7), "epochs": 2}),
    ],
    ids=["carry", "drop", "epochs of whole steps", "weights"],
)
def test_killed_at_every_step(data, tmp_path, names, options):
    reading = Reading(tuple(data[name] for name in names), num_threads=NUM_THREADS, **options)
    plan = reading.open()[1]
    ends = [
        s for s in range(1, plan.num_steps) if plan.epoch_of(s * 24 - 1) < plan.epoch_of(s * 24)
    ]
    if options.get("tail") == "drop" or names == ["whole steps"]:
        assert len(ends) == reading.epochs - 1  # kills at the very end of an epoch are among them
    run = kill_at_every_step(reading, tmp_path)
    assert run.count > run.num_steps + 3
    assert run.compared >= run.num_steps * reading.global_batch_size


def test_killed_from_outside_at_any_moment(data, tmp_path):
    """A node that goes down: all ranks at a time, wherever each of them is."""
    files = sorted((path, path.stat().st_size) for path in Path(data["prime"]).rglob("*"))
    run = Attempts(Reading((data["prime"],), epochs=12, num_threads=NUM_THREADS), tmp_path)
    moments = random.Random(0)
    for world_size in itertools.cycle(WORLD_SIZES):
        attempt = run.start(world_size)
        if attempt.first_step == run.num_steps:
            break
        deadline = time.monotonic() + 60
        goal = attempt.first_step + moments.randrange(3)  # none: perhaps before anything is read
        while run.step < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        codes = kill_ranks(attempt.processes)
        assert set(codes) <= {-9, 0} and run.step >= min(goal, run.num_steps)
        attempt.check()
    attempt.wait_for_end()
    assert run.count > 5
    assert sorted((path, path.stat().st_size) for path in Path(data["prime"]).rglob("*")) == files
