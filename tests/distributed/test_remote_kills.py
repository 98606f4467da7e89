"""What is left of a cache by kill -9, a full disk and a read-only one."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest
import servers
from follow_plan import (
    cache_bytes,
    check_run,
    finish,
    kill,
    make_data_set,
    start,
    tar_bytes,
    watched,
)


@pytest.mark.slow
def test_kill_9_at_any_moment_of_a_fill(tmp_path):
    """Whole runs and single ranks are killed; what they leave is gone at the next start."""
    from mbv3dist.data.cache_folder import CacheFolder

    root = make_data_set(tmp_path / "set", 30)
    folder, limit = tmp_path / "cache", tar_bytes(root) // 3
    job = {
        "folder": str(folder),
        "limit": limit,
        "plan": {"global_batch_size": 24, "epochs": 1, "lanes": 3, "block_shards": 1},
    }
    rng = random.Random(5)
    leftovers = 0
    with (
        servers.file_server(root, tmp_path / "server") as (url, _),
        servers.proxied(url, fault_share=0.02, latency_s=0.04) as (own, proxy),
    ):
        job["url"] = own
        for kind in ("fill", "rank", "any"):
            asked = len(proxy.requests)
            processes = start(job, tmp_path, 3)
            while len(proxy.requests) < asked + 12:
                assert all(process.poll() is None for process in processes)
                time.sleep(0.005)
            if kind == "fill":
                while not list(folder.rglob("*.tar.partial")):
                    time.sleep(0.001)
            else:
                time.sleep(rng.random() * 0.2)
            victim = rng.randrange(3)
            if kind != "rank":
                kill(processes)
                leftovers += len(list(folder.rglob("*.partial")))
                assert CacheFolder(folder, limit).used_bytes() == cache_bytes(folder) <= limit
                assert not list(folder.rglob("*.partial"))
                continue
            # A rank that dies while it fetches leaves its shards to the others, at once.
            kill(processes[victim : victim + 1])
            steps = np.memmap(tmp_path / "steps", dtype=np.int64, mode="r+", shape=(3,))
            steps[victim] = 10**9
            for rank, process in enumerate(processes):
                if rank != victim:
                    assert process.wait(60) == 0, (tmp_path / f"rank{rank}.log").read_text()
        proxy.latency_s = 0.0
        with watched(folder) as peak:
            results = finish(start(job, tmp_path, 3), tmp_path)
    assert leftovers > 0, "no kill hit a fill"
    check_run(results, root, epochs=1, limit=limit, peak=peak)
    assert not list(folder.rglob("*.partial"))
    assert CacheFolder(folder, limit).used_bytes() == cache_bytes(folder) <= limit


FILL = """
import sys
from pathlib import Path
from mbv3dist.data.cache import ShardCache
from mbv3dist.data.index import open_split

url, folder = sys.argv[1], Path(sys.argv[2])
try:
    split = open_split(url, "train", cache_dir=folder)
    cache = ShardCache(split, folder=folder, limit_bytes=10**9)
    for shard in range(len(split.shards)):
        cache._open_whole(shard).close()
except OSError as error:
    print(error)
print(sum(1 for _ in folder.rglob("*.partial")))
"""


@pytest.mark.parametrize(("option", "words"), [("size=300k", "disk is full"), ("ro", "read-only")])
def test_a_disk_that_is_full_or_read_only(tmp_path, option, words):
    """A real one, where this process may mount it in a name space of its own."""
    mount = f"mount -t tmpfs -o {option} tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    unshare = ["unshare", "--mount", "sh", "-c"]
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no permission to mount a file system")
    root, folder = make_data_set(tmp_path / "set", 12), f"{tmp_path}/disk/cache"
    with servers.file_server(root, tmp_path / "server") as (url, _):
        done = subprocess.run(
            [*unshare, f'{mount} && exec "$0" -c "$@"', sys.executable, FILL, url, folder],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    line, partials = done.stdout.splitlines()
    assert words in line and "--data.cache_dir" in line and folder in line
    assert partials == "0"
