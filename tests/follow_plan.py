"""Real processes that read remote shards as the ranks of a training run do.

Each follows one rank's plan through `Reader` and `ShardCache`, in step with the others, and writes
down which sample it read in which epoch. The rest starts them and checks what they wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

SECRET = "not-to-be-seen"
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


# -- what a process does ------------------------------------------------------------------------


def follow_plan(job: dict) -> dict:
    """Read one rank's samples in the plan's order; returns what was read and what it took."""
    from mbv3dist.data.cache import ShardCache
    from mbv3dist.data.index import open_split
    from mbv3dist.data.needs import next_use, rank_needs
    from mbv3dist.data.plan import Plan
    from mbv3dist.data.reader import Reader
    from mbv3dist.data.remote import Remote

    rank, world = job["rank"], job["world"]
    folder = Path(job["folder"])
    split = open_split(job["url"], "train", cache_dir=folder)
    plan = Plan(split.shard_sizes, **job["plan"])
    looking = plan.clone()
    steps = np.memmap(job["steps"], dtype=np.int64, mode="r+", shape=(world,))
    step = 0
    cache = ShardCache(
        split,
        folder=folder,
        limit_bytes=job["limit"],
        needs=rank_needs(plan, rank=rank, world_size=world),
        next_use=lambda shard: next_use(
            looking, shard, max(step - 1, 0), ranks=range(world), world_size=world
        ),
        local_rank=rank,
        local_world_size=world,
        num_downloads=2,
        ahead=1,
        same_needs=job.get("same_needs", 1),
        remote=Remote(job["url"], retries=8, backoff_s=0.02, timeout_s=20.0),
        wait_s=60.0,
    )
    read = []
    with Reader(split, verify="always", store=cache) as reader:
        for step in range(plan.num_steps):
            mine = plan.step(step, rank=rank, world_size=world)
            for index, epoch, weight in zip(mine.index, mine.epoch, mine.weight, strict=True):
                picture, _ = reader.read(int(index))
                if weight:
                    read.append((int(epoch), split.key(int(index)), zlib.crc32(picture)))
            reader.advance(step + 1)
            steps[rank] = step + 1
            while steps.min() <= step:  # ranks of a run wait for each other's gradients
                time.sleep(0.001)
        stats = cache.stats
    return {"read": read, "stats": {name: getattr(stats, name) for name in vars(stats)}}


def main() -> None:
    job = json.loads(sys.argv[1])
    result = follow_plan(job)
    Path(job["out"]).write_text(json.dumps(result))


# -- starting them ------------------------------------------------------------------------------


def start(job: dict, tmp_path: Path, world: int) -> list[subprocess.Popen]:
    steps = tmp_path / "steps"
    np.zeros(world, dtype=np.int64).tofile(steps)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        "OMP_NUM_THREADS": "1",
        **S3_ENVIRONMENT,
        **job.pop("environment", {}),
    }
    processes = []
    for rank in range(world):
        (tmp_path / f"rank{rank}.json").unlink(missing_ok=True)
        own = {**job, "rank": rank, "world": world, "steps": str(steps)}
        own["out"] = str(tmp_path / f"rank{rank}.json")
        with open(tmp_path / f"rank{rank}.log", "w") as log:
            command = [sys.executable, __file__, json.dumps(own)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def finish(processes: list[subprocess.Popen], tmp_path: Path) -> list[dict]:
    try:
        for rank, process in enumerate(processes):
            code = process.wait(120)
            assert code == 0, (tmp_path / f"rank{rank}.log").read_text()
    finally:
        kill(processes)
    logs = "".join((tmp_path / f"rank{rank}.log").read_text() for rank in range(len(processes)))
    assert SECRET not in logs
    assert logs == "", logs
    return [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(len(processes))]


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def truth(root: Path) -> Counter:
    """Key and checksum of each picture, as GNU tar would find them."""
    found: Counter = Counter()
    for path in sorted((root / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name[:-4], zlib.crc32(file.read())] += 1
    return found


def tar_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.tar"))


def cache_bytes(folder: Path) -> int:
    """All bytes in the cache at one moment, files in the making at their full size."""
    from mbv3dist.data.cache_folder import locked

    with locked(folder / ".lock"):
        return sum(
            p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.parent != folder
        )


@contextlib.contextmanager
def watched(folder: Path):
    """Samples the bytes in a cache; yields a list with the largest sum so far and the samples."""
    folder.mkdir(exist_ok=True)
    result = [0, 0]
    stop = threading.Event()

    def watch():
        while not stop.wait(0.004):
            result[0] = max(result[0], cache_bytes(folder))
            result[1] += 1

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


def check_run(results: list[dict], root: Path, *, epochs: int, limit: int, peak: list[int]) -> str:
    """Exactly once per epoch, within the bound; returns the figures in a line."""
    expected = truth(root)
    for epoch in range(epochs):
        found = Counter(
            (key, crc) for result in results for e, key, crc in result["read"] if e == epoch
        )
        assert found == expected, f"epoch {epoch}: {len(expected - found)} missing or changed"
    stats = [result["stats"] for result in results]
    samples = epochs * sum(expected.values())
    assert max(s["peak_bytes"] for s in stats) <= limit
    assert 0 < peak[0] <= limit
    assert peak[1] > 20, "the watcher looked too rarely"
    requests = sum(s["requests"] for s in stats)
    num_bytes = sum(s["bytes_downloaded"] for s in stats)
    return (
        f"{requests / samples:.3f} requests and {num_bytes / samples:.0f} bytes per sample, "
        f"{sum(s['retries'] for s in stats)} retries, "
        f"peak {max(s['peak_bytes'] for s in stats)} counted, {peak[0]} seen, bound {limit}"
    )


def make_data_set(root: Path, num_shards: int) -> Path:
    import servers

    return servers.write_data_set(root, num_shards=num_shards, samples=24, sample_bytes=600)


if __name__ == "__main__":
    main()
