"""From records to finished splits: prepare, report, shuffle, pack, publish.

Work in progress lies in ``OUT/.SPLIT.part``: ``prepared/`` (see prepare.py) and ``shards/``. Whole
pieces are found again when a killed conversion is started with the same input and settings. A
split is published by renaming its folder; ``SPLIT.json`` comes last and makes it visible.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.convert.prepare import prepare_chunk
from mbv3dist.convert.publish import (
    check_agreement,
    check_replaceable,
    failure_path,
    find_finished,
    part_path,
    publish,
    raise_problems,
    write_report,
)
from mbv3dist.convert.records import (
    ConvertReport,
    Job,
    Options,
    Problem,
    Settings,
    SplitReport,
    name_problem,
)
from mbv3dist.convert.workers import run_all
from mbv3dist.convert.writer import Entry, cut_shards, done_file, pack_shard
from mbv3dist.data.index import TARGET_EXTENSIONS

_CHUNK = 64  # records that a worker prepares at a time
_SHUFFLE_PURPOSE = 0x5061636B  # keeps these draws apart from all others of the same seed
_CUT_PURPOSE = 0x43757456


@dataclass
class _Prepared:
    """A split between its two halves: entries and sources in pack order."""

    job: Job
    part: Path
    digest: str
    entries: list[Entry]
    sources: list[str]
    problems: list[Problem]
    counts: Counter[str]
    num_boxes: int


def convert_jobs(
    out: Path,
    jobs: Sequence[Job],
    *,
    settings: Settings,
    classes: Sequence[str],
    roots: Sequence[str],
    options: Options,
) -> ConvertReport:
    """Write splits into a data set's folder.

    Args:
        out: Folder of the data set.
        jobs: The splits with their records.
        settings: How pictures become samples.
        classes: Class names, in order.
        roots: Names of the source folders, written to ``SPLIT.json``.
        options: Seed, workers, shard size, what to do about bad input, ...

    Raises:
        ConversionError: on bad input with ``on_error="fail"``.
        ValueError: if a split exists or the data set has another task or other classes.
        OSError: if reading or writing fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = [job.split for job in jobs]
    check_agreement(out, names, settings.task, classes, overwrite=options.overwrite)
    common = [asdict(settings), list(classes), list(roots), options.seed, options.shard_bytes]
    digests = [_digests(common, job) for job in jobs]
    finished = find_finished(out, names, [pair[0] for pair in digests], options)
    if finished is not None:
        for name in names:
            failure_path(out, name).unlink(missing_ok=True)
        return ConvertReport(out, settings.task, tuple(classes), finished, reused=True)
    for name in names:
        check_replaceable(out, name)
    parts = [part_path(out, name) for name in names]
    description = {
        "task": settings.task,
        "classes": list(classes),
        "source": list(roots),
        "seed": options.seed,
    }
    with _locked(parts):
        try:
            splits = _convert(out, jobs, parts, digests, settings, options, description)
        except (ValueError, OSError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or isinstance(error, ValueError):
                for part in parts:
                    shutil.rmtree(part, ignore_errors=True)
            raise
    return ConvertReport(out, settings.task, tuple(classes), splits, reused=False)


def _convert(
    out: Path,
    jobs: Sequence[Job],
    parts: Sequence[Path],
    digests: Sequence[tuple[str, str]],
    settings: Settings,
    options: Options,
    description: dict[str, Any],
) -> dict[str, SplitReport]:
    """Prepare all splits, stop if there is bad input, then pack and publish them."""
    ticker = _Ticker(options.progress, sum(len(job.records) for job in jobs))
    prepared = []
    for job, part, (digest, state) in zip(jobs, parts, digests, strict=True):
        _open_part(part, state)
        prepared.append(_prepare(job, part, digest, settings, options, ticker))
    _check_problems(out, prepared, options.on_error)
    rows = [_pack(item, settings, options, ticker) for item in prepared]
    return {
        item.job.split: publish(
            out,
            item.job.split,
            part=item.part,
            shards=shards,
            sources=item.sources,
            description={**description, "boxes": item.num_boxes, "conversion": item.digest},
            problems=item.problems,
            counts=item.counts,
        )
        for item, shards in zip(prepared, rows, strict=True)
    }


def cut_validation(job: Job, options: Options) -> list[Job]:
    """Return the job alone, or with its ``val`` split cut from it.

    The cut is made by class where records have one, else at random; both sides keep the order of
    the records. A class of two or more has samples on both sides.

    Raises:
        ValueError: if that leaves nothing for ``val``.
    """
    if not options.val_fraction:
        return [job]
    records = job.records
    labels = np.array([record.label for record in records], dtype=np.int64)
    chosen = np.zeros(len(records), dtype=np.bool_)
    words = random_words(len(records), options.seed, _CUT_PURPOSE)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = int(len(members) * options.val_fraction + 0.5)
        count = min(max(count, 1), len(members) - 1)
        chosen[members[np.argsort(words[members], kind="stable")[:count]]] = True
    # With bad input in the source, that is what is said, later.
    if records and not chosen.any() and not job.problems:
        raise ValueError(
            f"--val-fraction {options.val_fraction:g} leaves none of {len(records)} pictures for "
            "'val': a class needs two to give one; add pictures or leave --val-fraction out"
        )
    validation = [record for record, val in zip(records, chosen, strict=True) if val]
    job.records = [record for record, val in zip(records, chosen, strict=True) if not val]
    return [job, Job("val", validation)]


def random_words(count: int, seed: int, purpose: int) -> np.ndarray:
    """Return uint64 [count] that are the same on every platform and NumPy release."""
    return np.random.Philox(key=[seed, purpose]).random_raw(count)


class _Ticker:
    """Counts pictures prepared and packed for the caller's progress display."""

    def __init__(self, progress: Callable[[int, int], None] | None, num_records: int) -> None:
        self._progress = progress
        self._total = 2 * num_records
        self._done = 0

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _digests(common: list[Any], job: Job) -> tuple[str, str]:
    """Return digests of what goes in: one to publish, one that also knows paths and times."""
    public, private = hashlib.sha256(), hashlib.sha256()
    for digest in (public, private):
        digest.update(json.dumps([*common, job.split], ensure_ascii=True).encode("ascii"))
        digest.update(repr(sorted(map(str, job.problems))).encode("utf-8", "backslashreplace"))
    for record in job.records:
        try:
            status = os.stat(record.path)
            size, time_ns = status.st_size, status.st_mtime_ns
        except OSError:
            size = time_ns = -1
        row = (record.source, record.label, record.boxes, record.declared_size, size)
        public.update(repr(row).encode("utf-8", "backslashreplace"))
        private.update(repr((*row, record.path, time_ns)).encode("utf-8", "backslashreplace"))
    return public.hexdigest(), private.hexdigest()


@contextmanager
def _locked(parts: Sequence[Path]) -> Iterator[None]:
    """Hold the folders of work in progress, so that two conversions never mix."""
    handles = []
    try:
        for part in parts:
            part.mkdir(exist_ok=True)
            if os.name == "posix":
                import fcntl

                handles.append(os.open(part, os.O_RDONLY))
                try:
                    fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(
                        f"another conversion is writing to {part}; wait until it ends"
                    ) from error
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _open_part(part: Path, state: str) -> None:
    """Keep the work in progress if it is of the same input and settings, else clear it."""
    file = part / "state"
    if not file.is_file() or file.read_text() != state:
        for path in part.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file.write_text(state)
    (part / "prepared").mkdir(exist_ok=True)
    (part / "shards").mkdir(exist_ok=True)


def _prepare(
    job: Job,
    part: Path,
    digest: str,
    settings: Settings,
    options: Options,
    ticker: _Ticker,
) -> _Prepared:
    """Decode and check all pictures of a split, then shuffle."""
    folder = part / "prepared"
    records, named_wrong = [], []
    for record in job.records:
        reason = name_problem(record.source)
        if reason:
            named_wrong.append(Problem(ascii(record.source), reason, "bad_picture"))
        else:
            records.append(record)
    chunks = [records[start : start + _CHUNK] for start in range(0, len(records), _CHUNK)]
    missing = [n for n in range(len(chunks)) if not (folder / f"{n:06d}.json").is_file()]
    calls = [(chunks[number], settings, folder, number) for number in missing]
    ticker.add(len(job.records) - sum(len(call[0]) for call in calls))
    for position, _ in run_all(prepare_chunk, calls, workers=options.workers):
        ticker.add(len(calls[position][0]))

    entries: list[Entry] = []
    sources: list[str] = []
    problems = [*job.problems, *named_wrong]
    counts = Counter(job.counts)
    num_boxes = 0
    for number in range(len(chunks)):
        result = json.loads((folder / f"{number:06d}.json").read_bytes())
        for source, path, picture_offset, picture_size, target_offset, target_size, boxes in result[
            "samples"
        ]:
            entries.append(
                Entry(number, path, picture_offset, picture_size, target_offset, target_size)
            )
            sources.append(source)
            num_boxes += boxes
        problems += [Problem(*row) for row in result["problems"]]
        counts += Counter(result["counts"])
    order = np.argsort(random_words(len(entries), options.seed, _SHUFFLE_PURPOSE), kind="stable")
    return _Prepared(
        job=job,
        part=part,
        digest=digest,
        entries=[entries[number] for number in order],
        sources=[sources[number] for number in order],
        problems=sorted(problems, key=lambda problem: problem.file),
        counts=counts,
        num_boxes=num_boxes,
    )


def _check_problems(out: Path, prepared: Sequence[_Prepared], on_error: str) -> None:
    """Raise if there is bad input that must not be skipped, or a split would be empty."""
    reports = {failure_path(out, item.job.split): item.problems for item in prepared}
    if on_error == "fail":
        for item, path in zip(prepared, reports, strict=True):
            if item.problems:
                write_report(path, item.job.split, "failed", item.problems, item.counts, 0, 0)
            else:
                path.unlink(missing_ok=True)
        raise_problems(reports)
    for item in prepared:
        if not item.entries:
            raise ValueError(
                f"split {item.job.split!r} has no usable sample ({len(item.problems)} problems in "
                "the input); check the source folder"
            )


def _pack(
    item: _Prepared,
    settings: Settings,
    options: Options,
    ticker: _Ticker,
) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; return a row for each."""
    folder = item.part / "shards"
    starts = cut_shards(item.entries, options.shard_bytes)
    rows: list[dict[str, Any] | None] = [
        _whole_shard(folder, number) for number in range(len(starts) - 1)
    ]
    missing = [number for number, row in enumerate(rows) if row is None]
    extension = TARGET_EXTENSIONS[settings.task]
    calls = [
        (
            item.entries[starts[number] : starts[number + 1]],
            starts[number],
            extension,
            item.part / "prepared",
            folder,
            number,
        )
        for number in missing
    ]
    for position, row in run_all(pack_shard, calls, workers=options.workers):
        rows[missing[position]] = row
        ticker.add(len(calls[position][0]))
    for path in folder.glob("*.tmp"):
        path.unlink()  # of a worker that was killed
    ticker.add(len(item.job.records))
    return [row for row in rows if row is not None]


def _whole_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the row of a shard that an earlier, killed run has finished, or None."""
    tar, done = folder / f"{number:06d}.tar", done_file(folder, number)
    if not done.is_file() or not tar.is_file():
        return None
    row: dict[str, Any] = json.loads(done.read_bytes())
    return row if tar.stat().st_size == row["filesize"] else None
