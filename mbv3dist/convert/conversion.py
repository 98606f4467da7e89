"""All splits of one call of a converter: what its steps share."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist import __version__
from mbv3dist.convert.publish import all_counts, failure_path, raise_problems, write_report
from mbv3dist.convert.records import ConvertReport, Job, Options, Problem, SplitReport
from mbv3dist.convert.targets import Target, work_path
from mbv3dist.convert.work import Work, file_sizes, input_digest, note_file, own_problems
from mbv3dist.data.urls import redact


@dataclass(eq=False)
class Conversion:
    """All splits of one call, or this call's part of each.

    Attributes:
        target: Where the data set goes.
        works: The splits.
        options: What the user asked for.
        description: What every ``SPLIT.json`` says.
    """

    target: Target
    works: list[Work]
    options: Options
    description: dict[str, Any]

    @property
    def out(self) -> Path:
        """The folder that the data set is made in."""
        return self.target.folder

    @property
    def names(self) -> list[str]:
        """Names of the splits."""
        return [work.job.split for work in self.works]

    def digest_of(self, job: Job) -> str:
        """Return the digest of a split's input and settings."""
        sizes, _ = file_sizes(job, np.arange(len(job.records)))
        return input_digest(self.works[0].common, job, sizes)

    def folder(self, work: Work) -> Path:
        """Return the folder of work in progress on a split, that of all parts if there are."""
        return work_path(self.out, work.job.split, parts=self.options.part is not None)

    def report(
        self,
        splits: dict[str, SplitReport],
        *,
        reused: bool = False,
        waiting: Sequence[int] = (),
    ) -> ConvertReport:
        """Return what the caller is told."""
        classes = tuple(self.description["classes"])
        task = self.description["task"]
        out = self.out if self.target.url is None else redact(self.target.url)
        return ConvertReport(out, task, classes, splits, reused, tuple(waiting))


def plan_of(work: Work) -> dict[str, Any]:
    """Return what all parts of a split must have in common, with the name that a user knows."""
    digest = hashlib.sha256(work.order.starts.tobytes())
    for record in work.job.records:
        digest.update(f"{record.source}\0{record.label}\n".encode())
    return {
        "the version of mbv3dist": __version__,
        "the number of parts": work.part[1],
        "the task": work.settings.task,
        "the kind of label": work.settings.label_from,
        "the class list": list(work.classes),
        "the list of source folders": work.common[2],
        "--seed": work.options.seed,
        "--val-fraction": work.options.val_fraction,
        "--resize": work.settings.resize,
        "--max-side": work.settings.max_side,
        "--format": work.settings.format,
        "--quality": work.settings.quality,
        "the shard size": work.options.shard_bytes,
        "the number of pictures": len(work.job.records),
        "the list of pictures": digest.hexdigest()[:16],
    }


class Ticker:
    """Counts pictures prepared and packed for the caller's progress display."""

    def __init__(self, progress: Callable[[int, int], None] | None, num_records: int) -> None:
        self._progress = progress
        self._total = 2 * num_records
        self._done = 0

    def add(self, count: int) -> None:
        """Note that so many pictures were prepared, or packed."""
        self._done = min(self._done + count, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)


def by_file(problems: list[Problem]) -> list[Problem]:
    """Return problems sorted by file; those of one file stay in order."""
    return sorted(problems, key=lambda problem: problem.file)


def check_problems(
    conversion: Conversion,
    found: dict[str, tuple[list[Problem], Counter[str]]],
    part: tuple[int, int] | None,
) -> None:
    """Raise if there is bad input that must not be skipped, and report it beside the data set."""
    if conversion.options.on_error != "fail":
        return
    reports: dict[Path | str, list[Problem]] = {}
    for name, (problems, counts) in found.items():
        path = failure_path(conversion.out, name, part)
        if problems:
            write_report(path, name, "failed", problems, counts, 0, 0)
        else:
            path.unlink(missing_ok=True)
        reports[path] = problems
    raise_problems(reports)


def part_report(work: Work) -> SplitReport:
    """Return what a part that is done holds of a split."""
    note = json.loads(note_file(work.folder).read_bytes())
    problems = by_file(own_problems(work) + work.problems)
    return SplitReport(
        samples=note["samples"],
        boxes=note["boxes"],
        shards=len(note["shards"]),
        bytes=sum(row["filesize"] for row in note["shards"]),
        counts=all_counts(note["counts"], problems),
        problems=tuple(problems),
        report=note_file(work.folder),
    )
