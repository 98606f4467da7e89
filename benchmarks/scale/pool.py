"""Ranks of scaling.py: real processes that live through a benchmark and are asked in turns.

A pool is one process group. On a CPU its ranks are forked from one process that has imported torch;
on GPUs each is an interpreter of its own, since CUDA does not survive a fork. Jobs and answers are
JSON lines in pipes. The ranks find each other through a file, so no port has to be free, and talk
over the loopback device. A rank ends when its pipe closes, whatever it is doing: none outlives
the benchmark.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
START_LIMIT_S = 180.0
ANSWER_LIMIT_S = 180.0
END_LIMIT_S = 10.0
BLAME_S = 2.0  # a rank that fails because another one died is not the one to name


class Pool:
    """The ranks of one process group."""

    def __init__(self, world_size: int, *, device: str, threads: int, work: Path):
        """Start the ranks; `ask` for anything waits until they are there.

        Args:
            world_size: How many.
            device: "cpu" or "cuda".
            threads: Of torch, in each rank.
            work: Folder for messages and the file where ranks meet.
        """
        work.mkdir(parents=True, exist_ok=True)
        self.world_size = world_size
        self.log = work / f"ranks-of-{world_size}.log"
        self._store = work / f"ranks-of-{world_size}.store"
        self._device, self._threads = device, threads
        self._jobs: list[int] = []  # ends to write to, by rank
        self._answers: list[int] = []
        self._unread = [b""] * world_size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answer_limit_s = START_LIMIT_S
        everyone = list(range(world_size))
        with open(self.log, "ab") as log:
            try:
                for ranks in [everyone] if device == "cpu" else [[rank] for rank in everyone]:
                    self._start(ranks, log)
            except BaseException:
                self.kill()
                raise

    def _start(self, ranks: Sequence[int], log: Any) -> None:
        """Start one interpreter, which becomes or forks these ranks."""
        theirs: list[int] = []
        for _ in ranks:
            read_job, write_job = os.pipe()
            read_answer, write_answer = os.pipe()
            self._jobs.append(write_job)
            self._answers.append(read_answer)
            theirs += [read_job, write_answer]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        environment |= {"MKL_NUM_THREADS": str(self._threads)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(self.world_size)}
        environment |= {"LOCAL_WORLD_SIZE": str(self.world_size)}
        if sys.platform == "linux":
            environment |= {"GLOO_SOCKET_IFNAME": "lo"}
        if self._device == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        job = {"ranks": list(ranks), "pipes": theirs, "store": str(self._store)}
        process = subprocess.Popen(
            [sys.executable, "-m", "scale.worker", json.dumps(job)],
            cwd=BENCHMARKS,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=theirs,
            start_new_session=True,  # so that its ranks can be ended together
        )
        self._processes.append(process)
        for end in theirs:
            os.close(end)

    def ask(self, job: Mapping[str, Any], *, ranks: Sequence[int] | None = None) -> list[Any]:
        """Give a job to all ranks, or some, at once; return their answers.

        Raises:
            RuntimeError: One failed, died or did not answer in time. All are ended then: those
                that are left may wait for it for ever.
        """
        asked = list(range(self.world_size)) if ranks is None else list(ranks)
        line = json.dumps(job).encode() + b"\n"
        answers: dict[int, Any] = {}
        try:
            for rank in asked:
                with contextlib.suppress(BrokenPipeError):  # it died: its answer will say so
                    os.write(self._jobs[rank], line)
            deadline = time.monotonic() + self._answer_limit_s
            while len(answers) < len(asked):
                waiting = [rank for rank in asked if rank not in answers]
                answers |= self._read(waiting, deadline)
        except BaseException:
            self.kill()
            raise
        self._answer_limit_s = ANSWER_LIMIT_S
        return [answers[rank] for rank in asked]

    def _read(self, waiting: Sequence[int], deadline: float) -> dict[int, Any]:
        """Wait for something from these ranks; return the answers that are whole."""
        left = deadline - time.monotonic()
        ends = {self._answers[rank]: rank for rank in waiting}
        ready, _, _ = select.select(list(ends), [], [], max(0.0, left))
        if not ready:
            names = ", ".join(map(str, waiting))
            raise RuntimeError(
                f"rank {names} of {self.world_size} did not answer in time{self._last_words()}"
            )
        found: dict[int, Any] = {}
        failures: dict[int, str] = {}
        for end in ready:
            rank = ends[end]
            if (line := self._line(rank)) is None:
                continue
            if line == b"":
                raise RuntimeError(f"rank {rank} of {self.world_size} died{self._last_words()}")
            found[rank] = json.loads(line)
            if "error" in found[rank]:
                failures[rank] = found[rank]["error"]
        if failures:
            others = [rank for rank in waiting if rank not in found]
            self._blame_the_dead(others)
            first, reason = next(iter(failures.items()))
            raise RuntimeError(f"rank {first} of {self.world_size}: {reason}")
        return found

    def _line(self, rank: int) -> bytes | None:
        """Return a line, b"" where the rank is gone, None where the rest has yet to come."""
        got = os.read(self._answers[rank], 1 << 16)
        if not got:
            return b""
        self._unread[rank] += got
        line, newline, rest = self._unread[rank].partition(b"\n")
        if not newline:
            return None
        self._unread[rank] = rest
        return line

    def _blame_the_dead(self, others: Sequence[int]) -> None:
        """Raise if one of the others died: then that is why a rank failed."""
        until = time.monotonic() + BLAME_S
        ends = {self._answers[rank]: rank for rank in others}
        while ends and (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select(list(ends), [], [], left)
            for end in ready:
                rank = ends.pop(end)
                if self._line(rank) == b"":
                    raise RuntimeError(f"rank {rank} of {self.world_size} died{self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else " without a message"

    def kill(self) -> None:
        """End the ranks at once."""
        for process in self._processes:
            # The session's processes are the interpreter and the ranks that it forked.
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Close the pipes, at which the ranks end, and wait for them."""
        for end in (*self._jobs, *self._answers):
            os.close(end)
        self._jobs, self._answers = [], []
        for process in self._processes:
            try:
                process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._jobs:
            self.close()
