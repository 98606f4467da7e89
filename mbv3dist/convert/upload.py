"""Sends a data set that was made in a local folder to its URL, so that it appears there at once.

Shards go first and ``SPLIT.json`` last: until then the split does not exist for a reader. What was
sent stands in ``.SPLIT.sent`` in the local folder, a line a file; an upload that was killed goes
on from there, and asks the server whether each file listed is there in its size. The local split is
removed then, if it was made to be sent, as ``.SPLIT.staged`` says.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbv3dist.convert.locks import locked
from mbv3dist.convert.publish import parse_report, raise_problems
from mbv3dist.convert.records import Job, Options, SplitReport
from mbv3dist.convert.targets import check_fit, lock_path
from mbv3dist.data.index import open_split

if TYPE_CHECKING:
    from mbv3dist.data.remote import Remote

_THREADS = 8
_SUFFIXES = (".tar", ".idx", ".crc")
# Of a split, besides its shards; the last one makes it visible.
_BESIDE = (".sources.tsv", ".labels.npy", ".report.json", ".manifest", ".json")
_REPORTS = (".report.json", ".failed.json")


@dataclass(frozen=True)
class Published:
    """A split that is at the URL: its name, and what its ``SPLIT.json`` says."""

    name: str
    description: dict[str, Any]


def look_up(
    remote: Remote, names: Sequence[str], task: str, classes: Sequence[str], *, overwrite: bool
) -> dict[str, Published]:
    """Return the splits that are at the URL, after checking that new ones fit to them.

    Args:
        remote: The URL.
        names: The splits that are to be written.
        task: Their task.
        classes: Their classes.
        overwrite: Whether splits of these names are to be replaced.

    Raises:
        ValueError: if they have another task or other classes, or a file is in the way.
        OSError: if the server cannot be asked.
    """
    found = {}
    try:
        files = remote.list()
    except FileNotFoundError:
        files = []
    for file in files:
        if not file.endswith(".json") or file.endswith(_REPORTS):
            continue
        name = file.removesuffix(".json")
        try:
            description = json.loads(remote.read(file))
            there = (str(description["task"]), [str(item) for item in description["classes"]])
            _ = description["wids_version"], description["shardlist"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if name in names:
                raise ValueError(
                    f"{remote.shown(file)} exists and is no split of mbv3dist; use another "
                    "--split or --out"
                ) from error
            continue  # somebody else's file
        found[name] = Published(name, description)
        if not (overwrite and name in names):
            check_fit(remote.shown(""), name, there, task, classes)
    return found


def find_published(
    remote: Remote,
    found: dict[str, Published],
    jobs: Sequence[Job],
    digest_of: Callable[[Job], str],
    options: Options,
) -> dict[str, SplitReport] | None:
    """Return the reports if all splits are at the URL, from the same input and settings, else None.

    Raises:
        ValueError: if one was made from other input or settings, and is not to be replaced.
        ConversionError: if one was made by skipping bad input that must not be skipped now.
    """
    reports = {}
    for job in jobs:
        if job.split not in found or (options.overwrite and options.part is None):
            continue
        description = found[job.split].description
        if description.get("conversion") != digest_of(job):
            if options.overwrite:
                return None
            raise ValueError(
                f"split {job.split!r} exists at {remote.shown('')}, made from other input "
                "or settings; replace it with --overwrite or use another --split or --out"
            )
        rows, path = description["shardlist"], f"{job.split}.report.json"
        samples = sum(row["nsamples"] for row in rows)
        size = sum(row["filesize"] for row in rows)
        with suppress(FileNotFoundError):
            data, place = remote.read(path), remote.shown(path)
            report = parse_report(data, place, samples, description["boxes"], len(rows), size)
            if report is not None:
                reports[job.split] = report
    if options.on_error == "fail":
        raise_problems(
            {remote.shown(f"{name}.report.json"): r.problems for name, r in reports.items()}
        )
    return reports if len(reports) == len(jobs) else None


def upload(
    remote: Remote,
    folder: Path,
    splits: dict[str, SplitReport],
    found: dict[str, Published],
    options: Options,
) -> dict[str, SplitReport]:
    """Send finished splits from the folder to the URL, then remove them from the folder.

    Args:
        remote: The URL.
        folder: Where the splits are.
        splits: The finished splits.
        found: What ``look_up`` has found at the URL.
        options: Whether the folder's data set is kept, and the progress to call.

    Returns:
        The reports, with their places at the URL.

    Raises:
        OSError: if the server refuses; started again, the upload goes on.
    """
    moved = {}
    for name, report in splits.items():
        with locked(lock_path(folder, name), wait=True):
            # Another part, started again, may have sent it while this one waited.
            if (folder / f"{name}.json").is_file():
                _upload_split(remote, folder, name, found.get(name), options.progress)
                _unstage(folder, name, options.keep_local)
        moved[name] = replace(report, report=remote.shown(f"{name}.report.json"))
    remove_staged(folder, list(splits), options)
    return moved


def stage(folder: Path, names: Sequence[str]) -> None:
    """Note which splits will be made in the folder only to be sent."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / f"{name}.json").exists():
            _staged(folder, name).touch()


def remove_staged(folder: Path, names: Sequence[str], options: Options) -> None:
    """Remove splits that are at the URL from the folder, as far as they were made to be sent."""
    for name in names:
        if _staged(folder, name).exists():
            with locked(lock_path(folder, name), wait=True):
                _unstage(folder, name, options.keep_local)
    if not options.keep_local:
        with suppress(OSError):
            folder.rmdir()  # unless something else is in it


def _staged(folder: Path, name: str) -> Path:
    return folder / f".{name}.staged"


def _unstage(folder: Path, name: str, keep_local: bool) -> None:
    (folder / f".{name}.sent").unlink(missing_ok=True)
    if _staged(folder, name).exists() and not keep_local:
        for suffix in reversed(_BESIDE):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)
        shutil.rmtree(folder / name, ignore_errors=True)
    _staged(folder, name).unlink(missing_ok=True)


def _upload_split(
    remote: Remote,
    folder: Path,
    name: str,
    old: Published | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    split = open_split(folder, name)
    shards = [shard.url.removesuffix(".tar") for shard in split.shards]
    files = [f"{shard}{suffix}" for shard in shards for suffix in _SUFFIXES]
    beside = [f"{name}{suffix}" for suffix in _BESIDE]
    beside = [path for path in beside if (folder / path).exists()]
    ledger = _Ledger(folder / f".{name}.sent", remote.url)
    final = beside.pop()
    assert final == f"{name}.json"
    if not ledger.has_begun:
        for path in (f"{name}.manifest", final):  # from here on the old split does not exist
            with suppress(FileNotFoundError):
                remote.delete(path)
        ledger.begin()
    total = len(files) + len(beside) + 1
    for done, _ in enumerate(_send_all(remote, folder, [*files, *beside], ledger), start=1):
        if progress is not None:
            progress(done, total)
    _send(remote, folder, final, ledger)
    if progress is not None:
        progress(total, total)
    for path in _stale_files(old, set(files)):
        with suppress(FileNotFoundError):
            remote.delete(path)


def _stale_files(old: Published | None, kept: set[str]) -> Iterator[str]:
    """Yield shards of a split that was replaced and had more of them."""
    if old is None:
        return
    for row in old.description["shardlist"]:
        url = str(row["url"])
        if url.startswith(f"{old.name}/") and ".." not in url:
            for suffix in _SUFFIXES:
                path = url.removesuffix(".tar") + suffix
                if path not in kept:
                    yield path


def _send_all(
    remote: Remote, folder: Path, files: Sequence[str], ledger: _Ledger
) -> Iterator[None]:
    # Each file is a commit of its own on a hub of repositories: one at a time there.
    threads = 1 if remote.url.startswith("hf:") else _THREADS
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(lambda path: _send(remote, folder, path, ledger), files)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _send(remote: Remote, folder: Path, path: str, ledger: _Ledger) -> None:
    """Send a file unless it is there, and make sure that it has arrived in its size."""
    source = folder / path
    size = source.stat().st_size
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if ledger.holds(path, digest):
        with suppress(FileNotFoundError):
            if remote.size(path) == size:
                return
    remote.upload(source, path)
    arrived = remote.size(path)
    if arrived not in (size, None):
        raise OSError(
            f"{remote.shown(path)}: {arrived} bytes arrived of {size}; start the conversion again "
            "to go on"
        )
    ledger.add(path, digest)


class _Ledger:
    """What was sent to a URL, a line a file: digest and path."""

    def __init__(self, file: Path, url: str) -> None:
        self._file = file
        self._head = f"{hashlib.sha256(url.encode()).hexdigest()} sent\n"
        self._sent: set[str] = set()
        self.has_begun = False
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            self.has_begun = lines[:1] == [self._head]
            if self.has_begun:
                self._sent = set(lines[1:])  # a line that a kill cut off stands for nothing

    def begin(self) -> None:
        """Forget what was sent elsewhere."""
        self._file.write_text(self._head, encoding="utf-8")
        self.has_begun = True

    def holds(self, path: str, digest: str) -> bool:
        """Return whether a file with these bytes was sent."""
        return f"{digest} {path}\n" in self._sent

    def add(self, path: str, digest: str) -> None:
        """Note that a file was sent."""
        with open(self._file, "a", encoding="utf-8") as file:  # one write: threads do not mix
            file.write(f"{digest} {path}\n")
