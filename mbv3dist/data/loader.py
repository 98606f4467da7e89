"""Batches for training and evaluation: plan -> reader -> view -> decode -> batch buffer.

The walk of a sample is `_Drawing.draw`. Everything random in it is keyed by (seed, epoch, sample),
so the pixels never depend on the number of threads, the prefetch depth, the rank or the world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import numpy as np
import torch

from mbv3dist.config import ViewConfig
from mbv3dist.data import draws
from mbv3dist.data.batch import Batch
from mbv3dist.data.decode import Picture
from mbv3dist.data.draws import Draws
from mbv3dist.data.index import Split
from mbv3dist.data.pipeline import Buffer, Pipeline, Work
from mbv3dist.data.plan import Plan, StepPlan, evaluation_range
from mbv3dist.data.reader import Reader, Target, parse_target
from mbv3dist.data.views import canvas_boxes, draw_color, make_view

__all__ = ["Batch", "Loader", "eval_batches"]


class Loader:
    """Training batches of one rank: iterating yields (step, Batch) for the rest of the run.

    A batch is valid until the next one is asked for (see `Batch`). Leaving the loop in the middle
    stops the threads; so does `close`, and the end of a `with` block. Iterating again starts again
    at `start_step`.

    Attributes:
        wait_s: Seconds the consumer waited for the last batch.
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
        verify: str = "open",
    ):
        """Check the arguments; threads start with the iteration.

        Args:
            split: What to read.
            plan: In which order; its number of samples must be the split's.
            view: How pictures are placed on the canvas, and how colours vary.
            size: Side of the canvas in pixels.
            seed: Of views and colours.
            rank: This process.
            world_size: Processes; the plan's global batch size must divide by it.
            num_threads: Threads that decode.
            prefetch: Batches that are prepared ahead.
            start_step: First step to yield; the plan's `num_steps` yields none.
            pin_memory: Page-locked buffers, for copies to a GPU beside the host's work.
            verify: "open" or "always", as for `Reader`.

        Raises:
            ValueError: For arguments outside their limits.
        """
        _check_threads(num_threads, prefetch)
        draws.check_seed(seed)
        plan.check_world(world_size)
        assert 0 <= rank < world_size
        if plan.num_samples != len(split):
            raise ValueError(
                f"the plan is for {plan.num_samples} samples, split {split.name} has {len(split)}"
            )
        if not 0 <= start_step <= plan.num_steps:
            raise ValueError(f"start step {start_step} is outside the run's {plan.num_steps} steps")
        self.split = split
        self.plan = plan
        self.wait_s = 0.0
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
        with Reader(self.split, verify=self._verify) as reader:
            drawing = _Drawing(reader, view=self._view, seed=self._seed, drop_boxes=True)
            buffers = _make_buffers(
                self._prefetch + 1, batch_size, self._size, pin_memory=self._pin_memory
            )
            pipeline = self._pipeline = drawing.start(requests, buffers, self._num_threads)
            try:
                while (work := pipeline.take()) is not None:
                    self.wait_s = pipeline.wait_s
                    yield work.number, drawing.finish(work)
                    pipeline.give_back(work)
            finally:
                pipeline.close()

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
    verify: str = "open",
) -> Iterator[Batch]:
    """Yield the samples that this rank evaluates, each once, in pack order.

    The last batch may be shorter, and a rank may have none; all weights are 1. No box is dropped
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
        verify: "open" or "always", as for `Reader`.

    Raises:
        ValueError: For arguments outside their limits, or a damaged sample.
    """
    _check_threads(num_threads, prefetch)
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}; set --eval.batch_size")
    mine = evaluation_range(len(split), rank=rank, world_size=world_size)
    requests = (_eval_request(mine[at : at + batch_size]) for at in range(0, len(mine), batch_size))
    with Reader(split, verify=verify) as reader:
        drawing = _Drawing(reader, view=view, seed=0, drop_boxes=False)
        capacity = min(batch_size, max(len(mine), 1))
        buffers = _make_buffers(prefetch + 1, capacity, size, pin_memory=pin_memory)
        pipeline = drawing.start(enumerate(requests), buffers, num_threads)
        try:
            while (work := pipeline.take()) is not None:
                yield drawing.finish(work)
                pipeline.give_back(work)
        finally:
            pipeline.close()


class _Drawing:
    """Draws samples into the batches of a pipeline."""

    def __init__(self, reader: Reader, *, view: ViewConfig, seed: int, drop_boxes: bool):
        self.reader = reader
        self.split = reader.split
        self.view = view
        self.seed = seed
        self.drop_boxes = drop_boxes
        self._parts: dict[int, _Parts] = {}

    def start(
        self, requests: Iterator[tuple[int, StepPlan]], buffers: list[Buffer], num_threads: int
    ) -> Pipeline:
        return Pipeline(
            requests,
            prepare=self.prepare,
            draw=self.draw,
            buffers=buffers,
            num_threads=num_threads,
        )

    def prepare(self, work: Work) -> None:
        self._parts[work.number] = _Parts(len(work.request.index), work.buffer.image.numpy())

    def draw(self, work: Work, place: int) -> None:
        """Read, view and decode one sample into its place."""
        index, epoch = int(work.request.index[place]), int(work.request.epoch[place])
        parts = self._parts[work.number]
        data, target_data = self.reader.read(index)
        try:
            num_classes = len(self.split.classes)
            target = parse_target(target_data, self.split.task, num_classes=num_classes)
            picture = Picture(data)
            _check_size(target, picture)
        except ValueError as error:
            raise self.reader.damage(index, str(error)) from error
        # Outside of the try blocks: what make_view refuses is the recipe, not the sample.
        view, keep = make_view(
            self.view,
            width=picture.width,
            height=picture.height,
            size=parts.canvas.shape[1],
            boxes=target.boxes,
            draws=Draws(self.seed, epoch=epoch, sample=index),
        )
        try:
            picture.draw(view, parts.canvas[place], fill=self.view.fill)
        except ValueError as error:
            raise self.reader.damage(index, str(error)) from error
        parts.size[place] = picture.height, picture.width
        parts.view[place] = view.vector()
        colors = Draws(self.seed, epoch=epoch, sample=index, purpose=draws.COLOR)
        parts.color[place] = draw_color(self.view, colors)
        parts.label[place] = target.label
        if not self.drop_boxes:
            boxes = view.to_canvas(target.boxes)
            parts.objects[place] = (boxes, target.labels, target.difficult)
        elif len(target.boxes):
            boxes = canvas_boxes(view, target.boxes[keep], size=parts.canvas.shape[1])
            parts.objects[place] = (boxes, target.labels[keep], target.difficult[keep])

    def finish(self, work: Work) -> Batch:
        """Return the batch of a work whose places are all drawn."""
        parts = self._parts.pop(work.number)
        request, count = work.request, len(work.request.index)
        batch = Batch(
            image=work.buffer.image[:count].permute(0, 3, 1, 2),
            index=torch.from_numpy(request.index),
            epoch=torch.from_numpy(request.epoch),
            weight=torch.from_numpy(request.weight),
            size=torch.from_numpy(parts.size),
            view=torch.from_numpy(parts.view),
            color=torch.from_numpy(parts.color),
            fences=work.buffer.fences,
        )
        if self.split.task == "classification":
            batch.label = torch.from_numpy(parts.label)
        else:
            boxes, labels, difficult = _pad_objects(parts.objects)
            batch.boxes = torch.from_numpy(boxes)
            batch.labels = torch.from_numpy(labels)
            batch.difficult = torch.from_numpy(difficult)
        return batch


class _Parts:
    """What the threads write, each at its samples' places."""

    def __init__(self, count: int, canvas: np.ndarray):
        self.canvas = canvas  # uint8 [capacity, H, W, 3]
        self.size = np.zeros((count, 2), dtype=np.int32)
        self.view = np.zeros((count, 8), dtype=np.float32)
        self.color = np.zeros((count, 4), dtype=np.float32)
        self.label = np.zeros(count, dtype=np.int64)
        self.objects: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = [None] * count


def _pad_objects(
    objects: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad to the fullest picture: boxes [B, M, 4] with 0, labels [B, M] with -1, difficult."""
    most = max(1, *(len(item[0]) for item in objects if item is not None), 1)
    boxes = np.zeros((len(objects), most, 4), dtype=np.float32)
    labels = np.full((len(objects), most), -1, dtype=np.int64)
    difficult = np.zeros((len(objects), most), dtype=bool)
    for place, item in enumerate(objects):
        if item is not None:
            count = len(item[0])
            boxes[place, :count], labels[place, :count], difficult[place, :count] = item
    return boxes, labels, difficult


def _check_size(target: Target, picture: Picture) -> None:
    """Refuse boxes that were made for a picture of another size."""
    if target.width and (target.width, target.height) != (picture.width, picture.height):
        raise ValueError(
            f"the picture has {picture.width} x {picture.height} pixels, its .json member says "
            f"{target.width} x {target.height}"
        )


def _eval_request(indices: range) -> StepPlan:
    index = np.arange(indices.start, indices.stop, dtype=np.int64)
    return StepPlan(
        index=index, epoch=np.zeros_like(index), weight=np.ones(len(index), dtype=np.float32)
    )


def _make_buffers(number: int, capacity: int, size: int, *, pin_memory: bool) -> list[Buffer]:
    """Allocate the ring: one batch at the consumer's, the others being filled."""
    if size < 1:
        raise ValueError(f"the canvas must have at least 1 pixel, got {size}")
    shape = (capacity, size, size, 3)
    return [
        Buffer(torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)) for _ in range(number)
    ]


def _check_threads(num_threads: int, prefetch: int) -> None:
    for name, value in (("num_threads", num_threads), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}; set --data.{name}")
