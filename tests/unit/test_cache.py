"""The bounded cache of remote shards: what comes, stays and goes. Without a network."""

import os
import random
import subprocess
import sys
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

from mbv3dist.data.cache import ShardCache, on_demand_cache
from mbv3dist.data.needs import Need
from mbv3dist.data.reader import Reader
from mbv3dist.data.remote import mirror_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "set"
    return servers.write_data_set(root, num_shards=NUM_SHARDS, samples=SAMPLES, sample_bytes=300)


@pytest.fixture
def split(source, tmp_path):
    return as_remote(source, tmp_path / "cache")


def test_bytes_are_those_of_the_source_and_come_once(split, source, tmp_path):
    limit = unit_bytes(source, range(NUM_SHARDS))
    with opened(split, source, tmp_path / "cache", limit_bytes=limit) as (cache, remote):
        for _ in range(2):
            for shard in range(NUM_SHARDS):
                local = source / "train" / f"{shard:06d}.tar"
                whole = cache._open_whole(shard)
                assert whole.num_bytes == local.stat().st_size
                assert whole.read_at(0, 10**6) == local.read_bytes()
                assert whole.read_at(whole.num_bytes - 5, 10) == local.read_bytes()[-5:]
                assert cache.idx_path(shard).read_bytes() == local.with_suffix(".idx").read_bytes()
                assert cache.crc_path(shard).read_bytes() == local.with_suffix(".crc").read_bytes()
                whole.close()
        assert set(remote.asked.values()) == {1}
        stats = cache.stats
        assert stats.shards_downloaded == NUM_SHARDS and stats.requests == 3 * NUM_SHARDS
        assert stats.peak_bytes == bytes_in(tmp_path / "cache") == limit
        assert stats.bytes_downloaded == limit and stats.evicted == 0


def test_a_plan_in_a_tight_cache_is_read_in_order_and_within_the_bound(split, source, tmp_path):
    order = random.Random(3).sample(range(NUM_SHARDS), NUM_SHARDS) * 2
    limit = unit_bytes(source, range(3))
    options = {"limit_bytes": limit, "needs": one_at_a_time(order), "ahead": 1, "num_downloads": 2}
    with opened(split, source, tmp_path / "cache", **options) as (cache, remote):
        for step, shard in enumerate(order):
            held = cache.open(shard)
            local = source / "train" / f"{shard:06d}.tar"
            assert held.read_at(0, 10**6) == local.read_bytes()
            assert bytes_in(tmp_path / "cache") <= limit
            for gone in cache.advance(step + 1):
                assert gone == shard
                held.close()
        assert cache.stats.peak_bytes <= limit
        assert cache.stats.evicted >= 2 * NUM_SHARDS - 3 - 2
    assert max(remote.asked[f"{shard:06d}.tar"] for shard in range(NUM_SHARDS)) <= 2


def test_fetching_ahead_goes_by_the_plan_and_stops_where_it_would_harm(split, source, tmp_path):
    order = list(range(NUM_SHARDS))
    asked = []
    needs = one_at_a_time(order, steps=10)
    uses = {shard: 10 * shard for shard in order}
    with opened(
        split,
        source,
        tmp_path / "cache",
        limit_bytes=unit_bytes(source, range(4)),
        needs=needs,
        next_use=uses.get,
        num_downloads=1,
        ahead=0,
    ) as (cache, remote):
        remote.before = asked.append
        cache.open(0)
        deadline = time.monotonic() + 10
        while shards_in(tmp_path / "cache") != [0, 1] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        # One lane of one shard: one more is fetched ahead, not all that would fit.
        assert shards_in(tmp_path / "cache") == [0, 1]


def test_what_is_needed_last_goes_first(split, source, tmp_path):
    """Without needs of its own in the window, a shard's next use in the plan decides."""
    folder = tmp_path / "cache"
    uses = {0: 50, 1: None, 2: 20, 3: 90, 4: 5}
    needs = one_at_a_time([0, 1, 2, 3, 4, 5, 6], steps=1)
    with opened(
        split,
        source,
        folder,
        limit_bytes=unit_bytes(source, range(5)),
        needs=needs,
        next_use=uses.get,
        num_downloads=0,
        ahead=0,
    ) as (cache, _):
        for shard in range(5):
            cache.open(shard).close()
        cache.advance(5)
        order, kept = [], []
        for shard in (5, 6, 7, 8):
            before = shards_in(folder)
            kept.append(cache._open_whole(shard))
            order += sorted(set(before) - set(shards_in(folder)))
        assert order == [1, 3, 0, 2]


def test_other_data_sets_go_first_the_oldest_of_them_first(split, source, tmp_path):
    folder = tmp_path / "cache"
    other = "http://example.invalid/other"
    limit = unit_bytes(source, range(6))
    with opened(as_remote(source, folder, other), source, folder, limit_bytes=limit) as (cache, _):
        for shard in range(4):
            cache._open_whole(shard).close()
            path = cache._files.path(shard, ".tar")
            for suffix in (".tar", ".idx", ".crc"):
                age = time.time() - 1e5 + [30, 10, 40, 20][shard]
                os.utime(path.with_suffix(suffix), (age, age))
    left = []
    with opened(
        split,
        source,
        folder,
        limit_bytes=limit,
        needs=one_at_a_time(range(NUM_SHARDS)),
        next_use=lambda shard: 3,
        num_downloads=0,
    ) as (cache, _):
        for shard in range(6):
            cache._open_whole(shard).close()
            left.append(shards_in(mirror_folder(other, folder)))
        assert left == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3], [0, 2], [2], []]
        assert bytes_in(folder) == limit


def test_without_a_plan_the_longest_unused_goes_first(split, source, tmp_path):
    folder = tmp_path / "cache"
    with opened(split, source, folder, limit_bytes=unit_bytes(source, range(3))) as (cache, _):
        for shard in (0, 1, 2, 0, 3, 4):
            cache._open_whole(shard).close()
            time.sleep(0.02)
        assert shards_in(folder) == [0, 3, 4]


def test_a_sample_or_two_are_read_in_ranges_and_more_as_a_whole(split, source, tmp_path):
    folder = tmp_path / "cache"
    needs = iter([Need(0, 0, 3, 2), Need(1, 0, 3, 3)])
    limit = unit_bytes(source, range(4))
    options = {"limit_bytes": limit, "needs": needs, "num_downloads": 0}
    with opened(split, source, folder, **options) as (cache, remote):
        data = (source / "train/000000.tar").read_bytes()
        few = cache.open(0)
        assert few.read_at(512, 100) == data[512:612]
        assert few.read_at(len(data) - 7, 100) == data[-7:]
        assert few.read_at(len(data), 100) == b""
        cache.idx_path(0)
        assert shards_in(folder) == [] and cache.stats.ranges_read == 2
        assert cache.stats.bytes_downloaded < len(data) // 4
        for offset in range(0, 900, 100):  # more than was announced
            assert few.read_at(offset, 100) == data[offset : offset + 100]
        assert shards_in(folder) == [0] and cache.stats.ranges_read <= 4
        many = cache.open(1)
        assert many.read_at(0, 10) == (source / "train/000001.tar").read_bytes()[:10]
        assert shards_in(folder) == [0, 1]
        few.close()
        many.close()
    assert remote.asked["000000.tar"] <= 2


def test_a_notebook_reads_single_samples_by_ranges(split, source, tmp_path):
    """`open_split(url).sample(i)` asks for a few kilobytes, and finds what is there already."""
    remote = FolderRemote(source)
    with Reader(
        split,
        verify="always",
        store=ShardCache(split, folder=tmp_path / "cache", limit_bytes=None, remote=remote),
    ) as reader:
        picture, target = reader.read(SAMPLES + 1)
    assert bytes(target) == b"1" and len(picture) >= 300
    assert remote.counts.requests == 3
    assert remote.counts.bytes_downloaded < 10_000
    assert shards_in(tmp_path / "cache") == []
    cache = on_demand_cache(split)
    assert cache._folder.path == tmp_path / "cache"
    assert cache._folder.limit_bytes == 64 * 10**9
    cache.close()


def test_many_threads_bring_a_shard_once(split, source, tmp_path):
    limit = unit_bytes(source, range(NUM_SHARDS))
    with opened(split, source, tmp_path / "cache", limit_bytes=limit) as (cache, remote):
        remote.before = lambda path: time.sleep(0.01)

        def read(seed):
            for shard in random.Random(seed).sample(range(NUM_SHARDS), NUM_SHARDS):
                cache._open_whole(shard).close()

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(remote.asked.values()) == {1}


def test_another_version_at_the_same_url_is_not_mixed_up(split, source, tmp_path):
    folder = tmp_path / "cache"
    newer = servers.write_data_set(
        tmp_path / "newer", num_shards=2, samples=SAMPLES, sample_bytes=300, seed=8
    )
    limit = unit_bytes(source, range(6))
    for root, remote_split in ((source, split), (newer, as_remote(newer, folder))):
        with opened(remote_split, root, folder, limit_bytes=limit) as (cache, _):
            held = cache._open_whole(1)
            assert held.read_at(0, 10**6) == (root / "train/000001.tar").read_bytes()
            held.close()
    assert shards_in(folder) == [1, 1]


def test_a_cached_file_of_a_wrong_size_is_fetched_again(split, source, tmp_path):
    limit = unit_bytes(source, range(3))
    with opened(split, source, tmp_path / "cache", limit_bytes=limit) as (cache, _):
        cache._open_whole(0).close()
        os.truncate(cache._files.path(0, ".tar"), 100)
        held = cache._open_whole(0)
        assert held.read_at(0, 10**6) == (source / "train/000000.tar").read_bytes()
        assert cache._folder.recount() == bytes_in(tmp_path / "cache")


def test_importing_needs_neither_torch_nor_fsspec():
    code = (
        "import sys; import mbv3dist.data.cache, mbv3dist.data.remote; "
        "bad = {'torch', 'fsspec', 'aiohttp', 's3fs'} & set(sys.modules); sys.exit(str(bad) if bad "
        "else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
