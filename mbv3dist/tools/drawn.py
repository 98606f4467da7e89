"""A small VOC-layout data set of drawn things, for the quickstart.

Five classes (see `drawings.CLASSES`) on busy square pictures. Shares are quotas over each split,
not probabilities: 30 % of the objects have a longer side below 12 % of the picture's side, 15 %
overlap another object, 10 % of the pictures are empty. Boxes are tight around what is visible, as
the drawn masks have it. One seed gives the same files every time, whatever the number of workers.

    ROOT/JPEGImages/000001.jpg
    ROOT/Annotations/000001.xml
    ROOT/ImageSets/Main/{train,val,trainval,test}.txt
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.random import Generator, Philox
from PIL import Image

from mbv3dist.tools.drawings import CLASSES, draw_background, draw_thing

EMPTY_SHARE = 0.10  # of the pictures
SMALL_SHARE = 0.30  # of the objects
OVERLAP_SHARE = 0.15  # of the objects
SMALL_LIMIT = 0.12  # longer side of the box / side of the picture
SMALL_SIZES = (0.092, 0.117)  # drawn well inside the limit, at least 14 pixels
LARGE_SIZES = (0.17, 0.52)
MAX_OBJECTS = 8
MIN_PIXELS = 14
JPEG_QUALITY = 90

_PLAN_STREAM = 1 << 62  # Philox key of a split's plan; pictures use their number


@dataclass(frozen=True)
class Thing:
    """What the plan asks for: a class, the longer side as a share of the picture's, an overlap."""

    name: str
    size: float
    overlaps_previous: bool


@dataclass(frozen=True)
class DrawnObject:
    """What came out: class name, visible mask bool [size, size], and its box.

    `box` is the tight half-open box of the mask: (x0, y0, x1, y1) in pixels, 0-based.
    """

    name: str
    mask: np.ndarray
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Picture:
    """A finished picture: RGB image and the objects on it."""

    image: Image.Image
    objects: tuple[DrawnObject, ...]


def make_drawn_dataset(
    root: str | Path,
    *,
    num_train: int = 1600,
    num_test: int = 250,
    num_val: int = 100,
    size: int = 256,
    seed: int = 0,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | int]:
    """Draws the data set under `root`, which must be empty or new.

    Args:
        root: folder to fill.
        num_train: pictures in train.txt.
        num_test: pictures in test.txt.
        num_val: pictures in val.txt; trainval.txt is train and val together.
        size: side of the square pictures in pixels, at least 160.
        seed: one seed, one data set.
        num_workers: processes that draw; the files are the same for any number.
        progress: called with (pictures done, pictures in all).

    Returns:
        Counts and measured shares: pictures, objects, empty_pictures, small_objects,
        overlapping_objects.

    Raises:
        ValueError: a folder with something in it, or numbers out of range.
    """
    root = Path(root)
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root}: the folder is not empty; remove it or choose another one")
    if size < 160:
        raise ValueError(
            f"size = {size}: small things would be under {MIN_PIXELS} pixels; at least 160"
        )
    if min(num_train, num_test) < 1 or num_val < 0:
        raise ValueError(
            f"num_train = {num_train}, num_val = {num_val}, num_test = {num_test}: at least 1, 0, 1"
        )
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    plans: list[tuple[Thing, ...]] = []
    names: dict[str, list[str]] = {}
    for stream, (split, count) in enumerate(
        (("train", num_train), ("val", num_val), ("test", num_test))
    ):
        names[split] = [f"{len(plans) + offset + 1:06d}" for offset in range(count)]
        plans += plan_split(count, seed=seed, stream=stream)
    names["trainval"] = names["train"] + names["val"]
    for split, stems in names.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text(
            "".join(f"{stem}\n" for stem in stems)
        )

    found = []
    for boxes in _in_order(partial(_write_picture, root, size=size, seed=seed), plans, num_workers):
        found.append(boxes)
        if progress is not None:
            progress(len(found), len(plans))
    return _statistics(found, size)


def plan_split(count: int, *, seed: int, stream: int) -> list[tuple[Thing, ...]]:
    """Decides what stands on each of `count` pictures, keeping the quotas exactly (to rounding).

    Args:
        count: number of pictures.
        seed: the data set's seed.
        stream: number of the split, so that splits differ.
    """
    draws = Generator(Philox(key=[seed, _PLAN_STREAM + stream]))
    numbers = draws.integers(1, MAX_OBJECTS + 1, size=count)
    numbers[draws.permutation(count)[: round(EMPTY_SHARE * count)]] = 0
    total = int(numbers.sum())
    small = draws.permutation(total) < round(SMALL_SHARE * total)
    labels = draws.permutation(total) % len(CLASSES)
    crowded = draws.permutation(np.flatnonzero(numbers >= 2))
    paired = set(crowded[: round(OVERLAP_SHARE * total / 2)].tolist())

    plans, start = [], 0
    for picture, number in enumerate(numbers.tolist()):
        largest = LARGE_SIZES[1] * (1.0 if number <= 2 else 0.82 if number <= 4 else 0.66)
        things = []
        for position in range(number):
            low, high = SMALL_SIZES if small[start + position] else (LARGE_SIZES[0], largest)
            share = math.exp(draws.uniform(math.log(low), math.log(high)))
            name = CLASSES[labels[start + position]]
            things.append(Thing(name, share, overlaps_previous=picture in paired and position == 1))
        plans.append(tuple(things))
        start += number
    return plans


def draw_picture(number: int, plan: tuple[Thing, ...], *, size: int, seed: int) -> Picture:
    """Draws one picture of the plan.

    Args:
        number: number of the picture, from 1; keys its random numbers.
        plan: the things on it, in drawing order.
        size: side in pixels.
        seed: the data set's seed.
    """
    draws = Generator(Philox(key=[seed, number]))
    canvas = draw_background(draws, size=size)
    boxes: list[tuple[int, int, int, int]] = []
    layers = []
    for thing in plan:
        for attempt in range(
            8
        ):  # a crowded picture takes a thing a little smaller, but never a small one
            shrink = 0.93**attempt if thing.size > SMALL_SIZES[1] else 1.0
            side = max(MIN_PIXELS, max(thing.size * shrink, LARGE_SIZES[0] * (shrink < 1)) * size)
            layer = draw_thing(thing.name, draws, size=side)
            opaque = np.asarray(layer.getchannel("A")) >= 128
            place = _find_place(
                draws, _box(opaque), boxes, size=size, overlap=thing.overlaps_previous
            )
            if place is not None:
                break
        else:
            continue  # no room left; rare, and counted by the measured shares
        layers.append((thing.name, layer, opaque, place))
        box = _box(opaque)
        boxes.append((box[0] + place[0], box[1] + place[1], box[2] + place[0], box[3] + place[1]))

    masks: list[np.ndarray] = []
    for _, layer, opaque, place in layers:
        canvas.paste(layer, place, layer)
        mask = _shifted(opaque, place, size)
        masks = [below & ~mask for below in masks] + [mask]
    objects = [
        DrawnObject(name, mask, _box(mask))
        for (name, _, _, _), mask in zip(layers, masks, strict=True)
    ]
    strength = np.float32(draws.uniform(0.0, 7.0))
    grain = draws.standard_normal(size=(size, size, 1), dtype=np.float32) * strength
    pixels = np.clip(np.asarray(canvas, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
    return Picture(Image.fromarray(pixels), tuple(objects))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shifted(mask: np.ndarray, place: tuple[int, int], size: int) -> np.ndarray:
    """The layer's mask on the whole picture; bool [size, size]."""
    x0, y0, x1, y1 = _box(mask)
    canvas = np.zeros((size, size), dtype=bool)
    canvas[y0 + place[1] : y1 + place[1], x0 + place[0] : x1 + place[0]] = mask[y0:y1, x0:x1]
    return canvas


def _intersection(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0, width) * max(0, height)


def _area(box: tuple[int, int, int, int]) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _find_place(
    draws: Generator,
    box: tuple[int, int, int, int],
    others: list[tuple[int, int, int, int]],
    *,
    size: int,
    overlap: bool,
) -> tuple[int, int] | None:
    """Offset that puts `box` inside the picture: apart from all others, or over the last of them.

    An overlap covers 12 to 35 % of the smaller box, so that both things stay recognisable.
    """
    gap = 2
    width, height = box[2] - box[0], box[3] - box[1]
    for _ in range(60):
        if overlap and others:
            last = others[-1]
            x = int(draws.integers(last[0] - width, last[2] + 1))
            y = int(draws.integers(last[1] - height, last[3] + 1))
        else:
            x = int(draws.integers(0, size - width + 1))
            y = int(draws.integers(0, size - height + 1))
        if x < 0 or y < 0 or x + width > size or y + height > size:
            continue
        around = (x - gap, y - gap, x + width + gap, y + height + gap)
        apart = others[:-1] if overlap else others
        if any(_intersection(around, other) for other in apart):
            continue
        if overlap and others:
            shared = _intersection((x, y, x + width, y + height), others[-1])
            if not 0.12 <= shared / min(width * height, _area(others[-1])) <= 0.35:
                continue
        return x - box[0], y - box[1]
    return None


def _in_order(
    work: Callable[[int, tuple[Thing, ...]], list[tuple[int, int, int, int]]],
    plans: list[tuple[Thing, ...]],
    num_workers: int,
) -> Iterator[list[tuple[int, int, int, int]]]:
    numbers = range(1, len(plans) + 1)
    if num_workers <= 1:
        yield from map(work, numbers, plans)
        return
    # Fresh processes: forking one that may already run torch's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(work, numbers, plans, chunksize=16)


def _write_picture(
    root: Path, number: int, plan: tuple[Thing, ...], *, size: int, seed: int
) -> list[tuple[int, int, int, int]]:
    picture = draw_picture(number, plan, size=size, seed=seed)
    stem = f"{number:06d}"
    picture.image.save(root / "JPEGImages" / f"{stem}.jpg", quality=JPEG_QUALITY)
    (root / "Annotations" / f"{stem}.xml").write_text(_annotation(picture, stem), encoding="utf-8")
    return [found.box for found in picture.objects]


def _annotation(picture: Picture, stem: str) -> str:
    """The picture's XML as labelImg writes it: tabs, 1-based inclusive corners."""
    width, height = picture.image.size
    lines = [
        "<annotation>",
        "\t<folder>JPEGImages</folder>",
        f"\t<filename>{stem}.jpg</filename>",
        f"\t<path>JPEGImages/{stem}.jpg</path>",
        "\t<source>\n\t\t<database>Unknown</database>\n\t</source>",
        f"\t<size>\n\t\t<width>{width}</width>\n\t\t<height>{height}</height>\n\t\t<depth>3</depth>\n\t</size>",
        "\t<segmented>0</segmented>",
    ]
    for found in picture.objects:
        x0, y0, x1, y1 = found.box
        lines += [
            "\t<object>",
            f"\t\t<name>{escape(found.name)}</name>",
            "\t\t<pose>Unspecified</pose>",
            "\t\t<truncated>0</truncated>",
            "\t\t<difficult>0</difficult>",
            "\t\t<bndbox>",
            f"\t\t\t<xmin>{x0 + 1}</xmin>\n\t\t\t<ymin>{y0 + 1}</ymin>",
            f"\t\t\t<xmax>{x1}</xmax>\n\t\t\t<ymax>{y1}</ymax>",
            "\t\t</bndbox>",
            "\t</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


def _statistics(found: list[list[tuple[int, int, int, int]]], size: int) -> dict[str, float | int]:
    num_objects = sum(len(boxes) for boxes in found)
    small = overlapping = 0
    for boxes in found:
        for number, box in enumerate(boxes):
            others = boxes[:number] + boxes[number + 1 :]
            small += max(box[2] - box[0], box[3] - box[1]) < SMALL_LIMIT * size
            overlapping += any(_intersection(box, other) for other in others)
    return {
        "pictures": len(found),
        "objects": num_objects,
        "empty_pictures": sum(not boxes for boxes in found) / max(1, len(found)),
        "small_objects": small / max(1, num_objects),
        "overlapping_objects": overlapping / max(1, num_objects),
    }
