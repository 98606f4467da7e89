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
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


@dataclass
class Prepared:
    """Samples of a record as (source, picture bytes or None to copy the file, target, boxes)."""

    samples: list[tuple[str, bytes | None, bytes, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    file_bytes: int = 0


def prepare_chunk(
    records: Sequence[Record], settings: Settings, folder: Path, number: int
) -> dict[str, Any]:
    """Prepare records and spool the result as ``NUMBER.bin`` and ``NUMBER.json`` in a folder.

    Returns:
        What the JSON holds: ``samples`` rows [source, path or None, picture offset, picture size,
        target offset, target size, boxes], ``problems`` [file, reason, kind] and ``counts``.
    """
    spool, table = folder / f"{number:06d}.bin", folder / f"{number:06d}.json"
    rows: list[list[Any]] = []
    problems: list[list[str]] = []
    counts: Counter[str] = Counter()
    with open_partial(spool) as file:
        for record in records:
            prepared = prepare_record(record, settings)
            for source, picture, target, num_boxes in prepared.samples:
                target_offset = file.tell()
                file.write(target)
                picture_offset = file.tell()
                size = prepared.file_bytes if picture is None else len(picture)
                if picture is not None:
                    file.write(picture)
                path = record.path if picture is None else None
                row = [source, path, picture_offset, size, target_offset, len(target), num_boxes]
                rows.append(row)
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


def prepare_record(record: Record, settings: Settings) -> Prepared:
    """Turn a record into samples; nothing is raised for bad input, it is listed."""
    result = Prepared()
    try:
        with open(record.path, "rb") as file:
            data = file.read()
        result.file_bytes = len(data)
        picture = load_picture(data)
    except PictureError as error:
        result.problems.append(Problem(record.source, str(error), "bad_picture"))
        return result
    except OSError as error:
        reason = error.strerror or type(error).__name__
        result.problems.append(Problem(record.source, f"cannot be read: {reason}", "bad_picture"))
        return result
    if settings.label_from == "folder":
        target = str(record.label).encode("ascii")
        result.samples.append((record.source, _final_bytes(picture, settings, result), target, 0))
        return result
    boxes = _checked_boxes(record, picture, result)
    if settings.label_from == "crops":
        _add_crops(record, picture, boxes, settings, result)
        return result
    if settings.label_from == "largest":
        if not boxes:
            result.counts["pictures_without_object"] += 1
            return result
        # max() keeps the first of equals: the XML's order decides.
        label = max(boxes, key=lambda box: _area(box.corners)).label
        target, num_boxes = str(label).encode("ascii"), 0
    else:
        target, num_boxes = _detection_target(picture.image.size, boxes, settings), len(boxes)
        result.counts["pictures_without_boxes"] += not boxes
        result.counts["difficult_boxes"] += sum(box.difficult for box in boxes)
    content = _final_bytes(picture, settings, result)
    result.samples.append((record.source, content, target, num_boxes))
    return result


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
    record: Record, picture: Picture, boxes: Sequence[Box], settings: Settings, result: Prepared
) -> None:
    """Add each object's rectangle as a sample of its own; its source ends in ``#NUMBER``."""
    if not boxes:
        result.counts["pictures_without_object"] += 1
        return
    for box in boxes:
        x0, y0, x1, y1 = box.corners
        # Outward to whole pixels, so that a crop is never empty.
        crop = picture.image.crop((int(x0), int(y0), -int(-x1 // 1), -int(-y1 // 1)))
        quality, full_chroma = REENCODE_QUALITY, True
        if settings.resize is not None and min(crop.size) > settings.resize:
            crop = shrink(crop, settings.resize)
            quality, full_chroma = settings.quality, False
            result.counts["resized"] += 1
        content = encode_jpeg(crop, quality=quality, full_chroma=full_chroma)
        label = str(box.label).encode("ascii")
        result.samples.append((f"{record.source}#{box.number}", content, label, 0))
        result.counts["crops"] += 1
