"""Batches for training and evaluation: plan -> reader -> view -> decode -> batch buffer.

`drawing.py` has the walk of a sample, `pipeline.py` the threads, `store.py` where shards come from.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch

from mbv3dist.config import ViewConfig
from mbv3dist.data import draws
from mbv3dist.data.batch import Batch
from mbv3dist.data.decode_choice import Decode
from mbv3dist.data.division import evaluation_range
from mbv3dist.data.drawing import Drawing, ErrorBudget
from mbv3dist.data.index import Split
from mbv3dist.data.needs import next_use, range_needs, rank_needs
from mbv3dist.data.packed import MAX_CANVASES
from mbv3dist.data.pipeline import Buffer, Pipeline
from mbv3dist.data.plan import Plan, StepPlan
from mbv3dist.data.reader import Reader
from mbv3dist.data.state import data_state
from mbv3dist.data.store import CacheOptions, open_store

__all__ = ["Batch", "CacheOptions", "Loader", "eval_batches"]


class Loader:
    """Training batches of one rank: iterating yields (step, Batch) for the rest of the run.

    A batch is valid until the next one is asked for (see `Batch`). Leaving the loop in the middle
    stops the threads; so does `close`, and the end of a `with` block. Iterating again starts again
    at `start_step`.

    Attributes:
        wait_s: Seconds the consumer waited for the last batch.
        budget: The damaged samples met so far (`budget.damaged`), and how many there may be.
    """

    def __init__(
        self,
        split: Split,
        plan: Plan,
        *,
        view: ViewConfig,
        size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_threads: int = 2,
        prefetch: int = 3,
        start_step: int = 0,
        pin_memory: bool = False,
        verify: str = "first",
        error_budget: int = 0,
        cache: CacheOptions | None = None,
        decode: Decode = "cpu",
    ):
        """Check the arguments; threads start with the iteration.

        Args:
            split: What to read.
            plan: In which order; its shards must be the split's.
            view: How pictures are placed on the canvas, and how colours vary.
            size: Side of the canvas in pixels.
            seed: Of views and colours.
            rank: This process.
            world_size: Processes; the plan's global batch size must divide by it.
            num_threads: Threads that decode.
            prefetch: Batches that are prepared ahead.
            start_step: First step to yield (see `state.resume_step`); the plan's `num_steps`
                yields none.
            pin_memory: Page-locked buffers, for copies to a GPU beside the host's work.
            verify: "open", "first" or "always", as for `Reader`; the first epoch of an
                iteration counts as the first time.
            error_budget: Different damaged samples that may go with weight 0; 0 stops at the
                first.
            cache: How shards of remote data sets are kept.
            decode: "cpu" yields pictures; "hybrid" and "gpu" yield batches whose pictures the
                device makes (`Batch.crops`, `Batch.compressed`; training/to_device.py).

        Raises:
            ValueError: For arguments outside their limits.
        """
        _check_threads(num_threads, prefetch)
        draws.check_seed(seed)
        plan.check_world(world_size)
        assert 0 <= rank < world_size
        if not np.array_equal(plan.shard_sizes, split.shard_sizes):
            raise ValueError(
                f"the plan is for {int(plan.shard_sizes.sum())} samples in "
                f"{len(plan.shard_sizes)} shards, split {split.name} has {len(split)} in "
                f"{len(split.shards)}; make the plan from split.shard_sizes"
            )
        if not 0 <= start_step <= plan.num_steps:
            raise ValueError(f"start step {start_step} is outside the run's {plan.num_steps} steps")
        self.split = split
        self.plan = plan
        self.wait_s = 0.0
        self.budget = ErrorBudget(error_budget)
        self._cache = cache or CacheOptions()
        self._decode: Decode = decode
        self._next_step = start_step
        self._view = view
        self._size = size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._start_step = start_step
        self._pin_memory = pin_memory
        self._verify = verify
        self._pipeline: Pipeline | None = None

    def __len__(self) -> int:
        """Return the number of steps that an iteration yields."""
        return self.plan.num_steps - self._start_step

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        self.close()
        requests = (
            (step, self.plan.step(step, rank=self._rank, world_size=self._world_size))
            for step in range(self._start_step, self.plan.num_steps)
        )
        batch_size = self.plan.global_batch_size // self._world_size
        self._next_step = self._start_step
        with self._open_reader() as reader:
            drawing = Drawing(
                reader,
                view=self._view,
                size=self._size,
                seed=self._seed,
                drop_boxes=True,
                first_epoch=self.plan.epoch_of(self._start_step * self.plan.global_batch_size),
                budget=self.budget,
                decode=self._decode,
            )
            buffers = _make_buffers(
                self._prefetch + 1,
                batch_size,
                self._size,
                pin_memory=self._pin_memory,
                decode=self._decode,
            )
            pipeline = self._pipeline = drawing.start(requests, buffers, self._num_threads)
            try:
                while (work := pipeline.take()) is not None:
                    self.wait_s = pipeline.wait_s
                    self._next_step = work.number + 1
                    yield work.number, drawing.finish(work)
                    pipeline.give_back(work)
                    reader.advance(self._next_step)
            finally:
                pipeline.close()

    def state(self) -> dict[str, Any]:
        """Return what to go on from after the last batch yielded, ready for JSON.

        It is free of rank and world size. `state.resume_step` makes the `start_step` of it.
        """
        return data_state(self.split, self.plan, self._next_step, decode=self._decode)

    def _open_reader(self) -> Reader:
        options, plan = self._cache, self.plan.clone()
        node = self._rank // options.local_world_size * options.local_world_size
        ranks = range(node, min(node + options.local_world_size, self._world_size))
        lock = threading.Lock()  # a plan is for one thread at a time

        def find_next_use(shard: int) -> int | None:
            step = max(self._next_step - 1, self._start_step)  # another rank may be a step behind
            with lock:
                return next_use(plan, shard, step, ranks=ranks, world_size=self._world_size)

        store = open_store(
            self.split,
            options,
            needs=lambda: rank_needs(
                self.plan, self._start_step, rank=self._rank, world_size=self._world_size
            ),
            next_use=find_next_use,
            start=self._start_step,
            ahead=self._prefetch + 1,
            same_needs=max(1, plan.lane_size * self._world_size // plan.global_batch_size),
        )
        return Reader(self.split, verify=self._verify, store=store)

    def close(self) -> None:
        """Stop the threads of an iteration that is under way."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def eval_batches(
    split: Split,
    *,
    view: ViewConfig,
    size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_threads: int = 2,
    prefetch: int = 3,
    pin_memory: bool = False,
    verify: str = "first",
    cache: CacheOptions | None = None,
    decode: Decode = "cpu",
) -> Iterator[Batch]:
    """Yield the samples that this rank evaluates, each once, in pack order.

    Batches are the same for any world size; the split's last one may be shorter, and a rank may
    have none; all weights are 1. No box is dropped
    or clipped, so that mapped back they are the whole truth. A batch is valid until the next one.

    Args:
        split: What to read.
        view: "resize" or "center_crop" as a rule; another one is drawn with seed 0 and epoch 0.
        size: Side of the canvas in pixels.
        batch_size: Samples in a batch of this rank.
        rank: This process.
        world_size: Processes; together they read every sample exactly once.
        num_threads: Threads that decode.
        prefetch: Batches that are prepared ahead.
        pin_memory: Page-locked buffers.
        verify: "open", "first" or "always", as for `Reader`.
        cache: How shards of remote data sets are kept.
        decode: "cpu" yields pictures, "gpu" the files' bytes (`Batch.compressed`) for models that
            want them prepared in another way.

    Raises:
        ValueError: For arguments outside their limits, or a damaged sample: an evaluation leaves
            nothing out.
    """
    _check_threads(num_threads, prefetch)
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}; set --eval.batch_size")
    mine = evaluation_range(len(split), rank=rank, world_size=world_size, batch_size=batch_size)
    requests = (_eval_request(mine[at : at + batch_size]) for at in range(0, len(mine), batch_size))
    store = open_store(
        split,
        cache or CacheOptions(),
        needs=lambda: range_needs(split.starts, mine, batch_size),
        next_use=lambda shard: None,
        ahead=prefetch + 1,
    )
    with Reader(split, verify=verify, store=store) as reader:
        drawing = Drawing(reader, view=view, size=size, seed=0, drop_boxes=False, decode=decode)
        capacity = min(batch_size, max(len(mine), 1))
        buffers = _make_buffers(prefetch + 1, capacity, size, pin_memory=pin_memory, decode=decode)
        pipeline = drawing.start(enumerate(requests), buffers, num_threads)
        try:
            while (work := pipeline.take()) is not None:
                yield drawing.finish(work)
                pipeline.give_back(work)
                reader.advance(work.number + 1)
        finally:
            pipeline.close()


def _eval_request(indices: range) -> StepPlan:
    index = np.arange(indices.start, indices.stop, dtype=np.int64)
    zeros = np.zeros_like(index)
    weight = np.ones(len(index), dtype=np.float32)
    return StepPlan(index=index, epoch=zeros, weight=weight, copy=zeros)


def _make_buffers(
    number: int, capacity: int, size: int, *, pin_memory: bool, decode: Decode = "cpu"
) -> list[Buffer]:
    """Allocate the ring: one batch at the consumer's, the others being filled."""
    if size < 1:
        raise ValueError(f"the canvas must have at least 1 pixel, got {size}")
    shapes = {
        "cpu": (capacity, size, size, 3),
        "hybrid": (capacity * MAX_CANVASES * size * size * 3,),
        "gpu": (0,),
    }
    return [
        Buffer(torch.empty(shapes[decode], dtype=torch.uint8, pin_memory=pin_memory))
        for _ in range(number)
    ]


def _check_threads(num_threads: int, prefetch: int) -> None:
    for name, value in (("num_threads", num_threads), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; set --data.{name}")
