"""Pascal VOC annotations as VOC, labelImg and its kin really write them.

Only direct children count: an <object> may hold <part>s with names and boxes of their own.
<difficult>, <truncated> and <pose> may be missing, <path> may be of another machine, <filename>
and <size> may be wrong: the picture itself decides.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

from mbv3dist.convert.files import show
from mbv3dist.data.class_names import MAX_NAME

_MAX_DEPTH = 100  # elements within elements; annotations have four
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class AnnotationError(ValueError):
    """A file that is no VOC annotation; the message is the reason."""


@dataclass(frozen=True, slots=True)
class VocObject:
    """One usable object; corners are xmin, ymin, xmax, ymax as they stand in the XML."""

    number: int  # from 1, in the order of the XML
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool

    @property
    def half_open(self) -> tuple[float, float, float, float]:
        """The box 0-based and half-open: VOC's corners are 1-based and inclusive."""
        xmin, ymin, xmax, ymax = self.corners
        return xmin - 1, ymin - 1, xmax, ymax


@dataclass(frozen=True, slots=True)
class Annotation:
    """A parsed XML.

    Attributes:
        filename: Last part of <filename>, or an empty string.
        size: (width, height) claimed by <size>, or None.
        objects: Usable objects.
        refused: Why each other object cannot be used.
        names: Class names of all objects, usable or not, each once, sorted.
    """

    filename: str
    size: tuple[int, int] | None
    objects: tuple[VocObject, ...]
    refused: tuple[str, ...]
    names: tuple[str, ...]  # not a set: that takes 200 bytes more for each picture


def parse_annotation(data: bytes) -> Annotation:
    """Parse an XML file's bytes.

    Raises:
        AnnotationError: if it is no XML or no annotation.
    """
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import DefusedXMLParser

    if not data.strip():
        raise AnnotationError("the file is empty")
    # Entities can grow without bound or name other files, and need a DOCTYPE to be declared in.
    parser = DefusedXMLParser(target=_BoundedBuilder(), forbid_dtd=True)
    try:
        parser.feed(data)
        root = parser.close()
    except AnnotationError:
        raise
    except DefusedXmlException as error:
        what = type(error).__name__
        raise AnnotationError(f"XML with a DOCTYPE or entities is refused ({what})") from error
    except (ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"damaged XML ({show(str(error))})") from error
    if root.tag != "annotation":
        raise AnnotationError(f"its root element is <{show(root.tag)}>, not <annotation>")
    objects, refused, names = [], [], set()
    for number, element in enumerate(root.findall("object"), start=1):
        name = sys.intern(_text(element, "name"))
        if 0 < len(name) <= MAX_NAME:
            names.add(name)
        item = _read_object(element, number, name)
        if isinstance(item, VocObject):
            objects.append(item)
        else:
            refused.append(show(f"object {number} ({show(name, 80) or 'no name'}): {item}"))
    filename = _text(root, "filename").replace("\\", "/").rpartition("/")[2]
    return Annotation(filename, _size(root), tuple(objects), tuple(refused), tuple(sorted(names)))


class _BoundedBuilder(TreeBuilder):
    """Builds the tree of an XML and stops at a depth that no annotation has."""

    _depth = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> Element:
        """Open an element."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise AnnotationError(f"its elements are nested more than {_MAX_DEPTH} deep")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> Element:
        """Close an element."""
        self._depth -= 1
        return super().end(tag)


def _read_object(element: Element, number: int, name: str) -> VocObject | str:
    """Return the object, or why it cannot be used."""
    if not name:
        return "it has no <name>"
    if len(name) > MAX_NAME:
        return f"its <name> has {len(name)} characters, more than {MAX_NAME}"
    box = element.find("bndbox")
    if box is None:
        return "it has no <bndbox>"
    values = []
    for side in _SIDES:
        text = _text(box, side)
        try:
            values.append(float(text))
        except ValueError:
            return f"its <{side}> is {show(text, 80)!r}, not a number"
    if not all(math.isfinite(value) for value in values):
        return f"its box {_show(values)} is not finite"
    xmin, ymin, xmax, ymax = values
    if xmax <= xmin or ymax <= ymin:
        return f"its box {_show(values)} has no area (xmax <= xmin or ymax <= ymin)"
    difficult = _text(element, "difficult").lower() in ("1", "true", "yes")
    return VocObject(number, name, (xmin, ymin, xmax, ymax), difficult)


def _show(values: list[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _text(element: Element, tag: str) -> str:
    """Return the text of a direct child without surrounding space, or an empty string."""
    return (element.findtext(tag) or "").strip()


def _size(root: Element) -> tuple[int, int] | None:
    size = root.find("size")
    if size is None:
        return None
    try:
        return _shared(int(float(_text(size, "width"))), int(float(_text(size, "height"))))
    except (ValueError, OverflowError):
        return None


@lru_cache(maxsize=10_000)
def _shared(width: int, height: int) -> tuple[int, int]:
    """Return a size; pictures of one size have the same object, because there may be millions."""
    return width, height
