"""The pictures that all systems read: a class folder or VOC folder in the work folder.

They come from a folder of the user's, or are drawn. Every picture becomes an upright RGB JPEG first
(one that is already keeps its bytes), because some systems read nothing else.
"""

from __future__ import annotations

import io
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SHORTER_SIDE, QUALITY = 256, 90
NUM_CLASSES = 8


def list_folder(folder: Path) -> list[Path]:
    """Return the pictures of a class folder.

    Raises:
        ValueError: When there are none.
    """
    found = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"no pictures in folders in {folder}; --data takes CLASS/PICTURE.jpg")
    return found


def copy_folder(pictures: list[Path], out: Path, *, samples: int) -> int:
    """Copy `samples` pictures to class folders, going round as often as it takes.

    Returns:
        How many of the different pictures had to be encoded again.
    """
    encoded = 0
    for number in range(samples):
        path = pictures[number % len(pictures)]
        turn = number // len(pictures)
        place = out / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        target = place / f"{path.stem}-{turn:03d}.jpg"
        if turn:
            shutil.copy(place / f"{path.stem}-000.jpg", target)
        else:
            encoded += _copy_plain(path, target)
    return encoded


def _copy_plain(path: Path, target: Path) -> bool:
    """Copy a picture, as an upright RGB JPEG; return whether it had to be encoded."""
    with Image.open(path) as image:
        rotated = image.getexif().get(0x0112, 1) != 1
        if image.format == "JPEG" and image.mode == "RGB" and not rotated:
            shutil.copy(path, target)
            return False
        ImageOps.exif_transpose(image).convert("RGB").save(target, quality=95, subsampling=0)
    return True


def resize_folder(folder: Path, out: Path) -> None:
    """Write the pictures with a shorter side of at most 256 pixels, quality 90."""
    for path in sorted(folder.glob("*/*.jpg")):
        target = out / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        first = target.with_name(f"{path.stem[:-3]}000.jpg")
        if first.is_file():  # a repetition
            shutil.copy(first, target)
            continue
        with Image.open(path) as image:
            scale = SHORTER_SIDE / min(image.size)
            if scale < 1:
                size = [max(1, round(side * scale)) for side in image.size]
                image.resize((size[0], size[1]), Image.Resampling.BILINEAR).save(
                    target, quality=QUALITY
                )
            else:
                shutil.copy(path, target)


def draw_pictures(count: int, *, width: int = 500, height: int = 375) -> Iterator[bytes]:
    """Draw JPEGs of about the bytes that photographs of this size have: 110 KB at 500 x 375.

    Noise of several scales, smooth at most of them, as photographs are.
    """
    random = np.random.default_rng(0)
    for _ in range(count):
        total = np.zeros((height, width, 3), dtype=np.float32)
        for cell, strength in ((96, 70.0), (32, 35.0), (8, 20.0), (3, 20.0), (1, 20.0)):
            shape = (height // cell + 2, width // cell + 2)
            # Most of a photograph is brightness, little is colour.
            small = random.normal(size=(*shape, 1)) + 0.35 * random.normal(size=(*shape, 3))
            values = np.clip(small * 40 + 128, 0, 255).astype(np.uint8)
            layer = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
            total += (np.asarray(layer, dtype=np.float32) - 128) / 40 * strength
        image = Image.fromarray(np.clip(total + 118, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        image.filter(ImageFilter.SMOOTH).save(file, "JPEG", quality=95)
        yield file.getvalue()


def write_pictures(out: Path, count: int, *, width: int = 500, height: int = 375) -> None:
    """Write drawn pictures as class folders."""
    for number, data in enumerate(draw_pictures(count, width=width, height=height)):
        place = out / f"class{number % NUM_CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.jpg").write_bytes(data)


def write_voc(out: Path, count: int, *, width: int = 640, height: int = 480) -> None:
    """Write drawn pictures as a VOC folder, with 1 to 12 boxes each."""
    random = np.random.default_rng(1)
    names = []
    for number, data in enumerate(draw_pictures(count, width=width, height=height)):
        corners = random.uniform(0, 1, size=(int(random.integers(1, 13)), 4))
        boxes = []
        for x, y, w, h in corners:
            x0, y0 = int(x * (width - 40)) + 1, int(y * (height - 40)) + 1
            x1 = min(width, x0 + 20 + int(w * 200))
            y1 = min(height, y0 + 20 + int(h * 200))
            boxes.append((f"kind{int(w * 3)}", x0, y0, x1, y1))
        names.append(f"{number:05d}")
        _write_sample(out, names[-1], data, (width, height), boxes)
    _write_split(out, names)


def copy_voc(source: Path, out: Path, *, samples: int) -> int:
    """Copy `samples` pictures of a VOC folder's trainval split, going round as often as it takes.

    Returns:
        How many boxes without area were left out.

    Raises:
        ValueError: When the folder has no such split.
    """
    split = source / "ImageSets" / "Main" / "trainval.txt"
    if not split.is_file():
        raise ValueError(f"no {split}; --voc takes a folder in Pascal VOC's layout")
    given = [line.split()[0] for line in split.read_text().splitlines() if line.strip()]
    names, empty = [], 0
    for number in range(samples):
        name, turn = given[number % len(given)], number // len(given)
        data = (source / "JPEGImages" / f"{name}.jpg").read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
        boxes, left_out = _boxes(source / "Annotations" / f"{name}.xml")
        empty += left_out if turn == 0 else 0
        names.append(f"{name}-{turn:03d}")
        _write_sample(out, names[-1], data, size, boxes)
    _write_split(out, names)
    return empty


def _boxes(path: Path) -> tuple[list[tuple[str, int, int, int, int]], int]:
    """Return name and corners of the boxes that have an area, and how many have none."""
    boxes, empty = [], 0
    for item in ElementTree.parse(path).iterfind("object"):
        x0, y0, x1, y1 = (int(float(item.findtext(f"bndbox/{n}", ""))) for n in _CORNERS)
        if x1 <= x0 or y1 <= y0:
            empty += 1
        else:
            boxes.append((item.findtext("name", ""), x0, y0, x1, y1))
    return boxes, empty


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _write_sample(
    out: Path,
    name: str,
    data: bytes,
    size: tuple[int, int],
    boxes: list[tuple[str, int, int, int, int]],
) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = f"{name}.jpg"
    sides = ElementTree.SubElement(root, "size")
    for key, value in (("width", size[0]), ("height", size[1]), ("depth", 3)):
        ElementTree.SubElement(sides, key).text = str(value)
    for kind, *corners in boxes:
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = kind
        box = ElementTree.SubElement(item, "bndbox")
        for key, value in zip(_CORNERS, corners, strict=True):
            ElementTree.SubElement(box, key).text = str(value)
    ElementTree.ElementTree(root).write(out / "Annotations" / f"{name}.xml")
    (out / "JPEGImages" / f"{name}.jpg").write_bytes(data)


def _write_split(out: Path, names: list[str]) -> None:
    (out / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names) + "\n")
