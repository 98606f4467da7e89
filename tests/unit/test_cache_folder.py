"""The cache's folder on the disk, and what the plan's needs ask of the cache."""

import errno
import multiprocessing
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cached import bytes_in
from hypothesis import given, settings
from hypothesis import strategies as st

from mbv3dist.data.cache_folder import CacheFolder, CacheFolderError, lock_partial, locked, pin
from mbv3dist.data.cache_needs import NeedWindow
from mbv3dist.data.needs import Need

DIGEST = "0123456789abcdef"


def make(folder, number, size, *, victims=()):
    """Makes a shard's file as `ShardFiles` does; False if there was no room."""
    path = folder.path / f"set-{DIGEST}" / f"{number:06d}.{DIGEST}.tar"
    file = lock_partial(path)
    assert file is not None
    with os.fdopen(file, "r+b"):
        if folder.reserve(size, list(victims), lambda: os.ftruncate(file, size)):
            folder.finish(path)
            return path
        folder.empty(file, path)
    return None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_sum_is_true_and_never_over_the_bound(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    limit = data.draw(st.integers(0, 2000))
    folder = CacheFolder(path, limit)
    pins = {}
    for number in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["make", "make", "pin", "unpin", "recount", "abandon"]))
        units = folder.units()
        if action == "make":
            size = data.draw(st.integers(0, 900))
            victims = data.draw(st.permutations(units))
            made = make(folder, number, size, victims=victims)
            kept = [unit for unit in folder.units() if unit.stem in pins]
            free = limit - sum(unit.num_bytes for unit in kept)
            assert (made is not None) == (size <= free), "all that nobody reads may go"
        elif action == "pin" and units:
            stem = data.draw(st.sampled_from(units)).stem
            if stem not in pins:
                pins[stem] = pin(Path(stem + ".tar"))
        elif action == "unpin" and pins:
            os.close(pins.pop(data.draw(st.sampled_from(sorted(pins)))))
        elif action == "abandon":
            leftover = lock_partial(path / f"set-{DIGEST}" / f"x{number}.{DIGEST}.tar")
            if folder.reserve(40, [], lambda file=leftover: os.ftruncate(file, 40)):
                assert folder.used_bytes() == bytes_in(path)
            os.close(leftover)  # as a kill leaves it
            folder.recount()
        elif action == "recount":
            folder = CacheFolder(path, limit)
        assert folder.used_bytes() == bytes_in(path) <= limit
        assert {stem for stem in pins if not Path(stem + ".tar").exists()} == set()
        assert not list(path.rglob("*.partial"))
    for file in pins.values():
        os.close(file)
    assert folder.pinned_bytes() == 0


def test_leftovers_of_the_dead_go_and_files_of_the_living_stay(tmp_path):
    folder = CacheFolder(tmp_path, 1000)
    living, dead = (tmp_path / f"set-{DIGEST}" / f"{n}.{DIGEST}.tar" for n in "ab")
    file = lock_partial(living)
    assert lock_partial(living) is None
    assert folder.reserve(300, [], lambda: os.ftruncate(file, 300))
    dead.with_name(dead.name + ".partial").write_bytes(bytes(200))
    beside = tmp_path / "mine.txt"
    beside.write_bytes(bytes(5000))  # not ours: neither counted nor touched
    folder = CacheFolder(tmp_path, 1000)
    assert folder.used_bytes() == 300
    assert [path.name for path in tmp_path.rglob("*.partial")] == [living.name + ".partial"]
    assert beside.exists()
    os.close(file)
    assert CacheFolder(tmp_path, 1000).used_bytes() == 0


def test_a_folder_emptied_meanwhile_is_counted_anew(tmp_path):
    folder = CacheFolder(tmp_path, 1000)
    assert make(folder, 0, 800)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert folder.used_bytes() == 0
    assert make(folder, 1, 900)


def test_a_reader_keeps_its_file_and_a_lost_race_is_noticed(tmp_path):
    folder = CacheFolder(tmp_path, 1000)
    path = make(folder, 0, 600)
    unit = folder.units()[0]
    file = pin(path)
    assert make(folder, 1, 600, victims=[unit]) is None
    assert folder.pinned_bytes() == 600
    os.close(file)
    assert make(folder, 1, 600, victims=[unit]) is not None
    assert pin(path) is None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EROFS, "read-only"),
        (errno.EACCES, "no permission"),
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.ENOLCK, "no file locks"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path, monkeypatch, code, words):
    folder = tmp_path / "cache"
    folder.mkdir()
    failing = "flock" if code == errno.ENOLCK else "open"

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(
            f"mbv3dist.data.cache_folder.{'fcntl' if failing == 'flock' else 'os'}.{failing}", fail
        )
        with pytest.raises(CacheFolderError, match=words) as caught:
            CacheFolder(folder, 1000)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.errno == code


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "cache").write_bytes(b"")
    for folder in (tmp_path / "cache", tmp_path / "cache" / "below"):
        with pytest.raises(CacheFolderError, match="a file is in its place"):
            CacheFolder(folder, 1000)


def _as_nobody(folder, queue):
    if os.getuid() == 0:
        os.setuid(65534)
    try:
        CacheFolder(folder, 1000)
        queue.put("no error")
    except OSError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_as_nobody, args=(tmp_path / "cache", queue))
    child.start()
    said = queue.get(timeout=30)
    child.join()
    tmp_path.chmod(0o700)
    assert "no permission to write; choose another one with --data.cache_dir" in said
    assert str(tmp_path / "cache") in said


def test_locks_hold_between_threads(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 80


@st.composite
def needs_of_lanes(draw):
    """Blocks of each lane one behind the other, as a plan gives them."""
    needs = []
    for _ in range(draw(st.integers(1, 3))):
        first = 0
        for _ in range(draw(st.integers(1, 5))):
            last = first + draw(st.integers(0, 6))
            shards = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
            needs += [Need(s, first, last, draw(st.integers(1, 40))) for s in shards]
            first = last + draw(st.integers(0, 1))
    return sorted(needs, key=lambda need: need.first_step)


@given(
    needs=needs_of_lanes(),
    ahead=st.integers(0, 4),
    least=st.integers(0, 3),
    room=st.integers(0, 2000),
    data=st.data(),
)
def test_the_window_follows_the_needs(needs, ahead, least, room, data):
    sizes = np.full(10, 40)
    shard_bytes = np.arange(10) * 7 + 100
    window = NeedWindow(
        iter(needs),
        shard_bytes=shard_bytes,
        shard_sizes=sizes,
        step=0,
        ahead=ahead,
        least_shards=least,
        room_bytes=room,
    )
    end = max(need.last_step for need in needs) + 2
    returned, step = [], 0
    while step <= end:
        live = {need.shard for need in needs if need.first_step <= step <= need.last_step}
        upcoming = window.upcoming()
        ranged = {shard for shard in live if window.is_ranged(shard)}
        assert live - ranged <= set(upcoming), "what is needed now comes, before all else"
        first = {
            s: min(n.first_step for n in needs if n.shard == s and n.last_step >= step)
            for s in upcoming
        }
        order = [max(first[s], step) for s in dict.fromkeys(upcoming)]
        assert order == sorted(order)
        later = [shard for shard in dict.fromkeys(upcoming) if shard not in live]
        wanted = sum(int(shard_bytes[shard]) for shard in {*upcoming})
        assert not later or wanted <= room, "looking ahead ends with this rank's share"
        for shard in live:
            assert window.distance(shard) == 0
        step += data.draw(st.integers(1, 3))
        gone = window.advance(step)
        returned += gone
        for shard in gone:
            assert not any(
                n.shard == shard and n.first_step <= step + ahead and n.last_step >= step
                for n in needs
            )
            assert any(n.shard == shard and n.last_step < step for n in needs)
    assert set(returned) == {need.shard for need in needs}
    assert window.upcoming() == []


@given(needs=needs_of_lanes(), ahead=st.integers(0, 3))
def test_the_peak_is_that_of_the_steps(needs, ahead):
    shard_bytes = np.arange(10) * 7 + 100
    window = NeedWindow(
        iter(needs),
        shard_bytes=shard_bytes,
        shard_sizes=np.full(10, 4),  # too small for ranges
        step=0,
        ahead=ahead,
        least_shards=1000,
        room_bytes=10**9,
    )
    peaks = [
        sum(
            int(shard_bytes[s])
            for s in {
                n.shard for n in needs if n.first_step <= step + ahead and n.last_step >= step
            }
        )
        for step in range(max(need.last_step for need in needs) + 1)
    ]
    assert window.peak_bytes() == max(peaks)
