"""A rank of scaling.py: answers jobs until its pipe closes. Started by pool.py alone."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from scale.step import Forms, Marks

GROUP_LIMIT = timedelta(seconds=120)


def join_group(rank: int, world_size: int, store: str) -> torch.device:
    """Make the process group, as a launcher's rank would, and return the rank's device."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=GROUP_LIMIT,
    )
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def sweep(sizes: Sequence[int], repeats: int, device: torch.device) -> dict[str, Any]:
    """Time all-reduces of each size, and the processor time they take on this rank."""
    seconds = []
    cpu_s, wall_s = 0.0, 0.0
    for size in sizes:
        values = torch.zeros(max(1, size // 4), device=device)
        dist.all_reduce(values)
        marks = Marks(device)
        cpu_before, wall_before = time.process_time(), time.perf_counter()
        points = [marks.now()]
        for _ in range(repeats):
            dist.all_reduce(values)
            points.append(marks.now())
        marks.wait()
        if size >= max(sizes) / 4:  # of small ones the clock of processor time is too coarse
            cpu_s += time.process_time() - cpu_before
            wall_s += time.perf_counter() - wall_before
        seconds.append([marks.between(a, b) for a, b in pairwise(points)])
    return {"seconds": seconds, "cpu_s": cpu_s, "wall_s": wall_s}


class Rank:
    """What a rank keeps between jobs."""

    def __init__(self, rank: int, world_size: int, store: str):
        self._device = join_group(rank, world_size, store)
        self._forms: Forms | None = None

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job."""
        kind = job.pop("job")
        if kind == "sweep":
            return sweep(job["sizes"], job["repeats"], self._device)
        if kind == "build":
            if self._forms is not None:
                self._forms.forget()
            self._forms = Forms(self._device, **job)
            return self._forms.facts()
        assert self._forms is not None, "build comes first"
        if kind == "steps":
            return self._forms.steps(job["form"], batch=job["batch"], steps=job["steps"])
        assert kind == "digest", kind
        return {form: self._forms.digest(form) for form in ("apart", "together", "traced")}


def read_jobs(pipe: int, jobs: queue.SimpleQueue[bytes]) -> None:
    """Pass lines on; end the process when the other side is gone, even amid a collective."""
    with os.fdopen(pipe, "rb") as lines:
        for line in lines:
            jobs.put(line)
    os._exit(0)


def serve(rank: int, world_size: int, pipes: Sequence[int], store: str) -> None:
    """Answer jobs for ever."""
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_jobs, args=(pipes[0], jobs), daemon=True).start()
    own: Rank | None = None
    while True:
        job = json.loads(jobs.get())
        try:
            own = own or Rank(rank, world_size, store)
            answer = own.answer(job)
        except Exception as error:
            words = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {words[0] if words else ''}"}
        line = json.dumps(answer).encode() + b"\n"
        while line:
            line = line[os.write(pipes[1], line) :]


def main() -> None:
    """Become the rank that was asked for, or fork those."""
    asked = json.loads(sys.argv[1])
    ranks, pipes = asked["ranks"], asked["pipes"]
    world_size = int(os.environ["WORLD_SIZE"])
    if len(ranks) == 1:
        serve(ranks[0], world_size, pipes, asked["store"])
    assert threading.active_count() == 1, "forked processes would lack the other threads"
    children = []
    for place, rank in enumerate(ranks):
        child = os.fork()
        own = pipes[2 * place : 2 * place + 2]
        if child == 0:
            for end in set(pipes) - set(own):
                os.close(end)  # else nobody would see that another rank has died
            serve(rank, world_size, own, asked["store"])
        children.append(child)
    for end in pipes:
        os.close(end)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)  # nothing to tidy up here, and torch's own takes a second


if __name__ == "__main__":
    main()
