"""How samples become places of a batch: read, view, decode, in any thread and order.

`Drawing._draw` is the walk of a sample. Everything random in it is keyed by (seed, epoch, sample):
pixels never depend on the number of threads, the prefetch depth, the rank or the world size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from mbv3dist.config import ViewConfig
from mbv3dist.data import draws
from mbv3dist.data.batch import Batch
from mbv3dist.data.decode import Picture
from mbv3dist.data.draws import Draws
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.passes import COPY_SHIFT
from mbv3dist.data.pipeline import Buffer, Pipeline, Work
from mbv3dist.data.plan import StepPlan
from mbv3dist.data.reader import Reader
from mbv3dist.data.target import Target, parse_target
from mbv3dist.data.views import canvas_boxes, draw_color, make_view


class ErrorBudget:
    """The damaged samples that a run goes without, at most `limit` different ones."""

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.damaged: dict[int, str] = {}  # what is wrong, by pack index
        self._lock = threading.Lock()

    def add(self, index: int, error: DamagedShardError) -> None:
        """Note a damaged sample.

        Raises:
            DamagedShardError: when there is no budget, or it is used up.
        """
        if self.limit == 0:
            raise error
        with self._lock:
            self.damaged[index] = str(error)
            damaged = dict(self.damaged)
        self.check(damaged)

    def merge(self, damaged: dict[int, str]) -> None:
        """Add what other ranks met, without checking."""
        with self._lock:
            self.damaged.update(damaged)

    def check(self, damaged: dict[int, str]) -> None:
        """Raise DamagedShardError if these samples are too many."""
        if len(damaged) > self.limit:
            raise DamagedShardError(
                f"{len(damaged)} samples are damaged and --data.error_budget allows {self.limit}; "
                f"the last one: {next(reversed(damaged.values()))}"
            )


class Drawing:
    """Draws samples into the batches of a pipeline."""

    def __init__(
        self,
        reader: Reader,
        *,
        view: ViewConfig,
        seed: int,
        drop_boxes: bool,
        first_epoch: int = 0,
        budget: ErrorBudget | None = None,
    ):
        """Say how samples are drawn.

        Args:
            reader: Where bytes come from.
            view: How pictures are placed.
            seed: Of views and colours.
            drop_boxes: Whether boxes that leave the canvas are dropped (training).
            first_epoch: The epoch in which samples are read for the first time.
            budget: What may be damaged; default: nothing.
        """
        self.reader = reader
        self.split = reader.split
        self.view = view
        self.seed = seed
        self.drop_boxes = drop_boxes
        self.first_epoch = first_epoch
        self.budget = budget or ErrorBudget()
        self._parts: dict[int, _Parts] = {}

    def start(
        self, requests: Iterator[tuple[int, StepPlan]], buffers: list[Buffer], num_threads: int
    ) -> Pipeline:
        """Start the threads."""
        return Pipeline(
            requests,
            prepare=self.prepare,
            draw=self.draw,
            buffers=buffers,
            num_threads=num_threads,
        )

    def prepare(self, work: Work) -> None:
        """Make room for what the threads find out."""
        self._parts[work.number] = _Parts(work.request, work.buffer.image.numpy())

    def draw(self, work: Work, place: int) -> None:
        """Draw one sample into its place; a damaged one, if the budget allows, as nothing."""
        index = int(work.request.index[place])
        parts = self._parts[work.number]
        try:
            self._draw(work, place, index, parts)
        except DamagedShardError as error:
            self.budget.add(index, error)
            parts.canvas[place] = self.view.fill
            parts.weight[place] = 0
            parts.label[place] = 0
            parts.objects[place] = None

    def _draw(self, work: Work, place: int, index: int, parts: _Parts) -> None:
        """Read, view and decode one sample into its place."""
        epoch = int(work.request.epoch[place])
        data, target_data = self.reader.read(index, first=epoch == self.first_epoch)
        try:
            num_classes = len(self.split.classes)
            target = parse_target(target_data, self.split.task, num_classes=num_classes)
            picture = Picture(data)
            _check_size(target, picture)
        except ValueError as error:
            raise self.reader.damage(index, str(error)) from error
        # A sample that comes twice in an epoch is drawn in two ways.
        drawn = index + (int(work.request.copy[place]) << COPY_SHIFT)
        # Outside of the try blocks: what make_view refuses is the recipe, not the sample.
        view, keep = make_view(
            self.view,
            width=picture.width,
            height=picture.height,
            size=parts.canvas.shape[1],
            boxes=target.boxes,
            draws=Draws(self.seed, epoch=epoch, sample=drawn),
        )
        try:
            picture.draw(view, parts.canvas[place], fill=self.view.fill)
        except ValueError as error:
            raise self.reader.damage(index, str(error)) from error
        parts.size[place] = picture.height, picture.width
        parts.view[place] = view.vector()
        colors = Draws(self.seed, epoch=epoch, sample=drawn, purpose=draws.COLOR)
        parts.color[place] = draw_color(self.view, colors)
        parts.label[place] = target.label
        if not self.drop_boxes:
            boxes = view.to_canvas(target.boxes)
            parts.objects[place] = (boxes, target.labels, target.difficult)
            parts.targets[place] = target
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
            weight=torch.from_numpy(parts.weight),
            size=torch.from_numpy(parts.size),
            view=torch.from_numpy(parts.view),
            color=torch.from_numpy(parts.color),
            targets=[parts.targets[place] for place in sorted(parts.targets)],
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

    def __init__(self, request: StepPlan, canvas: np.ndarray):
        count = len(request.index)
        self.canvas = canvas  # uint8 [capacity, H, W, 3]
        self.size = np.zeros((count, 2), dtype=np.int32)
        self.view = np.zeros((count, 8), dtype=np.float32)
        self.color = np.zeros((count, 4), dtype=np.float32)
        self.label = np.zeros(count, dtype=np.int64)
        self.weight = request.weight.copy()
        self.objects: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = [None] * count
        self.targets: dict[int, Target] = {}


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
