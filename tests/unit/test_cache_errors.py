"""The bounded cache of remote shards: damage, full disks, bounds that are too small, waiting."""

import errno
import logging
import os
import random
import shutil
import threading
import time

import pytest
import servers
from cached import (
    NUM_SHARDS,
    SAMPLES,
    FolderRemote,
    as_remote,
    bytes_in,
    one_at_a_time,
    opened,
    shards_in,
    unit_bytes,
)

from mbv3dist.data import cache_room
from mbv3dist.data.cache import ShardCache
from mbv3dist.data.cache_folder import CacheFolder, CacheFolderError, Unit
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.needs import Need
from mbv3dist.data.remote import RemoteError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "set"
    return servers.write_data_set(root, num_shards=NUM_SHARDS, samples=SAMPLES, sample_bytes=300)


@pytest.fixture
def split(source, tmp_path):
    return as_remote(source, tmp_path / "cache")


@pytest.mark.parametrize("name", ["000002.tar", "000002.idx", "000002.crc"])
def test_damage_at_the_source_is_named_and_leaves_nothing(split, source, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    path = broken / "train" / name
    data = bytearray(path.read_bytes())
    kinds = {
        "flipped": bytes([*data[:700], data[700] ^ 1, *data[701:]]) if len(data) > 700 else None
    }
    kinds |= {"cut": bytes(data[: len(data) // 2]), "missing": None, "page": b"<html>busy</html>"}
    for kind, content in kinds.items():
        if kind == "flipped" and not name.endswith(".tar"):
            continue  # the reader's checks of the index find that
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        limit = unit_bytes(source, range(3))
        with opened(split, broken, tmp_path / "cache", limit_bytes=limit) as (cache, _):
            call = {".tar": cache._open_whole, ".idx": cache.idx_path, ".crc": cache.crc_path}
            with pytest.raises(DamagedShardError, match=name) as caught:
                call[path.suffix](2)
            assert "\n" not in str(caught.value)
            words = {"flipped": "SHA-256", "missing": "missing", "cut": "", "page": ""}[kind]
            assert words in str(caught.value)
            assert not list((tmp_path / "cache").rglob("*.partial"))
            assert cache._folder.used_bytes() == bytes_in(tmp_path / "cache")


def test_a_failure_while_fetching_ahead_is_met_by_who_needs_the_shard(split, source, tmp_path):
    options = {"needs": one_at_a_time(range(4)), "limit_bytes": unit_bytes(source, range(8))}
    with opened(split, source, tmp_path / "cache", **options) as (cache, remote):
        cache.open(0)

        def refuse(path):
            raise PermissionError("no")

        remote.before = refuse
        time.sleep(0.1)
        with pytest.raises(RemoteError, match=r"00000[0-9]\.tar: cannot read"):
            cache.open(9)
        remote.before = lambda path: None
        cache.open(9).close()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(split, source, tmp_path, monkeypatch):
    with opened(split, source, tmp_path / "cache", limit_bytes=10**9) as (cache, _):

        def full(file, offset, size):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CacheFolderError, match=r"the disk is full; .*--data\.cache_gb"):
            cache._open_whole(0)
        assert shards_in(tmp_path / "cache") == []
        assert cache._folder.used_bytes() == bytes_in(tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_file_system_without_fallocate_will_do(split, source, tmp_path, monkeypatch):
    def unknown(file, offset, size):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    with opened(split, source, tmp_path / "cache", limit_bytes=10**9) as (cache, _):
        cache._open_whole(0).close()
        assert shards_in(tmp_path / "cache") == [0]


def test_a_bound_that_cannot_hold_the_plan_is_refused_before_it_starts(split, source, tmp_path):
    needs = [Need(shard, 0, 9, SAMPLES) for shard in range(3)]
    needs += [Need(shard, 9, 20, SAMPLES) for shard in range(3, 6)]
    peak = int(split.shard_bytes[:6].sum()) + 96 * 6 * SAMPLES  # with what .idx and .crc may take
    assert peak >= unit_bytes(source, range(6))
    options = {"local_world_size": 2, "ahead": 0, "num_downloads": 0}
    options |= {"folder": tmp_path / "cache"}
    with pytest.raises(ValueError, match=r"--data\.cache_gb") as caught:
        ShardCache(split, needs=iter(needs), limit_bytes=2 * peak - 1, **options)
    message = str(caught.value)
    for words in (f"2 x {peak / 1e9:.3g} GB", f"{2 * peak / 1e9:.3g} GB", "--data.lanes"):
        assert words in message
    assert "\n" not in message
    for enough in ({"limit_bytes": 2 * peak}, {"limit_bytes": peak, "same_needs": 2}):
        ShardCache(split, needs=iter(needs), **enough, **options).close()


def test_caches_of_one_process_count_each_others_needs(split, source, tmp_path):
    folder = tmp_path / "cache"
    other = as_remote(source, folder, "http://example.invalid/other")
    needs = [Need(shard, 0, 9, SAMPLES) for shard in range(2)]
    size = int(split.shard_bytes[:2].sum()) + 2 * 96 * SAMPLES
    options = {"limit_bytes": 2 * size - 1, "ahead": 0, "num_downloads": 0}
    first = ShardCache(split, folder=folder, needs=iter(needs), **options)
    with pytest.raises(ValueError, match="cannot hold"):
        ShardCache(other, folder=folder, needs=iter(needs), **options)
    first.close()
    ShardCache(other, folder=folder, needs=iter(needs), **options).close()


def test_waiting_for_room_is_said_once_and_ends(split, source, tmp_path, caplog):
    folder = tmp_path / "cache"
    limit = unit_bytes(source, range(2)) + 100
    with (
        opened(split, source, folder, limit_bytes=limit) as (cache, _),
        opened(split, source, folder, limit_bytes=limit, wait_s=0.4) as (second, _),
        caplog.at_level(logging.WARNING, "mbv3dist"),
    ):
        held = [cache._open_whole(shard) for shard in (0, 1)]
        started = time.monotonic()
        with pytest.raises(CacheFolderError, match=r"no room for .* in use by this run and others"):
            second._open_whole(2)
        assert time.monotonic() - started < 5
        waiter = threading.Timer(0.2, held[0].close)
        waiter.start()
        second._open_whole(2).close()  # goes on as soon as somebody lets go
        waiter.join()
        assert held[1].read_at(0, 5) == (source / "train/000001.tar").read_bytes()[:5]
        said = [
            record for record in caplog.records if "process 0 of this node waits" in record.message
        ]
        assert len(said) == 1


def test_a_shard_larger_than_the_cache(split, source, tmp_path):
    cache = ShardCache(
        split, folder=tmp_path / "cache", limit_bytes=5000, remote=FolderRemote(source)
    )
    with pytest.raises(CacheFolderError, match=r"does not fit .*raise --data\.cache_gb"):
        cache._open_whole(0)
    cache.close()


def test_a_smaller_bound_than_before_is_kept(split, source, tmp_path):
    folder = tmp_path / "cache"
    with opened(split, source, folder, limit_bytes=10**9) as (cache, _):
        for shard in range(6):
            cache._open_whole(shard).close()
    limit = unit_bytes(source, range(2))
    with opened(split, source, folder, limit_bytes=limit):
        assert bytes_in(folder) <= limit
        assert len(shards_in(folder)) == 2


def test_ranking_prefers_what_another_run_left_long_ago(tmp_path, monkeypatch):
    """Shards of a run that is under way go only before what is needed this very step."""
    folder = CacheFolder(tmp_path, 1000)
    steps = {"now": 0.0, "soon": 3.0, "never": cache_room.NOT_NEEDED}
    room = cache_room.Room(
        folder, lambda unit: steps.get(unit.stem), lambda: 0, wait_s=1.0, local_rank=0
    )
    room.enter(0, 1)
    units = [Unit("fresh", 1, time.time()), Unit("old", 1, time.time() - 1e4)]
    units += [Unit("older", 1, time.time() - 1e5), *(Unit(name, 1, 0.0) for name in steps)]
    random.Random(1).shuffle(units)
    monkeypatch.setattr(folder, "units", lambda: units)
    room._rank()
    order = [stem for _, stem, _ in reversed(room._ranking)]
    assert order == ["older", "old", "never", "soon", "fresh", "now"]
    room.close()


def test_closing_ends_every_wait(split, source, tmp_path):
    folder = tmp_path / "cache"
    limit = unit_bytes(source, range(1)) + 100
    errors = []
    with opened(split, source, folder, limit_bytes=limit) as (cache, _):
        cache._open_whole(0)
        second = ShardCache(split, folder=folder, limit_bytes=limit, remote=FolderRemote(source))
        held = cache._open_whole(0)

        def wait():
            try:
                second._open_whole(1)
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
        second.close()
        thread.join(10)
        assert not thread.is_alive() and len(errors) == 1
        held.close()
