"""How samples become places of a batch: read, view, decode, in any thread and order.

`Drawing.draw` is the walk of a chunk of samples. Python touches each sample only to read it and to
parse its target; headers, views and pixels are one compiled call a chunk each, without the GIL, so
that many threads decode while one trains. Everything random is keyed by (seed, epoch, sample):
pixels never depend on the number of threads, the prefetch depth, the rank or the world size.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass

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
from mbv3dist.data.target import Target, parse_target
from mbv3dist.data.view_kernels import ViewMaker, Views

_NO_BOXES = np.zeros((0, 4), np.float32)


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
        errors: dict[int, BaseException] = {}
        damaged: dict[int, DamagedShardError] = {}
        samples = self._read(work.request, places, errors, damaged)
        pictures = self._open(samples, damaged)
        if samples:
            # What the maker of views refuses is the recipe, not a sample.
            at = np.array([sample.place for sample in samples])
            views, starts = self._make_views(work.request, samples, at, pictures.sizes)
            self._draw_pixels(pictures, views, at, parts)
            for n, error in pictures.errors.items():
                damaged[samples[n].place] = self._damage(samples[n], error)
            parts.size[at] = pictures.sizes[:, ::-1]
            parts.view[at] = views.vectors()
            parts.color[at] = views.color
            self._put_targets(samples, views, starts, parts)
        for place, error in damaged.items():
            try:
                self.budget.add(int(work.request.index[place]), error)
            except DamagedShardError as refused:
                errors[place] = refused
            parts.blank(place, self.view.fill)
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

    def _read(
        self,
        request: StepPlan,
        places: range,
        errors: dict[int, BaseException],
        damaged: dict[int, DamagedShardError],
    ) -> list[_Sample]:
        """Return the samples that can be read and whose targets make sense."""
        samples = []
        for place in places:
            index = int(request.index[place])
            try:
                first = int(request.epoch[place]) == self.first_epoch
                data, target_data = self.reader.read(index, first=first)
                try:
                    target = parse_target(
                        target_data, self.split.task, num_classes=self.num_classes
                    )
                except ValueError as error:
                    raise self.reader.damage(index, str(error)) from error
                samples.append(_Sample(place, index, data, target))
            except DamagedShardError as error:
                damaged[place] = error
            except BaseException as error:
                errors[place] = error
        return samples

    def _open(self, samples: list[_Sample], damaged: dict[int, DamagedShardError]) -> Pictures:
        """Open the pictures; samples whose picture is damaged, or is another, leave the list."""
        pictures = Pictures([sample.data for sample in samples])
        problems = dict(pictures.errors)
        if self.split.task == "detection":
            for n, (sample, size) in enumerate(zip(samples, pictures.sizes.tolist(), strict=True)):
                if [sample.target.width, sample.target.height] != size:
                    problems.setdefault(n, _size_error(sample.target, *size))
        if not problems:
            return pictures
        for n in sorted(problems, reverse=True):
            sample = samples.pop(n)
            damaged[sample.place] = self._damage(sample, problems[n])
        return Pictures([sample.data for sample in samples])

    def _damage(self, sample: _Sample, problem: ValueError) -> DamagedShardError:
        error = self.reader.damage(sample.index, str(problem))
        error.__cause__ = problem
        return error

    def _make_views(
        self, request: StepPlan, samples: list[_Sample], at: np.ndarray, sizes: np.ndarray
    ) -> tuple[Views, np.ndarray]:
        """Draw the samples' views; also returns where each one's boxes start, int64 [n + 1]."""
        starts = np.zeros(len(samples) + 1, np.int64)
        boxes = _NO_BOXES
        if self.split.task == "detection":
            starts[1:] = list(itertools.accumulate(len(sample.target.boxes) for sample in samples))
            boxes = np.concatenate([sample.target.boxes for sample in samples])
        # A sample that comes twice in an epoch is drawn in two ways.
        drawn = request.index[at] + (request.copy[at] << COPY_SHIFT)
        views = self._maker.make(request.epoch[at], drawn, sizes, boxes, starts)
        return views, starts

    def _put_targets(
        self, samples: list[_Sample], views: Views, starts: np.ndarray, parts: _Parts
    ) -> None:
        """Write what is known about each picture, with its boxes on the canvas."""
        if self.drop_boxes and len(views.boxes):
            np.clip(views.boxes, 0.0, float(self.size), out=views.boxes)
        bounds = starts.tolist()
        for sample, first, last in zip(samples, bounds[:-1], bounds[1:], strict=True):
            target, place = sample.target, sample.place
            parts.label[place] = target.label
            if not self.drop_boxes:
                parts.objects[place] = (views.boxes[first:last], target.labels, target.difficult)
                parts.targets[place] = target
            elif last > first:
                keep = views.keep[first:last]
                parts.objects[place] = (
                    views.boxes[first:last][keep],
                    target.labels[keep],
                    target.difficult[keep],
                )

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


@dataclass
class _Sample:
    """A sample that was read: its place in the batch, and what it is."""

    place: int
    index: int
    data: memoryview
    target: Target


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


def _size_error(target: Target, width: int, height: int) -> ValueError:
    """Boxes that were made for a picture of another size."""
    return ValueError(
        f"the picture has {width} x {height} pixels, its .json member says "
        f"{target.width} x {target.height}"
    )
