"""Where a data set goes, and the checks before anything is written there."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbv3dist.convert.records import Options
from mbv3dist.data.index import describes_split, list_splits, open_split
from mbv3dist.data.urls import check_url, default_cache_dir, is_url, mirror_folder, to_local

# Shards, and what a killed worker left of one.
_OUR_FILE = re.compile(r"\d{6,}\.(tar|idx|crc)|\.?\d{6,}\.(tar|idx|crc)\.\d+\.tmp")


@dataclass(frozen=True)
class Target:
    """Where a data set goes.

    Attributes:
        folder: Where it is made.
        url: Where it is sent then, or None.
    """

    folder: Path
    url: str | None = None


def open_target(out: str | Path, options: Options) -> Target:
    """Return where a data set goes that is to be written to a folder or a URL.

    Raises:
        ValueError: for a URL that cannot be written, or options that do not fit.
    """
    text = str(out)
    if not is_url(text):
        if options.work is not None or options.keep_local:
            raise ValueError(
                f"--work and --keep-local are for an --out that is a URL, and {text!r} is a "
                "folder; leave them out"
            )
        return Target(Path(to_local(text)))
    url = check_url(text)
    if url.startswith("http"):
        raise ValueError(
            f"--out {url.partition(':')[0]} URLs can only be read; use an s3, gs or hf URL or a "
            "folder"
        )
    if options.part is not None and options.work is None:
        raise ValueError(
            "--part with an --out URL needs --work DIR, a folder that all parts see; the last "
            "one sends the data set from there"
        )
    work = options.work
    return Target(Path(work) if work else mirror_folder(url, default_cache_dir() / "convert"), url)


def work_path(out: Path, split: str, *, parts: bool) -> Path:
    """Return where work in progress on a split lies; in parts, each has a folder in there."""
    return out / (f".{split}.parts" if parts else f".{split}.part")


def lock_path(out: Path, split: str) -> Path:
    """Return the file that stands for the lock on a split."""
    return out / f".{split}.lock"


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
    started = description.exists() or any(
        work_path(out, split, parts=parts).is_dir() for parts in (False, True)
    )
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
        check_fit(str(out), name, (split.task, split.classes), task, classes)


def check_fit(
    out: str, name: str, there: tuple[str, Sequence[str]], task: str, classes: Sequence[str]
) -> None:
    """Check that a new split fits to one that is there, of some task and classes.

    Raises:
        ValueError: naming the difference.
    """
    old_task, old = there
    if old_task != task:
        raise ValueError(
            f"{out!r} holds split {name!r} for {old_task}, not {task}; use another --out or --task"
        )
    if tuple(old) != tuple(classes):
        raise ValueError(
            f"class list differs from split {name!r} in {out!r}: {difference(old, classes)}; give "
            f"--classes FILE with its list ({', '.join(old[:20])}"
            f"{', ...' if len(old) > 20 else ''}) or use another --out"
        )


def difference(old: Sequence[str], new: Sequence[str]) -> str:
    """Return in words how two different lists of names differ."""
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
