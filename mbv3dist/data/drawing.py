"""How samples become places of a batch: read, view, decode, in any thread and order.

`Drawing.draw` is the walk of a chunk of samples. Python touches each sample only to read it;
targets, headers, views and pixels are one compiled call a chunk each, without the GIL, so
that many threads decode while one trains. Everything random is keyed by (seed, epoch, sample):
pixels never depend on the number of threads, the prefetch depth, the rank or the world size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch

from mbv3dist.config import ViewConfig
from mbv3dist.data.batch import Batch
from mbv3dist.data.decode_choice import Decode
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.packed import Compressed, PackedCrops, Packing, move_to_region
from mbv3dist.data.passes import COPY_SHIFT
from mbv3dist.data.pipeline import Buffer, Pipeline, Work
from mbv3dist.data.pixels import Pictures, decode_region
from mbv3dist.data.plan import StepPlan
from mbv3dist.data.reader import Reader
from mbv3dist.data.target import Target
from mbv3dist.data.targets import Targets, parse_targets, size_errors
from mbv3dist.data.view_kernels import ViewMaker, Views


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
        size: int,
        seed: int,
        drop_boxes: bool,
        first_epoch: int = 0,
        budget: ErrorBudget | None = None,
        decode: Decode = "cpu",
    ):
        """Say how samples are drawn.

        Args:
            reader: Where bytes come from.
            view: How pictures are placed.
            size: Side of the canvas in pixels.
            seed: Of views and colours.
            drop_boxes: Whether boxes that leave the canvas are dropped (training).
            first_epoch: The epoch in which samples are read for the first time.
            budget: What may be damaged; default: nothing.
            decode: What is drawn here: all ("cpu"), crops ("hybrid") or nothing ("gpu").
        """
        self.reader = reader
        self.split = reader.split
        self.view = view
        self.size = size
        self.drop_boxes = drop_boxes
        self.first_epoch = first_epoch
        self.budget = budget or ErrorBudget()
        self.decode = decode
        self.num_classes = len(self.split.classes)
        self._maker = ViewMaker(view, size=size, seed=seed)
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
        pixels = work.buffer.image.numpy()
        self._parts[work.number] = _Parts(work.request, pixels, is_packed=self.decode != "cpu")

    def draw(self, work: Work, places: range) -> dict[int, BaseException]:
        """Draw samples into their places; a damaged one, if the budget allows, as nothing.

        Returns:
            What went wrong, by place.
        """
        parts = self._parts[work.number]
        request = work.request
        indices = request.index[places.start : places.stop].tolist()
        first = (request.epoch[places.start : places.stop] == self.first_epoch).tolist()
        members, problems = self.reader.read_chunk(indices, first)
        targets, wrong = parse_targets(members, self.split.task, num_classes=self.num_classes)
        pictures = Pictures(members.pictures, members.addresses[:, 0])
        wrong |= pictures.errors
        if self.split.task == "detection":
            wrong |= size_errors(targets, pictures.sizes, wrong)
        problems |= {members.places[n]: error for n, error in wrong.items()}
        if wrong:  # again, without those
            good = [n for n in range(len(members.places)) if n not in wrong]
            members = members.select(good)
            targets, _ = parse_targets(members, self.split.task, num_classes=self.num_classes)
            pictures = Pictures(members.pictures, members.addresses[:, 0])
        if members.places:
            at = np.array(members.places) + places.start
            # What the maker of views refuses is the recipe, not a sample.
            views = self._make_views(request, at, pictures.sizes, targets)
            self._draw_pixels(pictures, views, at, parts)
            problems |= {members.places[n]: error for n, error in pictures.errors.items()}
            parts.size[at] = pictures.sizes[:, ::-1]
            parts.view[at] = views.vectors()
            parts.color[at] = views.color
            self._put_targets(at, targets, views, parts)
        return self._settle(places, indices, problems, parts)

    def _settle(
        self,
        places: range,
        indices: list[int],
        problems: dict[int, BaseException],
        parts: _Parts,
    ) -> dict[int, BaseException]:
        """Blank what is damaged, as far as the budget goes; return what cannot go on, by place."""
        errors: dict[int, BaseException] = {}
        for n, error in problems.items():
            place = places.start + n
            parts.blank(place, self.view.fill)
            if not isinstance(error, ValueError):  # a disk, a server, a fault
                errors[place] = error
                continue
            if not isinstance(error, DamagedShardError):
                reason, error = error, self.reader.damage(indices[n], str(error))
                error.__cause__ = reason
            try:
                self.budget.add(indices[n], error)
            except DamagedShardError as refused:
                errors[place] = refused
        return errors

    def _draw_pixels(self, pictures: Pictures, views: Views, at: np.ndarray, parts: _Parts) -> None:
        """Draw the views; or, where the device finishes them, put down what it needs."""
        if self.decode == "cpu":
            assert parts.canvas is not None
            pictures.draw(
                views.src,
                views.dst,
                views.flip,
                canvases=parts.canvas,
                places=at,
                fill=self.view.fill,
            )
        elif self.decode == "hybrid":
            pictures.pack(
                views, packing=parts.packing, places=at, size=self.size, fill=self.view.fill
            )
        else:
            regions = pictures.regions(views.src, views.dst)
            parts.packing.places[at] = move_to_region(views.vectors(), views.src, regions)
            parts.regions[at], parts.is_jpeg[at] = regions, pictures.is_plain
            for n, place in enumerate(at.tolist()):
                parts.data[place] = pictures.data[n]

    def _make_views(
        self, request: StepPlan, at: np.ndarray, sizes: np.ndarray, targets: Targets
    ) -> Views:
        # A sample that comes twice in an epoch is drawn in two ways.
        drawn = request.index[at] + (request.copy[at] << COPY_SHIFT)
        return self._maker.make(request.epoch[at], drawn, sizes, targets.boxes, targets.starts)

    def _put_targets(self, at: np.ndarray, targets: Targets, views: Views, parts: _Parts) -> None:
        """Write what is known about each picture, with its boxes on the canvas."""
        parts.label[at] = targets.classes
        if self.split.task == "classification" and self.drop_boxes:
            return
        if self.drop_boxes:
            np.clip(views.boxes, 0.0, float(self.size), out=views.boxes)
        bounds = targets.starts.tolist()
        for n, (place, first, last) in enumerate(
            zip(at.tolist(), bounds[:-1], bounds[1:], strict=True)
        ):
            own = slice(first, last)
            labels, difficult = targets.labels[own], targets.difficult[own]
            if not self.drop_boxes:
                parts.objects[place] = (views.boxes[own], labels, difficult)
                parts.targets[place] = targets.one(n)
            elif last > first:
                keep = views.keep[own]
                parts.objects[place] = (views.boxes[own][keep], labels[keep], difficult[keep])

    def finish(self, work: Work) -> Batch:
        """Return the batch of a work whose places are all drawn."""
        parts = self._parts.pop(work.number)
        request, count = work.request, len(work.request.index)
        if self.decode == "cpu":
            image = work.buffer.image[:count].permute(0, 3, 1, 2)
        else:
            image = torch.empty((count, 3, 0, 0), dtype=torch.uint8)
        batch = Batch(
            image=image,
            index=torch.from_numpy(request.index),
            epoch=torch.from_numpy(request.epoch),
            weight=torch.from_numpy(parts.weight),
            size=torch.from_numpy(parts.size),
            view=torch.from_numpy(parts.view),
            color=torch.from_numpy(parts.color),
            targets=[parts.targets[place] for place in sorted(parts.targets)],
            fences=work.buffer.fences,
        )
        if self.decode == "hybrid":
            batch.crops = self._crops(parts, work.buffer.image)
        elif self.decode == "gpu":
            batch.compressed = self._compressed(parts, batch)
        if self.split.task == "classification":
            batch.label = torch.from_numpy(parts.label)
        else:
            boxes, labels, difficult = _pad_objects(parts.objects)
            batch.boxes = torch.from_numpy(boxes)
            batch.labels = torch.from_numpy(labels)
            batch.difficult = torch.from_numpy(difficult)
        return batch

    def _crops(self, parts: _Parts, pixels: torch.Tensor) -> PackedCrops:
        """Return what the device needs to resize the pictures."""
        return PackedCrops(
            pixels=pixels[: parts.packing.used],
            layout=torch.from_numpy(parts.packing.layout),
            places=torch.from_numpy(parts.packing.places),
            size=(self.size, self.size),
            fill=self.view.fill,
        )

    def _compressed(self, parts: _Parts, batch: Batch) -> Compressed:
        """Return what the device needs to decode the pictures; damage lowers the batch's weight."""

        def report(place: int, error: ValueError) -> None:
            index = int(batch.index[place])
            self.budget.add(index, self.reader.damage(index, str(error)))
            batch.weight[place] = 0
            parts.packing.places[place] = 0

        return Compressed(
            data=parts.data,
            sizes=np.ascontiguousarray(parts.size[:, ::-1]),
            regions=parts.regions,
            is_jpeg=parts.is_jpeg,
            places=parts.packing.places,
            size=(self.size, self.size),
            fill=self.view.fill,
            decode_on_cpu=lambda place: decode_region(parts.data[place], parts.regions[place]),
            report=report,
        )


class _Parts:
    """What the threads write, each at its samples' places."""

    def __init__(self, request: StepPlan, pixels: np.ndarray, *, is_packed: bool):
        count = len(request.index)
        self.canvas = None if is_packed else pixels  # uint8 [capacity, H, W, 3]
        self.packing = Packing(
            pixels if is_packed else np.empty(0, np.uint8),
            np.zeros((count, 4), np.int64),
            np.zeros((count, 8), np.float32),
        )
        self.data: list[memoryview] = [memoryview(b"")] * count
        self.regions = np.zeros((count, 4), np.int64)
        self.is_jpeg = np.zeros(count, np.bool_)
        self.size = np.zeros((count, 2), dtype=np.int32)
        self.view = np.zeros((count, 8), dtype=np.float32)
        self.color = np.zeros((count, 6), dtype=np.float32)
        self.label = np.zeros(count, dtype=np.int64)
        self.weight = request.weight.copy()
        self.objects: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = [None] * count
        self.targets: dict[int, Target] = {}

    def blank(self, place: int, fill: tuple[int, int, int]) -> None:
        """Make a place that of a sample which is not there."""
        if self.canvas is not None:
            self.canvas[place] = fill
        self.packing.places[place] = 0
        self.weight[place] = 0
        self.label[place] = 0
        self.objects[place] = None
        self.targets.pop(place, None)


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
