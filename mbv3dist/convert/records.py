"""What the converters hand to the packer, what they report, and what both check first."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

DEFAULT_SHARD_BYTES = 128 * 1024 * 1024
_CURE = "mend these files, or leave them out with --on-error skip"


@dataclass(frozen=True, slots=True)
class Box:
    """One annotated object: xyxy pixels, 0-based, half-open, in the annotation's frame."""

    corners: tuple[float, float, float, float]
    label: int
    difficult: bool
    number: int  # of the object in its XML, from 1


@dataclass(frozen=True, slots=True)
class Record:
    """One picture to convert.

    Attributes:
        path: The picture's file.
        source: Its path relative to the root given (``ROOTNAME/...`` with several roots).
        label: Class number for image folders, else -1.
        boxes: Annotated objects.
        declared_size: (width, height) that the annotation claims, if any.
    """

    path: str
    source: str
    label: int = -1
    boxes: tuple[Box, ...] = ()
    declared_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Bad input: the file (relative to the root given) and what is wrong with it."""

    file: str
    reason: str
    kind: str  # what is counted: bad_box, bad_picture, bad_annotation, missing_file, unknown_class

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ConversionError(ValueError):
    """Bad input; the message names every problem on a line of its own, then the cure.

    Attributes:
        problems: All of them.
        report: Names of the files in the data set's folder that list them.
    """

    def __init__(self, problems: Sequence[Problem], report: str) -> None:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = [f"{len(problems)} {noun} in the input, nothing converted (listed in {report}):"]
        lines += [f"  {problem}" for problem in problems]
        super().__init__("\n".join([*lines, _CURE]))
        self.problems = list(problems)
        self.report = report

    def __reduce__(self) -> tuple[type[ConversionError], tuple[list[Problem], str]]:
        return type(self), (self.problems, self.report)


@dataclass(frozen=True)
class Settings:
    """How pictures become samples.

    Attributes:
        task: ``detection`` or ``classification``.
        label_from: ``folder`` (the record's label), ``boxes`` (detection), ``largest`` object of
            the picture, or ``crops`` (each object a sample).
        resize: Shorter side in pixels that larger pictures are brought to, or None.
        quality: JPEG quality of resized pictures, 1 to 100.
    """

    task: str
    label_from: str
    resize: int | None
    quality: int


class ConvertOptions(TypedDict, total=False):
    """Keywords that all converters take; ``Options`` says what they mean and their defaults."""

    val_fraction: float
    seed: int
    resize: int | None
    quality: int
    on_error: str
    workers: int | None
    shard_bytes: int
    overwrite: bool
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Options:
    """What all converters can be told.

    Attributes:
        split: Name of the split to write.
        val_fraction: Share of the pictures that goes to a second split, ``val``; 0 for none.
        seed: Of the shuffle and of that cut.
        resize: Shorter side in pixels that larger pictures are brought to; None keeps sizes.
        quality: JPEG quality of resized pictures.
        on_error: ``fail`` names all bad input and writes nothing; ``skip`` leaves it out.
        workers: Processes; None for one per core. The result does not depend on it. A script
            that asks for several needs the usual ``if __name__ == "__main__":``.
        shard_bytes: Size in bytes that a shard is kept near.
        overwrite: Replace finished splits of the same name. Without it, a split made from the
            same input and settings is kept; "same input" means the same files by name and size,
            their bytes are not read again.
        progress: Called with (done, total) as work goes on.
    """

    split: str
    val_fraction: float = 0.0
    seed: int = 0
    resize: int | None = None
    quality: int = 90
    on_error: str = "fail"
    workers: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    overwrite: bool = False
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", self.split):
            raise ValueError(f"--split is {self.split!r}; use letters, digits, '-' and '_'")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(
                f"--val-fraction is {self.val_fraction}; use a number from 0 to below 1"
            )
        if self.val_fraction and self.split == "val":
            raise ValueError(
                "--val-fraction makes a split named 'val' and --split is 'val' too; name the "
                "other one, for example --split train"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; use a whole number from 0 to 2**63 - 1")
        if self.resize is not None and self.resize < 1:
            raise ValueError(
                f"--resize is {self.resize}; use the shorter side in pixels, 1 or more"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; use 1 to 100")
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"--on-error is {self.on_error!r}; use 'fail' or 'skip'")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; use 1 or more")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; use 1 or more")


@dataclass
class Job:
    """One split to write: its records in source order and what scanning found."""

    split: str
    records: list[Record]
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class SplitReport:
    """What became of one split.

    Attributes:
        samples: Number of samples.
        boxes: Number of boxes.
        shards: Number of tars.
        bytes: Size of the tars together.
        counts: What was done to pictures and boxes, by kind.
        problems: What was left out (only with ``on_error="skip"``).
        report: The report file.
    """

    samples: int
    boxes: int
    shards: int
    bytes: int
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    report: Path


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion made.

    Attributes:
        out: The data set's folder.
        task: ``detection`` or ``classification``.
        classes: Class names, numbered from 0.
        splits: A ``SplitReport`` for each split written.
        reused: Whether everything was there already, made from the same input (files of the
            same names and sizes) and settings.
    """

    out: Path
    task: str
    classes: tuple[str, ...]
    splits: dict[str, SplitReport]
    reused: bool


def read_class_file(path: str | Path) -> list[str]:
    """Read class names, one foreground name per line; blank lines at the end are ignored.

    Raises:
        ValueError: if the file is missing, empty, names a class twice or names a background.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(
            f"no class file {str(path)!r}; give a text file, one name a line"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"class file {str(path)!r} is not UTF-8 text; save it as UTF-8") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    return check_classes(names, f"class file {str(path)!r}")


def check_classes(names: Sequence[str], where: str) -> list[str]:
    """Return the class names as a list.

    Raises:
        ValueError: if there is none, one is empty or stands twice, or is a background class.
    """
    if not names:
        raise ValueError(f"{where} names no class; give at least one")
    for number, name in enumerate(names, start=1):
        if not name or name != name.strip() or "\n" in name or "\t" in name:
            raise ValueError(f"{where}: name {number} is {name!r}; one name a line, none empty")
        if name in ("BACKGROUND", "__background__"):
            raise ValueError(
                f"{where}: name {number} is {name!r}; list foreground classes only, take it out"
            )
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ValueError(f"{where} names {double[0]!r} twice; take one out")
    return list(names)


def check_folder(path: str | Path, out: str | Path) -> Path:
    """Return a source folder as a path.

    Raises:
        ValueError: if it is no folder, or the data set would be written inside it or over it.
    """
    folder, target = Path(path), Path(out).resolve()
    if not folder.is_dir():
        raise ValueError(f"no folder {str(path)!r} to convert; check the path")
    if target.exists() and not target.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file; name a folder")
    if target.is_relative_to(folder.resolve()):
        raise ValueError(
            f"--out {str(out)!r} lies inside the source {str(path)!r}; put it elsewhere"
        )
    return folder


def walk_files(folder: Path) -> Iterator[str]:
    """Yield all files under a folder, sorted, as relative paths with '/'.

    Hidden files and folders are left out; links are followed, except in circles.
    """
    yield from _walk(str(folder), "", (os.path.realpath(folder),))


def _walk(folder: str, prefix: str, parents: tuple[str, ...]) -> Iterator[str]:
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in parents:
                yield from _walk(entry.path, f"{prefix}{entry.name}/", (*parents, real))
        else:
            yield prefix + entry.name


def name_problem(source: str) -> str:
    """Return why a path cannot stand in a sources file, or an empty string."""
    if any(character in source for character in "\t\n\r"):
        return "its name holds a tab or a line break; rename it"
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    return ""
