"""One picture and its annotation become samples: decoded in full, upright, boxes checked.

A chunk of records is prepared at a time, by any worker. Targets and re-encoded pictures go to a
spool file, a row for each sample to a JSON beside it; the packer later copies from there. So each
picture is decoded once, sizes are known before shards are cut, and a killed conversion goes on.

Boxes of a picture with an EXIF orientation: labelImg and most tools show and annotate the upright
picture, so boxes count as upright, unless <size> is that of the picture as stored (and differs):
then they are moved along.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbv3dist.convert.files import MAX_PICTURE_BYTES, UnusableFileError, read_bounded
from mbv3dist.convert.pictures import (
    REENCODE_QUALITY,
    Picture,
    encode_jpeg,
    load_picture,
    rotate_box,
    shrink,
    shrunk_size,
)
from mbv3dist.convert.records import Box, Problem, Record, Settings
from mbv3dist.data.formats import PictureError

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """What becomes of a picture, or of an object in it.

    Attributes:
        place: Which of its record's places it takes, from 0.
        picture: JPEG bytes, or None to copy the file's.
        target: Bytes of the target member.
        num_boxes: Boxes in the target.
        labels: Classes in the target, each once, ascending.
    """

    place: int
    picture: bytes | None
    target: bytes
    num_boxes: int
    labels: list[int]


@dataclass
class Prepared:
    """What became of a record."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    file_bytes: int = 0
    file_crc: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """A record to prepare.

    Attributes:
        record: The record.
        places: Those of its places that are wanted, or None for all.
        owned: Whether what is counted by record is counted here.
    """

    record: Record
    places: frozenset[int] | None = None
    owned: bool = True


def prepare_chunk(
    requests: Sequence[Request], settings: Settings, folder: Path, number: int
) -> dict[str, Any]:
    """Prepare records and spool the result as ``NUMBER.bin`` and ``NUMBER.json`` in a folder.

    Returns:
        What the JSON holds: ``samples``, rows of [record's position in the chunk, place, 1 if the
        picture is copied from its file, picture offset, size and CRC-32, target offset and size,
        boxes, labels], ``problems`` [file, reason, kind] and ``counts``.
    """
    spool, table = folder / f"{number:06d}.bin", folder / f"{number:06d}.json"
    rows: list[list[Any]] = []
    problems: list[list[str]] = []
    counts: Counter[str] = Counter()
    with open_partial(spool) as file:
        for position, request in enumerate(requests):
            prepared = prepare_record(request, settings)
            for sample in prepared.samples:
                target_offset = file.tell()
                file.write(sample.target)
                picture_offset, picture = file.tell(), sample.picture
                size, crc = prepared.file_bytes, prepared.file_crc
                if picture is not None:
                    file.write(picture)
                    size, crc = len(picture), zlib.crc32(picture)
                where = [picture_offset, size, crc, target_offset, len(sample.target)]
                copied = int(picture is None)
                about = [sample.num_boxes, sample.labels]
                rows.append([position, sample.place, copied, *where, *about])
            problems += [[item.file, item.reason, item.kind] for item in prepared.problems]
            counts += prepared.counts
    os.replace(file.name, spool)
    result = {"samples": rows, "problems": problems, "counts": dict(counts)}
    with open_partial(table) as file:
        file.write(json.dumps(result).encode("ascii"))
    os.replace(file.name, table)
    return result


def open_partial(path: Path) -> Any:
    """Open a file of this process's own to write in; ``os.replace`` gives it its name later."""
    return open(path.with_name(f"{path.name}.{os.getpid()}.tmp"), "wb")


def prepare_record(request: Request, settings: Settings) -> Prepared:
    """Turn a record into samples; nothing is raised for bad input, it is listed."""
    record, result = request.record, Prepared()
    try:
        data = read_bounded(record.path, MAX_PICTURE_BYTES)
        result.file_bytes, result.file_crc = len(data), zlib.crc32(data)
        picture = load_picture(data)
    except (PictureError, UnusableFileError) as error:
        result.problems.append(Problem(record.source, str(error), "bad_picture"))
        return result
    except OSError as error:
        reason = error.strerror or type(error).__name__
        result.problems.append(Problem(record.source, f"cannot be read: {reason}", "bad_picture"))
        return result
    if settings.label_from == "folder":
        _add_picture(picture, record.label, settings, result)
        return result
    boxes = _checked_boxes(record, picture, result)
    if settings.label_from == "boxes":
        result.counts["pictures_without_boxes"] += not boxes
        result.counts["difficult_boxes"] += sum(box.difficult for box in boxes)
        target = _detection_target(picture.image.size, boxes, settings)
        labels = sorted({box.label for box in boxes})
        content = _final_bytes(picture, settings, result)
        result.samples.append(Sample(0, content, target, len(boxes), labels))
        return result
    result.counts["pictures_without_object"] += not boxes
    if not request.owned:
        result.counts.clear()  # by the part that owns the record; bad input is named by each
    if settings.label_from == "crops":
        _add_crops(request, picture, boxes, settings, result)
    elif boxes:
        # max() keeps the first of equals: the XML's order decides.
        label = max(boxes, key=lambda box: _area(box.corners)).label
        _add_picture(picture, label, settings, result)
    return result


def _add_picture(picture: Picture, label: int, settings: Settings, result: Prepared) -> None:
    """Add a picture as a sample of one class."""
    content = _final_bytes(picture, settings, result)
    result.samples.append(Sample(0, content, str(label).encode("ascii"), 0, [label]))


def _checked_boxes(record: Record, picture: Picture, result: Prepared) -> list[Box]:
    """Return the record's boxes in the upright picture, clipped; those wholly outside go."""
    upright, stored = picture.image.size, picture.stored_size
    declared = record.declared_size
    if declared is None or 0 in declared:
        result.counts["missing_size"] += 1
    elif declared not in (upright, stored):
        result.counts["wrong_size"] += 1
    rotate = picture.orientation > 1 and declared == stored and declared != upright
    result.counts["boxes_rotated_with_exif"] += len(record.boxes) * rotate
    width, height = upright
    kept = []
    for box in record.boxes:
        corners = rotate_box(box.corners, picture.orientation, stored) if rotate else box.corners
        clipped = (
            min(max(corners[0], 0), width),
            min(max(corners[1], 0), height),
            min(max(corners[2], 0), width),
            min(max(corners[3], 0), height),
        )
        if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            reason = (
                f"object {box.number}: its box lies wholly outside the {width}x{height} picture"
            )
            result.problems.append(Problem(record.source, reason, "bad_box"))
            continue
        result.counts["clipped_boxes"] += clipped != corners
        kept.append(Box(clipped, box.label, box.difficult, box.number))
    return kept


def _detection_target(size: tuple[int, int], boxes: Sequence[Box], settings: Settings) -> bytes:
    """Return the JSON member: the final picture's size and the boxes in its pixels."""
    final = size if settings.resize is None else shrunk_size(size, settings.resize)
    scale_x, scale_y = final[0] / size[0], final[1] / size[1]
    value = {
        "width": final[0],
        "height": final[1],
        "boxes": [
            [
                _number(box.corners[0] * scale_x),
                _number(box.corners[1] * scale_y),
                _number(box.corners[2] * scale_x),
                _number(box.corners[3] * scale_y),
            ]
            for box in boxes
        ],
        "labels": [box.label for box in boxes],
        "difficult": [int(box.difficult) for box in boxes],
    }
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _number(value: float) -> int | float:
    """Return a coordinate as it is written: whole where it is whole, else to 1/10000 px."""
    rounded = round(value, 4)
    return int(rounded) if rounded == int(rounded) else rounded


def _area(corners: Corners) -> float:
    return (corners[2] - corners[0]) * (corners[3] - corners[1])


def _final_bytes(picture: Picture, settings: Settings, result: Prepared) -> bytes | None:
    """Return the bytes to store, or None to keep the file's; count what was done."""
    result.counts["alpha_on_white"] += picture.has_alpha
    if not picture.clean:
        result.counts[f"reencoded_{picture.kind}"] += 1
    if settings.resize is not None and min(picture.image.size) > settings.resize:
        result.counts["resized"] += 1
        small = shrink(picture.image, settings.resize)
        return encode_jpeg(small, quality=settings.quality, full_chroma=False)
    if picture.clean:
        result.counts["kept"] += 1
        return None
    return encode_jpeg(picture.image, quality=REENCODE_QUALITY, full_chroma=True)


def _add_crops(
    request: Request,
    picture: Picture,
    boxes: Sequence[Box],
    settings: Settings,
    result: Prepared,
) -> None:
    """Add the rectangle of each object that is wanted as a sample of its own."""
    places = {box.number: place for place, box in enumerate(request.record.boxes)}
    for box in boxes:
        place = places[box.number]
        if request.places is not None and place not in request.places:
            continue
        x0, y0, x1, y1 = box.corners
        # Outward to whole pixels, so that a crop is never empty.
        crop = picture.image.crop((int(x0), int(y0), -int(-x1 // 1), -int(-y1 // 1)))
        quality, full_chroma = REENCODE_QUALITY, True
        if settings.resize is not None and min(crop.size) > settings.resize:
            crop = shrink(crop, settings.resize)
            quality, full_chroma = settings.quality, False
            result.counts["resized"] += 1
        content = encode_jpeg(crop, quality=quality, full_chroma=full_chroma)
        target = str(box.label).encode("ascii")
        result.samples.append(Sample(place, content, target, 0, [box.label]))
        result.counts["crops"] += 1
