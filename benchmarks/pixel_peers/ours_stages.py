"""Our Loader from inside: its rate, what decoding alone would give, and the time of each stage.

The library has no hooks for this: functions are wrapped from here, by their names.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbv3dist.data import drawing, jpeg, pixels, view_kernels
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader
from mbv3dist.data.plan import Plan
from mbv3dist.data.reader import Reader
from mbv3dist.data.resize import draw_region
from pixel_peers import ours_peer
from pixel_peers.ours_decoder import draw_views
from pixel_peers.serve import answer_jobs

SIZE = 224
# Functions by the stage that their time is counted for, without what they call of the others.
WATCHED = (
    (Reader, "read_chunk", "read"),
    (drawing, "parse_targets", "parse"),
    (pixels.Pictures, "__init__", "parse"),
    (view_kernels.ViewMaker, "make", "views"),
    (pixels.Pictures, "draw", "resize"),
    (drawing.Drawing, "_put_targets", "collate"),
    (drawing.Drawing, "prepare", "batch"),
    (drawing.Drawing, "finish", "batch"),
)
BESIDE = ("batch",)  # by the planner's and the consumer's thread, while others decode


class Clock:
    """Seconds spent in each stage, by all threads together."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: defaultdict[str, float] = defaultdict(float)
        self._thread = threading.local()

    def start(self) -> None:
        """Forget what was counted; threads go on counting."""
        self._running = defaultdict(float)

    def stop(self, took: float) -> None:
        """Keep what was counted since the start, with the time that took as "all"."""
        self.seconds = {**self._running, "all": took}

    def time(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and is timed."""

        def timed(*args: Any, **options: Any) -> Any:
            outer: list[float] = getattr(self._thread, "inside", [])
            inside = self._thread.inside = [0.0]  # what timed functions called from here take
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - started
                self._running[stage] += took - inside[0]
                self._thread.inside = outer
                if outer:
                    outer[0] += took

        return timed

    def watch(self) -> None:
        """Wrap what `WATCHED` names, and draw JPEGs one by one to tell decoding from resizing.

        Raises:
            AttributeError: The library has no such function any more.
        """
        for owner, name, stage in WATCHED:
            setattr(owner, name, self.time(stage, getattr(owner, name)))
        vars_of_module: Any = pixels
        vars_of_module._draw_jpegs = draw_one_by_one(self)


def draw_one_by_one(clock: Clock) -> Callable[..., int]:
    """Return what `pixels._draw_jpegs` does, picture by picture, with a clock at its two halves."""
    compiled: Any = pixels._draw_jpegs
    code = compiled.py_func.__code__
    names = code.co_varnames[: code.co_argcount]
    decode = clock.time("decode", jpeg.decode_region)
    resize = clock.time("resize", draw_region)

    def draw(*args: Any) -> int:
        a = dict(zip(names, args, strict=True))
        refused = 0
        for n in np.flatnonzero(a["plain"]):
            x0, y0, x1, y1 = a["regions"][n]
            stream = a["addresses"][n], a["lengths"][n]
            if not decode(a["words"], a["view"], a["info"], *stream, x0, y0, x1, y1):
                a["plain"][n] = False
                refused += 1
                continue
            width, height = int(x1 - x0), int(y1 - y0)
            region = a["pixels"][: 3 * width * height].reshape(height, 3 * width)
            picture = int(a["sizes"][n, 0]), int(a["sizes"][n, 1])
            view = a["src"][n], a["dst"][n], a["flips"][n]
            canvas = a["canvases"][a["places"][n]]
            resize(region, (int(x0), int(y0)), picture, *view, a["fill"], canvas)
        return refused

    return draw


class Bench:
    """An open split with a plan of three epochs, of which the second is measured.

    So the same samples with the same views are read in every round, and no checksums are compared,
    as in all epochs of a run but the first.
    """

    def __init__(self, place: Path, *, batch: int, edge: int):
        self.split = open_split(place / "ours", "train")
        self.plan = Plan(self.split.shard_sizes, global_batch_size=batch, epochs=3, seed=0)
        self.batch = batch
        self.steps = len(self.split) // batch
        assert len(self.split) % batch == 0
        self.timed = range(edge, self.steps - edge)
        self._data: list[bytes] = []
        self._views = np.empty((0, 8))

    def loader(self, threads: int) -> Loader:
        """Return a Loader that starts with the second epoch."""
        return Loader(
            self.split,
            self.plan,
            view=ours_peer.CROP,
            size=SIZE,
            seed=0,
            num_threads=threads,
            start_step=self.steps,
            verify="open",
        )

    def run(self, threads: int, clock: Clock | None = None) -> float:
        """Return the seconds that the timed batches took to come."""
        started = took = 0.0
        with self.loader(threads) as loader:
            for step, _ in loader:
                number = step - self.steps
                if number == self.timed.start - 1:
                    if clock is not None:
                        clock.start()
                    started = time.perf_counter()
                elif number == self.timed.stop - 1:
                    took = time.perf_counter() - started
                    if clock is not None:
                        clock.stop(took)
                    return took
        raise AssertionError("the plan ended before the timed steps did")

    def limit(self, threads: int) -> float:
        """Return the seconds that decoding the timed samples' views takes by itself."""
        if not self._data:
            self._collect()
        chunk = max(1, self.batch // (4 * threads))  # as the Loader's
        numbers = itertools.count(0, chunk)
        src, dst = self._views[:, :4].copy(), self._views[:, 4:].astype(np.int32)
        flips = dst[:, 0] > dst[:, 2]
        dst[flips] = dst[flips][:, (2, 1, 0, 3)]
        out = np.zeros((threads, chunk, SIZE, SIZE, 3), np.uint8)
        errors: list[BaseException] = []

        def work(slots: np.ndarray) -> None:
            try:
                while (start := next(numbers)) < len(self._data):
                    part = slice(start, start + chunk)
                    data = self._data[part]
                    draw_views(data, src[part], dst[part], flips[part], slots[: len(data)])
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(slots,)) for slots in out]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took = time.perf_counter() - started
        if errors:
            raise errors[0]
        return took

    def _collect(self) -> None:
        """Read the files of the timed samples, and note the views that the Loader drew of them."""
        indices: list[int] = []
        views = []
        with self.loader(1) as loader:
            for step, batch in loader:
                if step - self.steps in self.timed:
                    indices += batch.index.tolist()
                    views.append(batch.view.numpy().astype(np.float64))
                if step - self.steps == self.timed.stop - 1:
                    break
        self._views = np.concatenate(views)
        with Reader(self.split, verify="open") as reader:
            self._data = [bytes(reader.read(index)[0]) for index in indices]

    @property
    def samples(self) -> int:
        """How many samples are timed."""
        return len(self.timed) * self.batch


def stage_times(bench: Bench, clock: Clock) -> dict[str, float]:
    """Return the stages of one Loader thread in us a picture; hand-over is what is left."""
    bench.run(1, clock)
    us = {name: 1e6 * took / bench.samples for name, took in clock.seconds.items()}
    total = us.pop("all")
    beside = {name: us.pop(name) for name in BESIDE}
    return {**us, "hand-over": total - sum(us.values()), **beside}


def main() -> None:
    """Serve `decode.py`."""
    torch.set_num_threads(1)
    state: dict[str, Any] = {}

    def handle(job: dict[str, Any]) -> dict[str, Any]:
        if job["do"] == "prepare":
            ours_peer.prepare(Path(job["folder"]), Path(job["out"]))
            return {}
        if job["do"] == "open":
            bench = Bench(Path(job["place"]), batch=job["batch"], edge=job["edge"])
            state["bench"] = bench
            return {"versions": ours_peer.versions()}
        bench = state["bench"]
        if job["do"] == "stages":
            if "clock" not in state:  # from here on everything is watched
                state["clock"] = Clock()
                state["clock"].watch()
            return {"us": stage_times(bench, state["clock"])}
        run = {"loader": bench.run, "limit": bench.limit}[job["do"]]
        return {"images_per_s": bench.samples / run(job["threads"])}

    answer_jobs(handle)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
