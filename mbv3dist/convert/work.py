"""What one part of a conversion does for one split: prepare pictures, pack shards, leave a note.

All of it lies in the part's own folder: ``prepared/`` (see prepare.py), ``shards/`` with a
``NUMBER.done`` beside it for each whole shard, and at the end ``sources.tsv``, ``labels.npy``,
``num_labels.npy``, ``sizes.npy`` and ``part.json``, the note that says that the part is done.
Whole pieces are found again when a killed conversion is started with the same input and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.convert.order import PackOrder, Share, stretch
from mbv3dist.convert.prepare import Request, prepare_chunk
from mbv3dist.convert.records import Job, Options, Problem, Settings
from mbv3dist.convert.samples import CHUNK, Samples, npy_bytes, read_chunks
from mbv3dist.convert.workers import Workers
from mbv3dist.convert.writer import check_entries, cut_shards, done_file, pack_shard, write_file
from mbv3dist.data.idx import TARGET_EXTENSIONS, format_key

Progress = Callable[[int], None]


@dataclass(eq=False)
class Work:
    """A split's part on its way.

    Attributes:
        job: The split with all its records, also those of other parts.
        settings: How pictures become samples.
        options: Workers, shard size, ...
        classes: Names of the classes.
        common: All that decides about the result besides the records.
        order: The pack order of the whole split.
        workers: Who does it.
        share: What this part makes of it.
        folder: Where it works.
        sizes: int64 [m], bytes of the files of the share's records; -1 where there is none.
        samples: Once prepared.
        problems: What is wrong with the part's pictures; what listing found stands in the job.
        counts: What was done to its pictures.
    """

    job: Job
    settings: Settings
    options: Options
    classes: Sequence[str]
    common: list[Any]
    order: PackOrder
    workers: Workers
    share: Share = field(init=False)
    folder: Path = field(init=False)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    samples: Samples | None = None
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def enter(self, folder: Path) -> None:
        """Settle what this part does, and where."""
        self.share = self.order.share(*self.part)
        self.folder = folder

    @property
    def part(self) -> tuple[int, int]:
        """Number of the part, from 1, and how many there are."""
        return self.options.part or (1, 1)


def note_file(folder: Path) -> Path:
    """Return the file in a part's folder that says that the part is done."""
    return folder / "part.json"


def input_digest(common: list[Any], job: Job, sizes: np.ndarray) -> str:
    """Return the digest of all that goes into a split, which is published with it.

    Args:
        common: Settings, classes, names of the roots, seed and shard size.
        job: The split.
        sizes: int64 [num_records], bytes of the records' files; -1 where there is none.
    """
    digest = hashlib.sha256(_head(common, job, job.problems))
    for row in _rows(job, np.arange(len(job.records)), sizes):
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def rows_digest(job: Job, numbers: np.ndarray, sizes: np.ndarray) -> str:
    """Return the digest of some records and their files' sizes."""
    digest = hashlib.sha256()
    for row in _rows(job, numbers, sizes):
        digest.update(repr(row).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _head(common: list[Any], job: Job, problems: list[Problem]) -> bytes:
    text = json.dumps([*common, job.split], ensure_ascii=True).encode("ascii")
    return text + repr(sorted(map(str, problems))).encode("utf-8", "backslashreplace")


def _rows(job: Job, numbers: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[Any, ...]]:
    for number, size in zip(numbers.tolist(), sizes.tolist(), strict=True):
        record = job.records[number]
        yield record.source, record.label, record.boxes, record.declared_size, size


def file_sizes(job: Job, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sizes and times of change of some records' files, int64 [n] each; -1 for no file."""
    facts = np.full((2, len(numbers)), -1, np.int64)
    for place, number in enumerate(numbers.tolist()):
        try:
            status = os.stat(job.records[number].path)
        except OSError:
            continue
        facts[:, place] = status.st_size, status.st_mtime_ns
    return facts[0], facts[1]


def open_work(work: Work) -> bool:
    """Keep what is in the part's folder if it is of the same input and settings, else clear it.

    Returns:
        Whether the part is done already.
    """
    work.sizes, times = file_sizes(work.job, work.share.records)
    digest = hashlib.sha256(_head([*work.common, *work.part], work.job, []))
    digest.update(work.share.places.tobytes())
    rows = zip(_rows(work.job, work.share.records, work.sizes), times.tolist(), strict=True)
    for number, (row, time_ns) in zip(work.share.records.tolist(), rows, strict=True):
        path = work.job.records[number].path
        digest.update(repr((*row, path, time_ns)).encode("utf-8", "backslashreplace"))
    state, file = digest.hexdigest(), work.folder / "state"
    work.folder.mkdir(parents=True, exist_ok=True)
    if not file.is_file() or file.read_text() != state:
        for path in work.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        file.write_text(state)
    (work.folder / "prepared").mkdir(exist_ok=True)
    (work.folder / "shards").mkdir(exist_ok=True)
    return note_file(work.folder).is_file()


def own_problems(work: Work) -> list[Problem]:
    """Return this part's stretch of what listing found: each problem is named by one part."""
    return work.job.problems[stretch(len(work.job.problems), *work.part)]


def prepare(work: Work, tick: Progress) -> None:
    """Decode and check all pictures of the part; then its samples and problems are known."""
    folder, numbers = work.folder / "prepared", work.share.records
    starts, late = range(0, len(numbers), CHUNK), _late_pictures(work)
    missing = [n for n in range(len(starts)) if not _is_prepared(folder, n, late)]
    lengths = [len(numbers[starts[number] : starts[number] + CHUNK]) for number in missing]
    tick(len(numbers) - sum(lengths))
    calls = (
        (_requests(work, starts[number], late), work.settings, folder, number) for number in missing
    )
    for position, _ in work.workers.run_all(prepare_chunk, calls, len(missing)):
        tick(lengths[position])
    starts_of = work.order.starts
    work.samples, work.problems, work.counts = read_chunks(folder, work.share, starts_of)


def _late_pictures(work: Work) -> dict[int, str]:
    """Return what packing has found wrong, by the record's place in the share."""
    file = work.folder / "late.json"
    return {int(n): reason for n, reason in json.loads(file.read_bytes())} if file.is_file() else {}


def _is_prepared(folder: Path, number: int, late: dict[int, str]) -> bool:
    """Return whether a chunk has been prepared, knowing what packing found in it."""
    table = folder / f"{number:06d}.json"
    known = [n - number * CHUNK for n in sorted(late) if n // CHUNK == number]
    return table.is_file() and (not known or json.loads(table.read_bytes())["late"] == known)


def _requests(work: Work, first: int, late: dict[int, str]) -> list[Request]:
    """Return what to prepare in the chunk that begins with the share's record ``first``."""
    share, starts = work.share, work.order.starts
    numbers = share.records[first : first + CHUNK].tolist()
    if work.settings.label_from != "crops" or work.part[1] == 1:
        return [
            Request(work.job.records[number], late=late.get(place, ""))
            for place, number in enumerate(numbers, start=first)
        ]
    wanted = np.sort(share.places)
    requests = []
    for number, owned in zip(numbers, share.owned[first : first + CHUNK].tolist(), strict=True):
        low, high = np.searchsorted(wanted, starts[number : number + 2])
        places = frozenset((wanted[low:high] - starts[number]).tolist())
        requests.append(Request(work.job.records[number], places, owned))
    return requests


def pack(work: Work, tick: Progress) -> bool:
    """Write the shards that are not there yet, then all that publishing needs, then the note.

    Returns:
        Whether pictures turned out to be bad: then preparing and packing have to be done again.
    """
    assert work.samples is not None
    samples, table, records = work.samples, work.samples.table, work.job.records
    folder = work.folder / "shards"
    starts = cut_shards(table["picture_size"], table["target_size"], work.options.shard_bytes)
    rows = [_whole_shard(folder, number) for number in range(len(starts) - 1)]
    missing = [number for number, row in enumerate(rows) if row is None]
    extensions = work.settings.extension, TARGET_EXTENSIONS[work.settings.task]
    calls = (
        (
            samples.entries(starts[number], starts[number + 1], records),
            extensions,
            work.folder / "prepared",
            folder,
            number,
        )
        for number in missing
    )
    late: list[tuple[int, str]] = []
    for position, row in work.workers.run_all(pack_shard, calls, len(missing)):
        number = missing[position]
        rows[number] = row
        late += [(starts[number] + place, reason) for place, reason in row.get("late", ())]
        tick(starts[number + 1] - starts[number])
    for path in folder.glob("*.tmp"):
        path.unlink()  # of a worker that was killed
    if late:
        _note_late(work, late)
        return True
    tick(len(work.share.records))
    _finish(work, [row for row in rows if row is not None])
    return False


def check_rest(work: Work) -> bool:
    """Read the pictures that packing would read first; return whether some are bad (as `pack`)."""
    assert work.samples is not None
    samples, records = work.samples, work.job.records
    starts = range(0, len(samples), CHUNK)
    calls = ((samples.entries(start, start + CHUNK, records),) for start in starts)
    late: list[tuple[int, str]] = []
    for number, found in work.workers.run_all(check_entries, calls, len(starts)):
        late += [(starts[number] + place, reason) for place, reason in found]
    if late:
        _note_late(work, late)
    return bool(late)


def _note_late(work: Work, late: list[tuple[int, str]]) -> None:
    """Write down which pictures packing has found to be bad, so that they are prepared as such."""
    assert work.samples is not None
    for path in work.folder.glob("*.done"):
        path.unlink()  # first: without these samples, all shards are others
    known = _late_pictures(work)
    for sample, reason in late:
        record = work.samples.table["record"][sample]
        known[int(np.searchsorted(work.share.records, record))] = reason
    write_file(work.folder / "late.json", json.dumps(sorted(known.items())).encode("ascii"))


def _finish(work: Work, rows: list[dict[str, Any]]) -> None:
    assert work.samples is not None
    samples, table, records = work.samples, work.samples.table, work.job.records
    starts = work.order.starts if work.settings.label_from == "crops" else None
    lines = (
        f"{format_key(key)}\t{source}\n".encode()
        for key, source in enumerate(samples.sources(records, starts), start=samples.first)
    )
    write_file(work.folder / "sources.tsv", lines)
    write_file(work.folder / "labels.npy", npy_bytes(samples.labels))
    write_file(work.folder / "num_labels.npy", npy_bytes(table["num_labels"]))
    write_file(work.folder / "sizes.npy", npy_bytes(work.sizes))
    note = {
        "rows": rows_digest(work.job, work.share.records, work.sizes),
        "samples": len(samples),
        "boxes": int(table["num_boxes"].sum()),
        "counts": dict(work.counts),
        "problems": [asdict(problem) for problem in work.problems],
        "shards": rows,
    }
    write_file(note_file(work.folder), json.dumps(note).encode("ascii"))


def _whole_shard(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the row of a shard that an earlier, killed run has finished, or None."""
    tar, done = folder / f"{number:06d}.tar", done_file(folder, number)
    if not done.is_file() or not tar.is_file():
        return None
    row: dict[str, Any] = json.loads(done.read_bytes())
    return row if tar.stat().st_size == row["filesize"] else None
