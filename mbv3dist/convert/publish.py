"""The visible files of a data set: splits that are there, reports, and the last step of a new one.

``SPLIT.json`` has wids-v1's shape with our keys added. Nothing written here holds a time stamp or
an absolute path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mbv3dist.convert.records import ConversionError, Options, Problem, SplitReport
from mbv3dist.convert.writer import sync_folder, write_file
from mbv3dist.data.index import Split, format_key, list_splits, open_split


def check_agreement(
    out: Path, names: Sequence[str], task: str, classes: Sequence[str], *, overwrite: bool
) -> None:
    """Check that new splits fit to the other splits of the data set.

    Raises:
        ValueError: naming the other task or the difference of the class lists.
    """
    for name in list_splits(out):
        if overwrite and name in names:
            continue
        split = open_split(out, name)
        if split.task != task:
            raise ValueError(
                f"{str(out)!r} holds split {name!r} for {split.task}, not {task}; use another "
                "--out or --task"
            )
        if split.classes != tuple(classes):
            raise ValueError(
                f"class list differs from split {name!r} in {str(out)!r}: "
                f"{_difference(split.classes, classes)}; give --classes FILE with its list "
                f"({', '.join(split.classes[:20])}{', ...' if len(split.classes) > 20 else ''}) "
                "or use another --out"
            )


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    missing = [name for name in old if name not in new]
    added = [name for name in new if name not in old]
    parts = []
    if missing:
        parts.append(f"{', '.join(missing[:10])} missing here")
    if added:
        parts.append(f"{', '.join(added[:10])} new here")
    if not parts:
        place = next(n for n, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        parts.append(f"another order, class {place} is {old[place]!r} there, {new[place]!r} here")
    return " and ".join(parts)


def find_finished(
    out: Path, names: Sequence[str], digests: Sequence[str], options: Options
) -> dict[str, SplitReport] | None:
    """Return the reports if all splits are there from the same input and settings, else None.

    Raises:
        ValueError: if a split of that name was made from other input or settings.
        ConversionError: if it was made by skipping bad input that must not be skipped now.
    """
    existing = set(list_splits(out))
    if options.overwrite:
        return None
    reports = {}
    for name, digest in zip(names, digests, strict=True):
        if name not in existing:
            continue
        description = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        report = _read_report(open_split(out, name))
        if description.get("conversion") != digest or report is None:
            raise ValueError(
                f"split {name!r} exists in {str(out)!r}, made from other input or settings; "
                "replace it with --overwrite or use another --split or --out"
            )
        if report.problems and options.on_error == "fail":
            raise ConversionError(report.problems, report.report.name)
        reports[name] = report
    # One of two splits may be missing after a kill: both are then made again, to the same bytes.
    return reports if len(reports) == len(names) else None


def report_path(out: Path, split: str) -> Path:
    """Return where the report on a split lies."""
    return out / f"{split}.report.json"


def write_report(
    out: Path,
    split: str,
    status: str,
    problems: Sequence[Problem],
    counts: Mapping[str, int],
    num_samples: int,
    num_boxes: int,
) -> None:
    """Write ``SPLIT.report.json``: status, counts and every problem with file and reason."""
    value = {
        "split": split,
        "status": status,
        "samples": num_samples,
        "boxes": num_boxes,
        "counts": {**_sorted(counts), **_problem_counts(problems)},
        "problems": [
            {"file": item.file, "reason": item.reason, "kind": item.kind} for item in problems
        ],
    }
    write_file(report_path(out, split), _dump(value))


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _problem_counts(problems: Sequence[Problem]) -> dict[str, int]:
    return _sorted(Counter(f"problems_{problem.kind}" for problem in problems))


def _read_report(split: Split) -> SplitReport | None:
    path = report_path(split.root, split.name)
    if not path.is_file():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    if value["status"] != "finished":
        return None
    return SplitReport(
        samples=len(split),
        boxes=split.num_boxes,
        shards=len(split.shards),
        bytes=sum(shard.num_bytes for shard in split.shards),
        counts=value["counts"],
        problems=tuple(Problem(**item) for item in value["problems"]),
        report=path,
    )


def publish(
    out: Path,
    split: str,
    *,
    part: Path,
    shards: Sequence[dict[str, Any]],
    sources: Sequence[str],
    description: dict[str, Any],
    problems: Sequence[Problem],
    counts: Mapping[str, int],
) -> SplitReport:
    """Bring a packed split under its name and remove the work folder.

    ``SPLIT.json`` goes first when a split is replaced and comes last: as long as it is missing,
    the split does not exist, and a conversion that was killed here goes on from the start.
    """
    final = out / f"{split}.json"
    final.unlink(missing_ok=True)
    if (out / split).is_dir():
        shutil.rmtree(out / split)
    sync_folder(part / "shards")
    os.replace(part / "shards", out / split)
    lines = [f"{format_key(index)}\t{source}\n" for index, source in enumerate(sources)]
    write_file(out / f"{split}.sources.tsv", "".join(lines).encode("utf-8"))
    num_boxes = int(description["boxes"])
    write_report(out, split, "finished", problems, counts, len(sources), num_boxes)
    shardlist = [{"url": f"{split}/{number:06d}.tar", **row} for number, row in enumerate(shards)]
    value = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        **description,
        "mbv3dist_version": metadata.version("mbv3dist"),
        "shardlist": shardlist,
    }
    sync_folder(out)
    write_file(final, _dump(value))
    sync_folder(out)
    shutil.rmtree(part)
    return SplitReport(
        samples=len(sources),
        boxes=num_boxes,
        shards=len(shards),
        bytes=sum(row["filesize"] for row in shards),
        counts={**_sorted(counts), **_problem_counts(problems)},
        problems=tuple(problems),
        report=report_path(out, split),
    )


def _dump(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
