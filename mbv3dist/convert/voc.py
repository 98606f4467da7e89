"""Converts Pascal VOC folders, and what labelImg leaves behind, to shards.

A root has ``Annotations/``, ``JPEGImages/`` and maybe ``ImageSets/Main/SPLIT.txt``; or XML and
pictures lie side by side in it. Without lists all annotated pictures make the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from mbv3dist.convert.files import check_folder
from mbv3dist.convert.order import cut_validation
from mbv3dist.convert.records import (
    Box,
    ConvertOptions,
    ConvertReport,
    Job,
    Options,
    Record,
)
from mbv3dist.convert.run import convert_jobs
from mbv3dist.convert.targets import check_targets, open_target
from mbv3dist.convert.voc_root import VocRoot, choose_ids, find_picture, open_root
from mbv3dist.convert.voc_xml import Annotation
from mbv3dist.data.class_names import check_classes, read_class_file


def convert_voc(
    roots: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    split: str,
    task: str = "detection",
    object_crops: bool = False,
    classes: Sequence[str] | None = None,
    **options: Unpack[ConvertOptions],
) -> ConvertReport:
    """Convert VOC folders to shuffled tar shards.

    Args:
        roots: One or several VOC folders, such as ``VOC2007`` and ``VOC2012``.
        out: Folder of the data set, made if needed, or its s3, gs or hf URL.
        split: Name of the split, that of ``ImageSets/Main/SPLIT.txt`` where there are such lists.
        task: ``detection``, or ``classification`` by the largest object of each picture.
        object_crops: For classification: each object, cut out, is a sample instead.
        classes: Class names in order; else ``labels.txt`` at a root, else the sorted names over
            all annotations of all roots.
        **options: ``val_fraction``, ``seed``, ``resize`` or ``max_side`` (boxes with
            their pictures), ``quality``, ``format``, ``on_error`` (``skip`` drops bad boxes and
            keeps their pictures), ``workers``, ``shard_bytes``, ``overwrite``, ``progress``,
            ``part``, ``work``, ``keep_local``: see ``Options``.

    Raises:
        ConversionError: naming every problem, with ``on_error="fail"``.
        ValueError: on wrong options, no such list, or a data set with other classes or task.
        OSError: if writing fails.
    """
    checked = Options(split=split, **options)
    if task not in ("detection", "classification"):
        raise ValueError(f"--task is {task!r}; use 'detection' or 'classification'")
    if object_crops and task != "classification":
        raise ValueError("object crops are for classification; add --task classification")
    target = open_target(out, checked)
    folders = _check_roots(roots, target.folder)
    check_targets(target.folder, folders, checked)
    names = _root_names(folders)
    prefixes = [f"{name}/" if len(folders) > 1 else "" for name in names]
    opened = [open_root(folder, prefix) for folder, prefix in zip(folders, prefixes, strict=True)]
    class_names = _class_list(opened, classes)
    jobs = cut_validation(_scan(opened, split, class_names), checked)
    del opened  # the annotations of all splits: the records hold what is needed of them
    label_from = "boxes" if task == "detection" else "crops" if object_crops else "largest"
    return convert_jobs(
        target,
        jobs,
        settings=checked.settings(task, label_from),
        classes=class_names,
        roots=names,
        options=checked,
    )


def _check_roots(roots: Sequence[str | Path] | str | Path, out: Path) -> list[Path]:
    given = [roots] if isinstance(roots, str | Path) else list(roots)
    if not given:
        raise ValueError("no VOC folder given; name one or several")
    folders = [check_folder(path, out) for path in given]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a VOC folder is given twice; name each once")
    return folders


def _root_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each root, its folder's, with a number where that is taken."""
    names: list[str] = []
    for folder in folders:
        base = folder.resolve().name
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def _class_list(roots: Sequence[VocRoot], classes: Sequence[str] | None) -> list[str]:
    """Return the classes: those given, else of labels.txt, else all names, sorted.

    Raises:
        ValueError: if there is none or two labels.txt differ.
    """
    if classes is not None:
        return check_classes(classes, "--classes")
    files = [root.folder / "labels.txt" for root in roots]
    lists = [read_class_file(path) for path in files if path.is_file()]
    if lists:
        if any(item != lists[0] for item in lists):
            raise ValueError("the roots' labels.txt differ; give one list with --classes FILE")
        return lists[0]
    found: set[str] = set()
    for root in roots:
        for item in root.annotations.values():
            if isinstance(item, Annotation):
                found.update(item.names)
    if not found:
        where = ", ".join(repr(str(root.folder)) for root in roots)
        raise ValueError(
            f"no annotation in {where} has an object, so the classes are unknown; give them with "
            "--classes FILE"
        )
    return check_classes(sorted(found), "the annotations")


def _scan(roots: Sequence[VocRoot], split: str, classes: Sequence[str]) -> Job:
    """Make the records of a split, in order of roots and ids."""
    numbers = {name: number for number, name in enumerate(classes)}
    job = Job(split, [])
    for root in roots:
        ids, num_repeated = choose_ids(root, split)
        job.counts["repeated_list_lines"] += num_repeated or 0
        job.counts += root.counts
        used: dict[str, str] = {}
        for key in ids:
            _add_record(job, root, key, numbers, used)
        if num_repeated is None:
            job.counts["pictures_without_annotation"] += sum(
                name not in used for name in root.picture_names
            )
    if not job.records and not job.problems:
        raise ValueError(
            f"split {split!r} lists no picture; check ImageSets/Main/{split}.txt or the folders"
        )
    return job


def _add_record(
    job: Job, root: VocRoot, key: str, numbers: dict[str, int], used: dict[str, str]
) -> None:
    """Add the record of one id, or the problem with it; `used` has each picture's XML so far."""
    annotation = root.annotations.get(key)
    file = root.prefix + root.annotation_name(key)
    if annotation is None:
        job.complain(file, "listed, but there is no such file", "missing_file")
        return
    if isinstance(annotation, str):
        job.complain(file, annotation, "bad_annotation")
        return
    for reason in annotation.refused:
        job.complain(file, reason, "bad_box")
    boxes = []
    for item in annotation.objects:
        if item.name not in numbers:
            reason = f"object {item.number}: class {item.name!r} is not in the class list"
            job.complain(file, reason, "unknown_class")
            continue
        boxes.append(Box(item.half_open, numbers[item.name], item.difficult, item.number))
    picture = find_picture(root, key, annotation.filename)
    if picture is None:
        reason = f"no picture of that name (<filename> is {annotation.filename!r})"
        job.complain(file, reason, "missing_file")
        return
    if picture in used:
        reason = f"<filename> names {root.prefix + picture}, the picture of {used[picture]} already"
        job.complain(file, reason, "missing_file")
        return
    used[picture] = file
    if Path(picture).name != annotation.filename:
        job.counts["filename_differs"] += 1
    job.records.append(
        Record(
            str(root.folder),
            root.prefix + picture,
            root.prefix,
            boxes=tuple(boxes),
            declared_size=annotation.size,
        )
    )
