"""A measured process: takes jobs from `child.Child` and times what a loader or decoder delivers.

`python -m pixel_peers.serve MODULE NAME`. Only the standard library is needed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
Epoch = Callable[[], Iterator[tuple[Any, Any]]]


def answer_jobs(handle: Callable[[dict[str, Any]], Answer]) -> None:
    """Answer every line of standard input with one line, until it ends."""
    answers = os.fdopen(int(os.environ["ANSWERS_FD"]), "w")
    for line in sys.stdin:
        try:
            answer = handle(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def timed_round(epoch: Epoch, *, warm: int, tail: int, seconds: float) -> Answer:
    """Run whole epochs until the timed parts of them last `seconds`, and return what came.

    Timed is what lies between two deliveries in the middle of an epoch: from the first after
    `warm` samples to the last before `tail` samples are left. So neither the start of workers nor
    the end, where some of them have nothing left to do, counts. A whole epoch goes before: a
    process that has waited for its turn is cold, and its part of the page cache may be.

    Returns:
        samples and seconds (timed), epochs, and how often each label was delivered.
    """
    timed_samples, timed_s, epochs = 0, 0.0, 0
    labels: Counter[int] = Counter()
    output = ""
    for _ in epoch():
        pass
    while timed_s < seconds:
        arrivals: list[tuple[int, float]] = []  # samples so far, time
        samples = 0
        for images, numbers in epoch():
            samples += len(images)
            arrivals.append((samples, time.perf_counter()))
            labels.update(numbers.tolist())
            output = output or f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        inside = [item for item in arrivals if warm <= item[0] <= samples - tail]
        if len(inside) < 2:
            raise ValueError(f"an epoch of {samples} samples is too short to be timed")
        timed_samples += inside[-1][0] - inside[0][0]
        timed_s += inside[-1][1] - inside[0][1]
        epochs += 1
    return {
        "samples": timed_samples,
        "seconds": timed_s,
        "epochs": epochs,
        "output": output,
        "labels": sorted(labels.items()),
    }


def main() -> None:
    """Serve one loader."""
    module = importlib.import_module(f"pixel_peers.{sys.argv[1]}")
    name = sys.argv[2]
    epochs: list[Epoch] = []

    def handle(job: dict[str, Any]) -> Answer:
        if job["do"] == "prepare":
            module.prepare(Path(job["folder"]), Path(job["out"]))
            return {}
        if job["do"] == "open":
            epochs[:] = [module.open_loader(name, job)]
            return {"versions": module.versions()}
        assert job["do"] == "round"
        return timed_round(epochs[0], warm=job["warm"], tail=job["tail"], seconds=job["seconds"])

    answer_jobs(handle)
    # Some libraries' threads would keep the process alive.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
