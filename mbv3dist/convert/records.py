"""What the converters hand to the packer, what they report, and what both check first."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from mbv3dist.convert.files import (
    show,
)
from mbv3dist.convert.pictures import shrunk_size
from mbv3dist.data.idx import PICTURE_EXTENSIONS

DEFAULT_SHARD_BYTES = 128 * 1024 * 1024
MAX_PATH = 5000
MAX_PROBLEMS = 1_000_000  # some 300 bytes each; more than that is no data set with a few bad files
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
        root: The root given; shared by its records, because there may be millions.
        source: The picture's path relative to it, behind ``prefix``.
        prefix: Empty, or ``ROOTNAME/`` with several roots.
        label: Class number for image folders, else -1.
        boxes: Annotated objects.
        declared_size: (width, height) that the annotation claims, if any.
    """

    root: str
    source: str
    prefix: str = ""
    label: int = -1
    boxes: tuple[Box, ...] = ()
    declared_size: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        """The picture's file."""
        return f"{self.root}{os.sep}{self.source[len(self.prefix) :]}"  # os.path.join takes 4 us


@dataclass(frozen=True, slots=True)
class Problem:
    """Bad input: the file (relative to the root given) and what is wrong with it."""

    file: str
    reason: str
    kind: str  # what is counted: bad_box, bad_picture, bad_annotation, missing_file, unknown_class

    def __post_init__(self) -> None:
        # Both may hold what somebody else has written, and end on a terminal and in a report.
        object.__setattr__(self, "file", show(self.file, MAX_PATH))
        object.__setattr__(self, "reason", show(self.reason))

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ConversionError(ValueError):
    """Bad input; the message names every problem on a line of its own, then the cure.

    Attributes:
        problems: All of them.
        report: Paths, or URLs, of the files that list them.
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
        max_side: Longer side in pixels that larger pictures are brought to, or None.
        format: ``jpeg``, or ``raw`` pixels.
    """

    task: str
    label_from: str
    resize: int | None
    quality: int
    max_side: int | None = None
    format: str = "jpeg"

    def final_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) that a picture of some size is stored with."""
        return shrunk_size(size, shorter=self.resize, longer=self.max_side)

    @property
    def extension(self) -> str:
        """Of the picture member."""
        return PICTURE_EXTENSIONS[self.format]

    def known(self) -> dict[str, Any]:
        """Return what decides about the result, by name.

        What is as it always was is left out: data sets made before there was a choice are the same.
        """
        values = asdict(self)
        for name in ("max_side", "format"):
            if values[name] == getattr(Settings, name):
                del values[name]
        return values


class ConvertOptions(TypedDict, total=False):
    """Keywords that all converters take; ``Options`` says what they mean and their defaults."""

    val_fraction: float
    seed: int
    resize: int | None
    max_side: int | None
    quality: int
    format: str
    on_error: str
    workers: int | None
    shard_bytes: int
    overwrite: bool
    progress: Callable[[int, int], None] | None
    part: tuple[int, int] | None
    work: str | Path | None
    keep_local: bool


@dataclass(frozen=True)
class Options:
    """What all converters can be told.

    Attributes:
        split: Name of the split to write.
        val_fraction: Share of the pictures that goes to a second split, ``val``; 0 for none.
        seed: Of the shuffle and of that cut.
        resize: Shorter side in pixels that larger pictures are brought to; None keeps sizes.
        max_side: Longer side in pixels that larger pictures are brought to; not with ``resize``.
        quality: JPEG quality of resized pictures.
        format: ``jpeg``, or ``raw`` to store pixels (``.npy`` members) instead of files.
        on_error: ``fail`` names all bad input and writes nothing; ``skip`` leaves it out.
        workers: Processes; None for one per core. The result does not depend on it. A script
            that asks for several needs the usual ``if __name__ == "__main__":``.
        shard_bytes: Size in bytes that a shard is kept near.
        overwrite: Replace finished splits of the same name. Without it, a split made from the
            same input and settings is kept; "same input" means the same files by name and size,
            their bytes are not read again.
        progress: Called with (done, total) as work goes on.
        part: (i, n): do the i-th, from 1, of n parts, which array jobs or ranks that see the same
            folders start each on its own, in any order. The last that ends publishes the split.
            With parts, ``overwrite`` keeps a split that was made from the same input and settings:
            a part cannot know that the others will be started again.
        work: With the URL of a data set: the local folder that it is made in before it is sent.
        keep_local: Keep that folder's data set after it was sent.
    """

    split: str
    val_fraction: float = 0.0
    seed: int = 0
    resize: int | None = None
    max_side: int | None = None
    quality: int = 90
    format: str = "jpeg"
    on_error: str = "fail"
    workers: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    overwrite: bool = False
    progress: Callable[[int, int], None] | None = None
    part: tuple[int, int] | None = None
    work: str | Path | None = None
    keep_local: bool = False

    def settings(self, task: str, label_from: str) -> Settings:
        """Return how pictures become samples of a task."""
        return Settings(task, label_from, self.resize, self.quality, self.max_side, self.format)

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
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(
                f"--max-side is {self.max_side}; use the longer side in pixels, 1 or more"
            )
        if self.resize is not None and self.max_side is not None:
            raise ValueError(
                "--resize brings down the shorter side and --max-side the longer one; give one of "
                "them"
            )
        if self.format not in PICTURE_EXTENSIONS:
            raise ValueError(f"--format is {self.format!r}; use 'jpeg' or 'raw'")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality is {self.quality}; use 1 to 100")
        if self.on_error not in ("fail", "skip"):
            raise ValueError(f"--on-error is {self.on_error!r}; use 'fail' or 'skip'")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; use 1 or more")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes is {self.shard_bytes}; use 1 or more")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"--part is {self.part[0]}/{self.part[1]}; use I/N with I from 1 to N")


@dataclass
class Job:
    """One split to write: its records in source order and what scanning found."""

    split: str
    records: list[Record]
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def complain(self, file: str, reason: str, kind: str) -> None:
        """Note a problem.

        Raises:
            ValueError: if there are so many that this must be something else than a data set.
        """
        if len(self.problems) == MAX_PROBLEMS:
            raise ValueError(
                f"more than {MAX_PROBLEMS} problems in the input of split {self.split!r}, the "
                f"first: {self.problems[0]}; check that this is the right folder"
            )
        self.problems.append(Problem(file, reason, kind))


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
        report: The report file, or its URL.
    """

    samples: int
    boxes: int
    shards: int
    bytes: int
    counts: dict[str, int]
    problems: tuple[Problem, ...]
    report: Path | str


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion made.

    Attributes:
        out: The data set's folder, or its URL.
        task: ``detection`` or ``classification``.
        classes: Class names, numbered from 0.
        splits: A ``SplitReport`` for each split written.
        reused: Whether everything was there already, made from the same input (files of the
            same names and sizes) and settings.
        waiting: Numbers of the parts that are not done yet; empty once the splits are published.
            Until then ``splits`` tells of this part alone.
    """

    out: Path | str
    task: str
    classes: tuple[str, ...]
    splits: dict[str, SplitReport]
    reused: bool
    waiting: tuple[int, ...] = ()


def parse_part(text: str) -> tuple[int, int]:
    """Return (i, n) of ``i/n``.

    Raises:
        ValueError: if it is something else; ``Options`` checks the range.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and len(text) < 20):
        raise ValueError(f"--part is {text!r}; use I/N, such as 3/8 for the third of eight parts")
    return int(number), int(count)
