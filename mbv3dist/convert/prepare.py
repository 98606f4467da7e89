"""One picture and its annotation become samples: decoded in full, upright, boxes checked.

A chunk of records is prepared at a time, by any worker. Targets and re-encoded pictures go to a
spool file, a row for each sample to a JSON beside it; the packer later copies from there. So each
picture is decoded once, sizes are known before shards are cut, and a killed conversion goes on. Of
a JPEG that will only be copied, no more than the header is read here: the packer, which reads all
of it, looks at the rest.

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

import numpy as np

from mbv3dist.convert.files import (
    MAX_PICTURE_BYTES,
    UnusableFileError,
    open_sized,
    read_open,
)
from mbv3dist.convert.pictures import (
    REENCODE_QUALITY,
    Picture,
    clean_header,
    clean_picture,
    open_picture,
    picture_problem,
    rotate_box,
)
from mbv3dist.convert.pixels import jpeg_bytes, pixels_at, raw_bytes, shrink
from mbv3dist.convert.records import Box, Problem, Record, Settings
from mbv3dist.convert.structure import END_MARKER, PlainHeader
from mbv3dist.data.formats import PictureError

_HEAD_BYTES = 4 * 1024  # holds most headers
_LONG_HEAD_BYTES = 64 * 1024  # and this nearly every one, also with a profile or a thumbnail

Corners = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """What becomes of a picture, or of an object in it.

    Attributes:
        place: Which of its record's places it takes, from 0.
        picture: Bytes of the picture member, or None to copy the file's.
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
    """What became of a record.

    Attributes:
        samples: Its samples.
        problems: What is wrong with it.
        counts: What was done.
        file_bytes: Size of its file.
        file_crc: If the file is copied, its CRC-32, or that of its header if no more was read.
        scan: Bytes in that header; 0 if the file was read in full.
        has_restarts: What `PlainHeader` says.
    """

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    file_bytes: int = 0
    file_crc: int = 0
    scan: int = 0
    has_restarts: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """A record to prepare.

    Attributes:
        record: The record.
        places: Those of its places that are wanted, or None for all.
        owned: Whether what is counted by record is counted here.
        late: What packing found wrong with its picture, of which preparing had seen the header.
    """

    record: Record
    places: frozenset[int] | None = None
    owned: bool = True
    late: str = ""


def prepare_chunk(
    requests: Sequence[Request], settings: Settings, folder: Path, number: int
) -> dict[str, Any]:
    """Prepare records and spool the result as ``NUMBER.bin`` and ``NUMBER.json`` in a folder.

    Returns:
        What the JSON holds: ``samples``, rows of [record's position in the chunk, place, 1 if the
        picture is copied from its file, picture offset, size and CRC-32, target offset and size,
        header's bytes if the CRC-32 is of the header only, 1 if restart markers may follow, boxes,
        labels], ``problems`` [file, reason, kind], ``counts``, and ``late``, the positions of the
        records that packing had complained about.
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
                size, crc, scan = prepared.file_bytes, prepared.file_crc, prepared.scan
                if picture is not None:
                    file.write(picture)
                    size, crc, scan = len(picture), zlib.crc32(picture), 0
                where = [picture_offset, size, crc, target_offset, len(sample.target)]
                copied, restarts = int(picture is None), int(prepared.has_restarts)
                about = [scan, restarts, sample.num_boxes, sample.labels]
                rows.append([position, sample.place, copied, *where, *about])
            problems += [[item.file, item.reason, item.kind] for item in prepared.problems]
            for name, count in prepared.counts.items():  # `+=` of counters is slow
                counts[name] += count
    os.replace(file.name, spool)
    late = [position for position, request in enumerate(requests) if request.late]
    seen = {name: count for name, count in counts.items() if count}
    result = {"samples": rows, "problems": problems, "counts": seen, "late": late}
    with open_partial(table) as file:
        file.write(json.dumps(result).encode("ascii"))
    os.replace(file.name, table)
    return result


def open_partial(path: Path) -> Any:
    """Open a file of this process's own to write in; ``os.replace`` gives it its name later."""
    return open(path.with_name(f"{path.name}.{os.getpid()}.tmp"), "wb")


def prepare_record(request: Request, settings: Settings) -> Prepared:
    """Turn a record into samples; nothing is raised for bad input, it is listed."""
    result = Prepared()
    try:
        if request.late:
            raise PictureError(request.late)
        _prepare(request, settings, result)
    except (PictureError, UnusableFileError, OSError) as error:
        problem = Problem(request.record.source, picture_problem(error), "bad_picture")
        return Prepared(problems=[problem])
    return result


def _prepare(request: Request, settings: Settings, result: Prepared) -> None:
    """Fill in what becomes of a record.

    Raises:
        PictureError: if its picture is bad, or as `read_bounded` does.
    """
    record = request.record
    picture = _open(record.path, settings, result)
    if settings.label_from == "folder":
        _add_picture(picture, record.label, settings, result)
        return
    boxes = _checked_boxes(record, picture, result)
    if settings.label_from == "boxes":
        result.counts["pictures_without_boxes"] += not boxes
        result.counts["difficult_boxes"] += sum(box.difficult for box in boxes)
        target = _detection_target(picture.size, boxes, settings)
        labels = sorted({box.label for box in boxes})
        content = _final_bytes(picture, settings, result)
        result.samples.append(Sample(0, content, target, len(boxes), labels))
        return
    result.counts["pictures_without_object"] += not boxes
    if not request.owned:
        result.counts.clear()  # by the part that owns the record; bad input is named by each
    if settings.label_from == "crops":
        _add_crops(request, picture, boxes, settings, result)
    elif boxes:
        # max() keeps the first of equals: the XML's order decides.
        label = max(boxes, key=lambda box: _area(box.corners)).label
        _add_picture(picture, label, settings, result)


def _open(path: str, settings: Settings, result: Prepared) -> Picture:
    """Return a picture after reading no more than the header if it is only to be copied.

    Packing does the rest then.
    """
    head, header = b"", None
    file, num_bytes = open_sized(path)
    try:
        if settings.format == "jpeg" and settings.label_from in ("folder", "boxes"):
            head, header = _read_header(file, num_bytes)
        if header is not None and settings.final_size(header.size) == header.size:
            result.file_bytes, result.file_crc = num_bytes, zlib.crc32(head[: header.scan])
            result.scan, result.has_restarts = header.scan, header.has_restarts
            return clean_picture(header)
        data = read_open(file, num_bytes, MAX_PICTURE_BYTES)
    finally:
        os.close(file)
    result.file_bytes = len(data)
    return open_picture(data, header if data.startswith(head) else None)


def _read_header(file: int, num_bytes: int) -> tuple[bytes, PlainHeader | None]:
    """Return the beginning of a file, and its header if its bytes can be kept so far."""
    head = os.pread(file, _HEAD_BYTES, 0)
    end = head[-2:] if len(head) == num_bytes else os.pread(file, 2, max(num_bytes - 2, 0))
    if end != END_MARKER or num_bytes > MAX_PICTURE_BYTES:
        return head, None  # cut off, most likely: that is better said before anything is packed
    header = clean_header(head)
    if header is None and len(head) < num_bytes:
        head = os.pread(file, _LONG_HEAD_BYTES, 0)
        header = clean_header(head)
    return head, header


def _add_picture(picture: Picture, label: int, settings: Settings, result: Prepared) -> None:
    """Add a picture as a sample of one class."""
    content = _final_bytes(picture, settings, result)
    result.samples.append(Sample(0, content, str(label).encode("ascii"), 0, [label]))


def _checked_boxes(record: Record, picture: Picture, result: Prepared) -> list[Box]:
    """Return the record's boxes in the upright picture, clipped; those wholly outside go."""
    upright, stored = picture.size, picture.stored_size
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
    final = settings.final_size(size)
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
    if picture.has_alpha:
        result.counts["alpha_on_white"] += 1
    size = settings.final_size(picture.size)
    if not picture.clean:
        verb = "decoded" if settings.format == "raw" else "reencoded"
        result.counts[f"{verb}_{picture.kind}"] += 1
    if picture.clean and size == picture.size and settings.format == "jpeg":
        result.counts["kept"] += 1
        if not result.scan:
            result.file_crc = zlib.crc32(picture.data)
        return None
    return _stored(pixels_at(picture, size), size != picture.size, settings, result)


def _stored(pixels: np.ndarray, is_resized: bool, settings: Settings, result: Prepared) -> bytes:
    """Return pixels as they are stored; count what was done."""
    result.counts["resized"] += is_resized
    if settings.format == "raw":
        result.counts["stored_raw"] += 1
        return raw_bytes(pixels)
    if is_resized:
        return jpeg_bytes(pixels, quality=settings.quality, full_chroma=False)
    return jpeg_bytes(pixels, quality=REENCODE_QUALITY, full_chroma=True)


def _add_crops(
    request: Request,
    picture: Picture,
    boxes: Sequence[Box],
    settings: Settings,
    result: Prepared,
) -> None:
    """Add the rectangle of each object that is wanted as a sample of its own."""
    places = {box.number: place for place, box in enumerate(request.record.boxes)}
    pixels: np.ndarray | None = None
    for box in boxes:
        place = places[box.number]
        if request.places is not None and place not in request.places:
            continue
        if pixels is None:
            pixels = pixels_at(picture, picture.size)
        x0, y0, x1, y1 = box.corners
        # Outward to whole pixels, so that a crop is never empty.
        crop = pixels[int(y0) : -int(-y1 // 1), int(x0) : -int(-x1 // 1)]
        found = (crop.shape[1], crop.shape[0])
        size = settings.final_size(found)
        content = _stored(shrink(crop, size), size != found, settings, result)
        result.counts["crops"] += 1
        target = str(box.label).encode("ascii")
        result.samples.append(Sample(place, content, target, 0, [box.label]))
