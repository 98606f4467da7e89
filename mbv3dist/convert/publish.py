"""The visible files of a data set: splits that are there, reports, and the last step of a new one.

``SPLIT.json`` has wids-v1's shape with our keys added. Nothing written here holds a time stamp or
an absolute path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbv3dist import __version__
from mbv3dist.convert.files import show
from mbv3dist.convert.records import ConversionError, Job, Options, Problem, SplitReport
from mbv3dist.convert.writer import sync_folder, write_file
from mbv3dist.data.index import Split, list_splits, open_split
from mbv3dist.data.manifest import manifest_path, write_manifest


def find_finished(
    out: Path,
    jobs: Sequence[Job],
    digest_of: Callable[[Job], str],
    options: Options,
    *,
    keep_same: bool,
) -> dict[str, SplitReport] | None:
    """Return the reports if all splits are there from the same input and settings, else None.

    The same input means the same files by name and size: bytes are not compared. A split that has
    lost a file counts as not there.

    Args:
        out: Folder of the data set.
        jobs: The splits.
        digest_of: Returns the digest of a split's input and settings.
        options: Whether splits are to be replaced, and what to do about bad input.
        keep_same: Whether also a replacement keeps splits from the same input and settings.

    Raises:
        ValueError: if a split of that name was made from other input or settings.
        ConversionError: if it was made by skipping bad input that must not be skipped now.
    """
    if options.overwrite and not keep_same:
        return None
    existing = set(list_splits(out))
    reports = {}
    replace = "replace it with --overwrite or use another --split or --out"
    for job in jobs:
        name = job.split
        if name not in existing:
            continue
        split = open_split(out, name)
        if conversion_of(out, name) != digest_of(job):
            if options.overwrite:
                return None
            raise ValueError(
                f"split {name!r} exists in {str(out)!r}, made from other input or settings; "
                f"{replace}"
            )
        report = read_report(split)
        if report is None:
            raise ValueError(
                f"split {name!r} exists in {str(out)!r}, but its {report_path(out, name).name} is "
                f"missing or damaged; {replace}"
            )
        if is_whole(split):
            reports[name] = report
    if options.on_error == "fail":
        raise_problems({report.report: report.problems for report in reports.values()})
    # One of two splits may be missing after a kill.
    return reports if len(reports) == len(jobs) else None


def conversion_of(out: Path, split: str) -> str | None:
    """Return the digest of the input and settings that a finished split was made from."""
    description = json.loads((out / f"{split}.json").read_text(encoding="utf-8"))
    digest = description.get("conversion")
    return digest if isinstance(digest, str) else None


def is_whole(split: Split) -> bool:
    """Return whether all files of a split are there, the tars in their size."""
    for shard in split.shards:
        path = shard.path
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            return False
        if not all(path.with_suffix(suffix).is_file() for suffix in (".idx", ".crc")):
            return False
    try:
        split.labels()
    except ValueError:
        return False
    return (split.root / f"{split.name}.sources.tsv").is_file()


def raise_problems(problems: Mapping[Path | str, Sequence[Problem]]) -> None:
    """Raise one error for the problems of all splits, if there are any.

    Raises:
        ConversionError: naming the problems and, of the report files that are the keys (paths or
            URLs), those that list them.
    """
    found = [problem for items in problems.values() for problem in items]
    if found:
        raise ConversionError(found, ", ".join(str(path) for path, p in problems.items() if p))


def report_path(out: Path, split: str) -> Path:
    """Return where the report on a finished split lies."""
    return out / f"{split}.report.json"


def failure_path(out: Path, split: str, part: tuple[int, int] | None = None) -> Path:
    """Return where the report on a failed attempt lies; the next that succeeds removes it."""
    return out / (
        f"{split}.part{part[0]}of{part[1]}.failed.json" if part else f"{split}.failed.json"
    )


def write_report(
    path: Path,
    split: str,
    status: str,
    problems: Sequence[Problem],
    counts: Mapping[str, int],
    num_samples: int,
    num_boxes: int,
) -> None:
    """Write a report on a split: status, counts and every problem with file and reason."""
    value = {
        "split": split,
        "status": status,
        "samples": num_samples,
        "boxes": num_boxes,
        "counts": all_counts(counts, problems),
        "problems": [
            {"file": item.file, "reason": item.reason, "kind": item.kind} for item in problems
        ],
    }
    write_file(path, _dump(value))


def all_counts(counts: Mapping[str, int], problems: Sequence[Problem]) -> dict[str, int]:
    """Return what was done to pictures, then the problems by kind, each sorted by name."""
    return {**_sorted(counts), **_sorted(Counter(f"problems_{item.kind}" for item in problems))}


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def read_report(split: Split) -> SplitReport | None:
    """Return the report on a finished split, or None if it is missing or is none."""
    path = report_path(split.root, split.name)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    sizes = split.shard_bytes
    return parse_report(data, path, len(split), split.num_boxes, len(sizes), int(sizes.sum()))


def parse_report(
    data: bytes, path: Path | str, samples: int, boxes: int, shards: int, size: int
) -> SplitReport | None:
    """Return the report on a finished split from its file's bytes, or None if it is none."""
    try:
        value = json.loads(data)
        if value["status"] != "finished":
            return None
        problems = tuple(Problem(**item) for item in value["problems"])
        counts = {show(name): int(number) for name, number in value["counts"].items()}
        return SplitReport(samples, boxes, shards, size, counts, problems, path)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def publish(
    out: Path,
    split: str,
    *,
    shards: Path,
    rows: Sequence[dict[str, Any]],
    sources: Iterable[bytes],
    labels: bytes,
    num_samples: int,
    description: dict[str, Any],
    problems: Sequence[Problem],
    counts: Mapping[str, int],
) -> SplitReport:
    """Bring a packed split under its name.

    ``SPLIT.json`` goes first when a split is replaced and comes last: as long as it is missing,
    the split does not exist. A publication that was killed is cured by doing it again.

    Args:
        out: Folder of the data set.
        split: Name of the split.
        shards: Folder of the shards, which becomes ``OUT/SPLIT``; if it is missing, it has become
            that already.
        rows: What ``shardlist`` says of each shard, without its place.
        sources: Pieces of ``SPLIT.sources.tsv``.
        labels: ``SPLIT.labels.npy``.
        num_samples: Samples in the split.
        description: What ``SPLIT.json`` says besides.
        problems: For the report.
        counts: For the report.
    """
    final = out / f"{split}.json"
    if shards.is_dir():
        manifest_path(final).unlink(missing_ok=True)
        final.unlink(missing_ok=True)
        if (out / split).is_dir():
            shutil.rmtree(out / split)
        sync_folder(shards)
        os.replace(shards, out / split)
    write_file(out / f"{split}.sources.tsv", sources)
    write_file(out / f"{split}.labels.npy", labels)
    report = report_path(out, split)
    num_boxes = int(description["boxes"])
    write_report(report, split, "finished", problems, counts, num_samples, num_boxes)
    remove_leftovers(out, split)
    shardlist = [{"url": f"{split}/{number:06d}.tar", **row} for number, row in enumerate(rows)]
    value = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        **description,
        "mbv3dist_version": __version__,
        "shardlist": shardlist,
    }
    sync_folder(out)
    write_file(final, _dump(value))
    write_manifest(final)
    sync_folder(out)
    return SplitReport(
        samples=num_samples,
        boxes=num_boxes,
        shards=len(rows),
        bytes=sum(row["filesize"] for row in rows),
        counts=all_counts(counts, problems),
        problems=tuple(problems),
        report=report,
    )


def remove_leftovers(out: Path, split: str) -> None:
    """Remove what attempts that failed or were killed left beside a split."""
    failures = out.glob(f"{split}.part*of*.failed.json")
    for path in (failure_path(out, split), *failures, *out.glob(f".{split}.*.tmp")):
        path.unlink(missing_ok=True)


def _dump(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
