"""The visible files of a data set: splits that are there, reports, and the last step of a new one.

``SPLIT.json`` has wids-v1's shape with our keys added. Nothing written here holds a time stamp or
an absolute path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mbv3dist.convert.records import ConversionError, Options, Problem, SplitReport
from mbv3dist.convert.writer import sync_folder, write_file
from mbv3dist.data.index import Split, describes_split, format_key, list_splits, open_split

# Shards, and what a killed worker left of one.
_OUR_FILE = re.compile(r"\d{6}\.(tar|idx|crc)|\.?\d{6}\.(tar|idx|crc)\.\d+\.tmp")


def part_path(out: Path, split: str) -> Path:
    """Return where work in progress on a split lies."""
    return out / f".{split}.part"


def check_targets(out: Path, roots: Sequence[Path], options: Options) -> None:
    """Check that no split would be written over the source folders or over others' files.

    Raises:
        ValueError: naming the folder or file that would be lost.
    """
    for name in ("val", options.split) if options.val_fraction else (options.split,):
        target = (out / name).resolve()
        for root in (root.resolve() for root in roots):
            if _is_within(root, target) or _is_within(target, root):
                raise ValueError(
                    f"split {name!r} would be written to {str(target)!r} and the source is "
                    f"{str(root)!r}: pictures would be lost; use another --split or --out"
                )
        if name not in (list_splits(out) if out.is_dir() else []):
            check_replaceable(out, name)


def _is_within(path: Path, folder: Path) -> bool:
    """Return whether a resolved path is a folder or lies in it, also if names differ in case."""
    if path.is_relative_to(folder):
        return True
    return folder.exists() and any(
        parent.exists() and parent.samefile(folder) for parent in (path, *path.parents)
    )


def check_replaceable(out: Path, split: str) -> None:
    """Check that a split's folder and ``SPLIT.json`` are ours, or not there.

    Raises:
        ValueError: naming what would be lost.
    """
    folder, description = out / split, out / f"{split}.json"
    if description.exists() and not describes_split(description):
        raise ValueError(
            f"{str(description)!r} exists and is no split of mbv3dist; use another --split or --out"
        )
    started = description.exists() or part_path(out, split).is_dir()
    foreign = _find_foreign(folder, started)
    if foreign:
        held = "" if foreign == folder.name else f" (it holds {foreign!r})"
        what = "would be replaced" if description.exists() else "exists and is no split of mbv3dist"
        raise ValueError(
            f"{str(folder)!r} {what}{held}; use another --split or --out, or move that away"
        )


def _find_foreign(folder: Path, started: bool) -> str:
    """Return the name of the folder or of something in it that convert did not make, or empty.

    Args:
        folder: Where a split will be written.
        started: Whether convert has worked on that split before.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return folder.name
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        if not _OUR_FILE.fullmatch(name) or (folder / name).is_dir():
            return name
        # Other tools number their tars too, but leave no checksums; a half removed split of ours
        # may lack some.
        checksums = f"{name.removesuffix('.tar')}.crc"
        if name.endswith(".tar") and checksums not in names and not started:
            return name
    return ""


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

    The same input means the same files by name and size: bytes are not compared. A split that has
    lost a file counts as not there.

    Raises:
        ValueError: if a split of that name was made from other input or settings.
        ConversionError: if it was made by skipping bad input that must not be skipped now.
    """
    existing = set(list_splits(out))
    if options.overwrite:
        return None
    reports = {}
    replace = "replace it with --overwrite or use another --split or --out"
    for name, digest in zip(names, digests, strict=True):
        if name not in existing:
            continue
        description = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        split = open_split(out, name)
        if description.get("conversion") != digest:
            raise ValueError(
                f"split {name!r} exists in {str(out)!r}, made from other input or settings; "
                f"{replace}"
            )
        report = _read_report(split)
        if report is None:
            raise ValueError(
                f"split {name!r} exists in {str(out)!r}, but its {report_path(out, name).name} is "
                f"missing or damaged; {replace}"
            )
        if _is_whole(split):
            reports[name] = report
    if options.on_error == "fail":
        raise_problems({report.report: report.problems for report in reports.values()})
    # One of two splits may be missing after a kill: both are then made again, to the same bytes.
    return reports if len(reports) == len(names) else None


def _is_whole(split: Split) -> bool:
    """Return whether all files of a split are there, the tars in their size."""
    for shard in split.shards:
        path = shard.path
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            return False
        if not all(path.with_suffix(suffix).is_file() for suffix in (".idx", ".crc")):
            return False
    return (split.root / f"{split.name}.sources.tsv").is_file()


def raise_problems(problems: Mapping[Path, Sequence[Problem]]) -> None:
    """Raise one error for the problems of all splits, if there are any.

    Raises:
        ConversionError: naming the problems and, of the report files that are the keys, those
            that list them.
    """
    found = [problem for items in problems.values() for problem in items]
    if found:
        raise ConversionError(found, ", ".join(path.name for path, p in problems.items() if p))


def report_path(out: Path, split: str) -> Path:
    """Return where the report on a finished split lies."""
    return out / f"{split}.report.json"


def failure_path(out: Path, split: str) -> Path:
    """Return where the report on a failed attempt lies; the next that succeeds removes it."""
    return out / f"{split}.failed.json"


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
        "counts": {**_sorted(counts), **_problem_counts(problems)},
        "problems": [
            {"file": item.file, "reason": item.reason, "kind": item.kind} for item in problems
        ],
    }
    write_file(path, _dump(value))


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _problem_counts(problems: Sequence[Problem]) -> dict[str, int]:
    return _sorted(Counter(f"problems_{problem.kind}" for problem in problems))


def _read_report(split: Split) -> SplitReport | None:
    """Return the report on a finished split, or None if it is missing or is none."""
    path = report_path(split.root, split.name)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["status"] != "finished":
            return None
        return SplitReport(
            samples=len(split),
            boxes=split.num_boxes,
            shards=len(split.shards),
            bytes=sum(shard.num_bytes for shard in split.shards),
            counts=dict(value["counts"]),
            problems=tuple(Problem(**item) for item in value["problems"]),
            report=path,
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


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
    report = report_path(out, split)
    write_report(report, split, "finished", problems, counts, len(sources), num_boxes)
    failure_path(out, split).unlink(missing_ok=True)
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
        report=report,
    )


def _dump(value: dict[str, Any]) -> bytes:
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace")
