"""Converts a folder of class folders (``SRC/CLASS/.../picture.jpg``) to shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mbv3dist.convert.files import check_folder, walk_files
from mbv3dist.convert.order import cut_validation
from mbv3dist.convert.records import (
    ConvertOptions,
    ConvertReport,
    Job,
    Options,
    Record,
)
from mbv3dist.convert.run import convert_jobs
from mbv3dist.convert.targets import check_targets, open_target
from mbv3dist.data.class_names import check_classes, read_class_file
from mbv3dist.data.formats import is_picture

_SPLIT_FOLDERS = {"train", "val", "valid", "validation", "test", "trainval"}


def convert_imagefolder(
    src: str | Path,
    out: str | Path,
    *,
    split: str,
    classes: Sequence[str] | None = None,
    **options: Unpack[ConvertOptions],
) -> ConvertReport:
    """Convert class folders to shuffled tar shards.

    Args:
        src: Folder whose subfolders are the classes; pictures lie at any depth in them.
        out: Folder of the data set, made if needed, or its s3, gs or hf URL.
        split: Name of the split to write.
        classes: Class names in order; else ``labels.txt`` in ``src``, else the sorted folders.
        **options: ``val_fraction`` (of each class), ``seed``, ``resize``, ``max_side``,
            ``quality``, ``format``, ``on_error``, ``workers``, ``shard_bytes``, ``overwrite``,
            ``progress``, ``part``, ``work``, ``keep_local``: see ``Options``.

    Raises:
        ConversionError: naming every bad file, with ``on_error="fail"``.
        ValueError: on wrong options, no classes, or a data set with other classes or task.
        OSError: if writing fails.
    """
    checked = Options(split=split, **options)
    target = open_target(out, checked)
    root = check_folder(src, target.folder)
    check_targets(target.folder, [root], checked)
    folders = _class_folders(root)
    if classes is not None:
        names = check_classes(classes, "--classes")
    elif (root / "labels.txt").is_file():
        names = read_class_file(root / "labels.txt")
    else:
        names = check_classes(folders, f"{str(src)!r}")
    return convert_jobs(
        target,
        cut_validation(_scan(root, split, folders, names), checked),
        settings=checked.settings("classification", "folder"),
        classes=names,
        roots=[root.resolve().name],
        options=checked,
    )


def _class_folders(root: Path) -> list[str]:
    """Return the names of the class folders, sorted.

    Raises:
        ValueError: if there is none, or they look like splits.
    """
    names = sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(".") and path.name != "__MACOSX"
    )
    if not names:
        raise ValueError(
            f"{str(root)!r} has no class folders; put each class's pictures in a folder of its name"
        )
    if all(name.lower() in _SPLIT_FOLDERS for name in names):
        raise ValueError(
            f"the folders in {str(root)!r} are splits ({', '.join(names)}), not classes; convert "
            f"one at a time: {str(root / names[0])!r} with --split {names[0]}"
        )
    return names


def _scan(root: Path, split: str, folders: Sequence[str], classes: Sequence[str]) -> Job:
    """List the pictures of all class folders in sorted order."""
    numbers = {name: number for number, name in enumerate(classes)}
    job = Job(split, [], counts=Counter())
    for path in sorted(root.iterdir()):
        if is_picture(path) and path.is_file() and not path.name.startswith("."):
            reason = "lies beside the class folders, so it has no class"
            job.complain(path.name, reason, "unknown_class")
    real_root = os.path.realpath(root)
    for folder in folders:
        place = root / folder
        real = None if place.is_symlink() else os.path.join(real_root, folder)
        files = list(walk_files(place, job.counts, real=real, inside=real_root))
        pictures = [name for name in files if is_picture(name)]
        job.counts["ignored_files"] += len(files) - len(pictures)
        job.counts["empty_class_folders"] += not pictures
        if folder not in numbers:
            reason = f"folder {folder!r} is not in the class list ({len(pictures)} pictures)"
            job.complain(folder, reason, "unknown_class")
            continue
        for name in pictures:
            job.records.append(Record(str(root), f"{folder}/{name}", label=numbers[folder]))
    if not job.records and not job.problems:
        raise ValueError(
            f"no pictures in the class folders of {str(root)!r} ({', '.join(folders[:10])}); "
            "check the source folder"
        )
    return job
