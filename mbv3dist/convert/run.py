"""From records to finished splits: prepare, report, pack, publish.

A conversion is one part, or one of several that are started each on its own (see parts.py); what a
part does is in work.py. A split is published by renaming its folder of shards; ``SPLIT.json`` comes
last and makes it visible.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from mbv3dist.convert.conversion import (
    Conversion,
    Ticker,
    by_file,
    check_problems,
    part_report,
    plan_of,
)
from mbv3dist.convert.files import name_problem
from mbv3dist.convert.locks import locked
from mbv3dist.convert.order import PackOrder
from mbv3dist.convert.parts import (
    agree,
    discard,
    gather,
    is_planned,
    mark_done,
    part_folder,
    publish_gathered,
)
from mbv3dist.convert.publish import (
    failure_path,
    find_finished,
    remove_leftovers,
)
from mbv3dist.convert.records import (
    ConvertReport,
    Job,
    Options,
    Problem,
    Settings,
)
from mbv3dist.convert.targets import (
    Target,
    check_agreement,
    check_replaceable,
    lock_path,
)
from mbv3dist.convert.work import (
    Progress,
    Work,
    check_rest,
    note_file,
    open_work,
    own_problems,
    pack,
    prepare,
)
from mbv3dist.convert.workers import Workers
from mbv3dist.data.manifest import write_manifest

_MANY = 1000  # pictures: fewer may be done before other processes have started


def convert_jobs(
    target: Target,
    jobs: Sequence[Job],
    *,
    settings: Settings,
    classes: Sequence[str],
    roots: Sequence[str],
    options: Options,
) -> ConvertReport:
    """Write splits, or a part of each, into a data set's folder, and send them to its URL.

    Args:
        target: Where the data set goes.
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
    common = [settings.known(), list(classes), list(roots), options.seed, options.shard_bytes]
    works, workers = [], Workers(options.workers)
    for job in jobs:
        _set_aside_bad_names(job)
        order = PackOrder(job, settings, options.seed)
        works.append(Work(job, settings, options, classes, common, order, workers))
    description = {
        "task": settings.task,
        "classes": list(classes),
        "source": list(roots),
        "seed": options.seed,
        "format": settings.format,
    }
    conversion = Conversion(target, works, options, description)
    return _convert_locally(conversion) if target.url is None else _convert_to_url(conversion)


def _convert_to_url(conversion: Conversion) -> ConvertReport:
    """Make the splits in a local folder and send them, unless they are at the URL already."""
    from mbv3dist.convert.upload import find_published, look_up, remove_staged, stage, upload
    from mbv3dist.data.remote import Remote

    names, options, folder = conversion.names, conversion.options, conversion.out
    assert conversion.target.url is not None
    remote = Remote(conversion.target.url)
    task, classes = conversion.description["task"], conversion.description["classes"]
    there = look_up(remote, names, task, classes, overwrite=options.overwrite)
    jobs = [work.job for work in conversion.works]
    published = find_published(remote, there, jobs, conversion.digest_of, options)
    if published is not None:
        remove_staged(folder, names, options)
        return conversion.report(published, reused=True)
    stage(folder, names)
    report = _convert_locally(conversion)
    if report.waiting:
        return report
    return conversion.report(upload(remote, folder, report.splits, there, options))


def _convert_locally(conversion: Conversion) -> ConvertReport:
    """Make the splits in their folder."""
    conversion.out.mkdir(parents=True, exist_ok=True)
    overwrite, task = conversion.options.overwrite, conversion.description["task"]
    classes = conversion.description["classes"]
    check_agreement(conversion.out, conversion.names, task, classes, overwrite=overwrite)
    finished = _find_finished(conversion)
    if finished is not None:
        return finished
    whole = conversion.options.part is None
    return _convert_whole(conversion) if whole else _convert_part(conversion)


def _set_aside_bad_names(job: Job) -> None:
    """Make problems of records whose names cannot be written down."""
    reasons = [name_problem(record.source) for record in job.records]
    if any(reasons):
        for record, reason in zip(job.records, reasons, strict=True):
            if reason:
                job.complain(ascii(record.source), reason, "bad_picture")
        pairs = zip(job.records, reasons, strict=True)
        job.records = [record for record, reason in pairs if not reason]


def _find_finished(conversion: Conversion) -> ConvertReport | None:
    """Return the report if the splits are there already, made from the same input and settings."""
    options = conversion.options
    # A part cannot know that the others start anew; what waits to be sent is not made again.
    keep_same = options.part is not None or conversion.target.url is not None
    jobs = [work.job for work in conversion.works]
    found = find_finished(conversion.out, jobs, conversion.digest_of, options, keep_same=keep_same)
    if found is None:
        return None
    for work in conversion.works:
        _sweep(conversion, work)
    return conversion.report(found, reused=True)


def _sweep(conversion: Conversion, work: Work) -> None:
    """Remove what failures left of a split that is finished, and kills behind its last step."""
    name, folder = work.job.split, conversion.folder(work)
    failure_path(conversion.out, name).unlink(missing_ok=True)
    if (
        conversion.options.part is not None
        and folder.exists()
        and not is_planned(folder, plan_of(work))
    ):
        return  # other parts are making the split anew
    lock = lock_path(conversion.out, name)
    if lock.exists() or folder.exists() or folder.with_name(f"{folder.name}.old").exists():
        # Whoever holds the lock is another conversion, which cleans up itself.
        with suppress(ValueError), locked(lock):
            write_manifest(conversion.out / f"{name}.json")
            remove_leftovers(conversion.out, name)
            discard(folder)


@contextmanager
def _locked(conversion: Conversion, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the locks of all splits."""
    with ExitStack() as stack:
        for name in conversion.names:
            path = lock_path(conversion.out, name)
            stack.enter_context(locked(path, shared=shared, wait=wait))
        yield


def _convert_whole(conversion: Conversion) -> ConvertReport:
    with _locked(conversion):
        for name in conversion.names:
            check_replaceable(conversion.out, name)
        folders = [conversion.folder(work) for work in conversion.works]
        for work, folder in zip(conversion.works, folders, strict=True):
            work.enter(folder)
        try:
            _run(conversion)
            return _merge(conversion)
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) or _is_full(error):
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def _convert_part(conversion: Conversion) -> ConvertReport:
    """Do this part; merge all if it is the last."""
    part = conversion.options.part
    assert part is not None
    waiting: set[int] = set()
    with _locked(conversion, shared=True, wait=True), ExitStack() as own:
        finished = _find_finished(conversion)  # merged while this part waited for the lock
        if finished is not None:
            return finished
        for work in conversion.works:
            check_replaceable(conversion.out, work.job.split)
            folder = conversion.folder(work)
            agree(folder, plan_of(work), part)
            work.enter(part_folder(folder, part[0]))
            own.enter_context(locked(folder / f"{part[0]:05d}.lock"))
        try:
            _run(conversion)
        except OSError as error:
            if _is_full(error):
                for work in conversion.works:
                    shutil.rmtree(work.folder, ignore_errors=True)
            raise
        for work in conversion.works:
            waiting.update(mark_done(conversion.folder(work), part))
        done = {work.job.split: part_report(work) for work in conversion.works}
    if waiting:
        return conversion.report(done, waiting=sorted(waiting))
    # Alone now: parts that are started again at this moment wait.
    with _locked(conversion, wait=True):
        finished = _find_finished(conversion)
        if finished is not None:
            return finished
        for number in range(1, part[1] + 1):
            folders = [part_folder(conversion.folder(work), number) for work in conversion.works]
            if not all(note_file(folder).is_file() for folder in folders):
                waiting.add(number)
        if waiting:
            return conversion.report(done, waiting=sorted(waiting))
        return _merge(conversion)


def _is_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _run(conversion: Conversion) -> None:
    """Prepare all splits, stop if there is bad input, then pack them."""
    total = sum(len(work.share.records) for work in conversion.works)
    tick = Ticker(conversion.options.progress, total).add
    # They end before anybody cleans up what they are writing.
    with conversion.works[0].workers as workers:
        if total > _MANY:
            workers.warm_up()
        todo = [work for work in conversion.works if not _is_done(work, tick)]
        for work in todo:
            prepare(work, tick)
        if conversion.options.on_error == "fail" and any(map(_problems, conversion.works)):
            for work in todo:  # all of it is to be named
                if check_rest(work):
                    prepare(work, tick)
        while True:
            found = {work.job.split: (_problems(work), work.counts) for work in conversion.works}
            check_problems(conversion, found, conversion.options.part)
            todo = [work for work in todo if pack(work, tick)]
            if not todo:
                return
            for work in todo:
                prepare(work, tick)


def _problems(work: Work) -> list[Problem]:
    return by_file(own_problems(work) + work.problems)


def _is_done(work: Work, tick: Progress) -> bool:
    """Open the work on a split; return whether this part of it was done before."""
    if not open_work(work):
        return False
    note = json.loads(note_file(work.folder).read_bytes())
    work.problems = [Problem(**row) for row in note["problems"]]
    work.counts = Counter(note["counts"])
    tick(2 * len(work.share.records))
    return True


def _merge(conversion: Conversion) -> ConvertReport:
    """Publish all splits from parts that are done, and remove the work in progress."""
    gathered = []
    for work in conversion.works:
        folder, count = conversion.folder(work), work.part[1]
        folders = [folder]
        if conversion.options.part is not None:
            folders = [part_folder(folder, number) for number in range(1, count + 1)]
        gathered.append(gather(work, folders))
    found = {item.work.job.split: (item.problems, item.counts) for item in gathered}
    check_problems(conversion, found, None)
    for item in gathered:
        if not item.num_samples:
            raise ValueError(
                f"split {item.work.job.split!r} has no usable sample ({len(item.problems)} "
                "problems in the input); check the source folder"
            )
    splits = {}
    for item in gathered:
        folder = conversion.folder(item.work)
        name, described = item.work.job.split, conversion.description
        splits[name] = publish_gathered(conversion.out, item, folder, described)
    for item in gathered:
        discard(conversion.folder(item.work))
    return conversion.report(splits)
