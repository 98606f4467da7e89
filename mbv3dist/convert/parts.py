"""How parts that were started each on its own become one split, without packing anything again.

``OUT/.SPLIT.parts`` holds ``plan.json`` (what all parts must agree on), ``done`` (a line for each
part that has ended) and a folder for each part. An undivided conversion is a single part, in
``OUT/.SPLIT.part``. Whoever finds all parts done merges them, alone, under the split's lock.
Each step of merging can be repeated, so one that was killed is cured by doing it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbv3dist.convert.files import show
from mbv3dist.convert.locks import locked
from mbv3dist.convert.publish import conversion_of, is_whole, publish, read_report
from mbv3dist.convert.records import Problem, SplitReport
from mbv3dist.convert.samples import npy_bytes, sample_labels
from mbv3dist.convert.targets import difference
from mbv3dist.convert.work import Work, input_digest, note_file, rows_digest
from mbv3dist.convert.writer import write_file
from mbv3dist.data.index import list_splits, open_split

_SUFFIXES = (".tar", ".idx", ".crc")
_PIECE_BYTES = 1 << 22


@dataclass(eq=False)
class Gathered:
    """What all parts of a split together hold, before its shards are moved.

    Attributes:
        work: The split, as one of its parts knows it.
        parts: The parts' folders, in order.
        notes: Their notes.
        digest: Of the whole input, to be published.
        problems: What is wrong with the input, all of it.
        counts: What was done to the pictures.
    """

    work: Work
    parts: list[Path]
    notes: list[dict[str, Any]]
    digest: str
    problems: list[Problem]
    counts: Counter[str]

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return sum(note["samples"] for note in self.notes)


def part_folder(folder: Path, number: int) -> Path:
    """Return the folder of a part in that of all parts."""
    return folder / f"{number:05d}"


def agree(folder: Path, plan: dict[str, Any], part: tuple[int, int]) -> None:
    """Settle the plan if this part is the first, else compare with what the others settled.

    Args:
        folder: ``OUT/.SPLIT.parts``, made if needed.
        plan: What all parts must have in common: a readable name and a value for each.
        part: Number and count.

    Raises:
        ValueError: naming what differs.
    """
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock", wait=True):
        if not (folder / "plan.json").is_file():
            write_file(folder / "plan.json", json.dumps(plan).encode("ascii"))
            return
        settled = json.loads((folder / "plan.json").read_bytes())
    for name, value in plan.items():
        there = settled.get(name)
        if there != value:
            how = f"{show(str(there), 80)} there, {show(str(value), 80)} here"
            if isinstance(value, list):
                how = difference(there, value)
            raise ValueError(
                f"part {part[0]}/{part[1]} does not fit to the parts started before: {name}: {how}"
                f"; start it like the others, or remove {folder} and start all parts anew"
            )


def is_planned(folder: Path, plan: dict[str, Any]) -> bool:
    """Return whether a folder of parts has this plan."""
    try:
        return bool(json.loads((folder / "plan.json").read_bytes()) == plan)
    except (OSError, ValueError):
        return False


def mark_done(folder: Path, part: tuple[int, int]) -> tuple[int, ...]:
    """Note that a part is done; return the numbers of those that are not.

    The list is a file that each part appends to under a lock, because on network file systems a
    new file may stay unseen for a while on other machines.
    """
    number, count = part
    with locked(folder / "lock", wait=True):
        with open(folder / "done", "a", encoding="ascii") as file:
            file.write(f"{number}\n")
            file.flush()
            os.fsync(file.fileno())
        done = {int(line) for line in (folder / "done").read_text(encoding="ascii").split()}
    return tuple(
        other
        for other in range(1, count + 1)
        if other not in done and not note_file(part_folder(folder, other)).is_file()
    )


def gather(work: Work, folders: Sequence[Path]) -> Gathered:
    """Read the notes of all parts of a split and check that they belong together.

    Args:
        work: The split, as listed now.
        folders: Folder of each part.

    Raises:
        ValueError: if a part was made from other input than is listed now.
    """
    count, job = len(folders), work.job
    notes = [json.loads(note_file(folder).read_bytes()) for folder in folders]
    sizes = np.full(len(job.records), -1, np.int64)
    known = np.zeros(len(job.records), np.bool_)
    problems = dict.fromkeys(job.problems)
    counts = Counter(job.counts)
    for number, (folder, note) in enumerate(zip(folders, notes, strict=True), start=1):
        records = work.order.share(number, count).records
        found = np.load(folder / "sizes.npy", allow_pickle=False)
        both = known[records]
        if (
            len(found) != len(records)
            or note["rows"] != rows_digest(job, records, found)
            or (sizes[records][both] != found[both]).any()
        ):
            raise ValueError(
                f"part {number}/{count} of split {job.split!r} was made from other pictures or "
                "annotations than there are now; start that part again"
            )
        sizes[records], known[records] = found, True
        problems.update(dict.fromkeys(Problem(**row) for row in note["problems"]))
        counts += Counter(note["counts"])
    return Gathered(
        work,
        list(folders),
        notes,
        input_digest(work.common, job, sizes),
        sorted(problems, key=lambda problem: problem.file),
        counts,
    )


def publish_gathered(
    out: Path, found: Gathered, folder: Path, description: dict[str, Any]
) -> SplitReport:
    """Move the shards of all parts together and publish the split.

    Args:
        out: Folder of the data set.
        found: What the parts hold.
        folder: Folder of the work in progress.
        description: What ``SPLIT.json`` says besides what is found.

    Raises:
        ValueError: if parts were made again since an earlier attempt that was killed.
    """
    name, merged = found.work.job.split, folder / "merged"
    rows = [row for note in found.notes for row in note["shards"]]
    _check_attempt(folder, found.notes)
    moved = _move_shards(out / name, found, merged)
    if moved and name in list_splits(out) and conversion_of(out, name) == found.digest:
        split = open_split(out, name)
        report = read_report(split)
        if report is not None and is_whole(split):
            return report  # killed after this split, before another one
    num_boxes = sum(note["boxes"] for note in found.notes)
    return publish(
        out,
        name,
        shards=merged,
        rows=_with_keys(rows),
        sources=_pieces([part / "sources.tsv" for part in found.parts]),
        labels=_labels(found),
        num_samples=found.num_samples,
        description={**description, "boxes": num_boxes, "conversion": found.digest},
        problems=found.problems,
        counts=found.counts,
    )


def _check_attempt(folder: Path, notes: list[dict[str, Any]]) -> None:
    """Make sure that an attempt at merging is only continued with the same shards."""
    digest = hashlib.sha256(json.dumps(notes).encode("ascii")).hexdigest()
    file = folder / "merging"
    if file.is_file() and file.read_text(encoding="ascii") != digest:
        raise ValueError(
            f"parts in {folder} were made again after their merging had begun; remove {folder} "
            "and start all parts anew"
        )
    write_file(file, digest.encode("ascii"))


def _move_shards(final: Path, found: Gathered, merged: Path) -> bool:
    """Gather the parts' shards in one folder; return whether that is in its final place already.

    Raises:
        ValueError: if a shard is lost.
    """
    shards = [
        (part / "shards", number, row)
        for part, note in zip(found.parts, found.notes, strict=True)
        for number, row in enumerate(note["shards"])
    ]
    moved = not merged.is_dir() and not any(
        (folder / f"{number:06d}.tar").is_file() for folder, number, _ in shards
    )
    target = final if moved else merged
    target.mkdir(exist_ok=True)
    for total, (folder, number, row) in enumerate(shards):
        for suffix in _SUFFIXES:
            source, goal = folder / f"{number:06d}{suffix}", target / f"{total:06d}{suffix}"
            if not moved and source.is_file():
                os.replace(source, goal)
            if not goal.is_file() or (suffix == ".tar" and goal.stat().st_size != row["filesize"]):
                raise ValueError(
                    f"shard {total} of split {final.name!r} is lost: neither {source} nor {goal} "
                    f"is there; remove {merged.parent} and convert again"
                )
    return moved


def _with_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with ``first_key`` only where samples left out before make it differ."""
    result, total = [], 0
    for row in rows:
        plain = {key: value for key, value in row.items() if key != "first_key"}
        result.append(row if row["first_key"] != total else plain)
        total += row["nsamples"]
    return result


def _labels(found: Gathered) -> bytes:
    """Return ``SPLIT.labels.npy``."""
    num_classes = len(found.work.classes)
    num_labels, labels = (
        np.concatenate([np.load(part / name, allow_pickle=False) for part in found.parts])
        for name in ("num_labels.npy", "labels.npy")
    )
    return npy_bytes(sample_labels(num_labels, labels, num_classes))


def _pieces(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                yield piece


def discard(folder: Path) -> None:
    """Remove a folder of work in progress; a kill leaves all of it, or nothing under its name."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.is_dir():
        os.replace(folder, old)
        shutil.rmtree(old)
