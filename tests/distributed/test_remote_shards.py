"""A data set ten times the cache, read by real processes over spoilt connections."""

import random
from pathlib import Path

import numpy as np
import pytest
import servers
from follow_plan import (
    S3_ENVIRONMENT,
    SECRET,
    check_run,
    finish,
    make_data_set,
    start,
    tar_bytes,
    watched,
)


def check_fetches(proxy, results: list[dict], num_shards: int, epochs: int) -> int:
    """Once per node and epoch, though several ranks read and share shards that lanes cut."""
    fetched = proxy.count(r"/train/\d+\.tar$")
    downloaded = sum(result["stats"]["shards_downloaded"] for result in results)
    assert len(fetched) == num_shards
    # A rank that the machine holds up may find a shard gone which the others were done with.
    assert downloaded == sum(fetched.values()) <= 1.05 * epochs * num_shards
    assert max(fetched.values()) <= epochs + 1
    return downloaded


@pytest.mark.slow
def test_ten_times_the_cache_over_http_with_faults(tmp_path, record_property):
    """Four ranks, two epochs, nginx behind 5 % of faults and up to 6 ms of delay."""
    root = make_data_set(tmp_path / "set", 160)
    limit = tar_bytes(root) // 10
    job = {
        "folder": str(tmp_path / "cache"),
        "limit": limit,
        "plan": {"global_batch_size": 32, "epochs": 2, "lanes": 4, "block_shards": 1},
    }
    with (
        servers.file_server(root, tmp_path / "server") as (url, kind),
        servers.proxied(url, fault_share=0.05, latency_s=0.006) as (own, proxy),
        watched(tmp_path / "cache") as peak,
    ):
        own = own.replace("://", f"://me:{SECRET}@")
        results = finish(start({**job, "url": own}, tmp_path, 4), tmp_path)
    line = check_run(results, root, epochs=2, limit=limit, peak=peak)
    assert proxy.num_faults > 10
    line = f"{kind}: {line}; {proxy.num_faults} faults in {len(proxy.requests)} requests"
    print(line)
    fetched = check_fetches(proxy, results, 160, 2)
    line += f"; {fetched} shards fetched in 2 epochs of 160"
    record_property("figures", line)
    print(line)
    names = [str(path) for path in (tmp_path / "cache").rglob("*")]
    assert not any(SECRET in name or name.endswith((".partial", ".tmp")) for name in names)


@pytest.mark.slow
def test_ten_times_the_cache_from_s3_with_faults(tmp_path, record_property, monkeypatch):
    """Two ranks that share a lane, and so need the same shards at the same time."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    root = make_data_set(tmp_path / "set", 80)
    limit = tar_bytes(root) // 10
    job = {
        "url": "s3://bucket/sets/voc",
        "folder": str(tmp_path / "cache"),
        "limit": limit,
        "plan": {"global_batch_size": 16, "epochs": 1, "lanes": 1, "block_shards": 2},
        "same_needs": 2,
    }
    with servers.s3_server() as endpoint:
        servers.put_objects(endpoint, "bucket", root, prefix="sets/voc/")
        with (
            servers.proxied(endpoint, fault_share=0.05, latency_s=0.004, seed=1) as (own, proxy),
            watched(tmp_path / "cache") as peak,
        ):
            job["environment"] = {"AWS_ENDPOINT_URL": own}
            results = finish(start(job, tmp_path, 2), tmp_path)
            check_writing(own, tmp_path, monkeypatch)
    line = "S3: " + check_run(results, root, epochs=1, limit=limit, peak=peak)
    assert proxy.num_faults > 5
    fetched = check_fetches(proxy, results, 80, 1)
    line += f"; {proxy.num_faults} faults in {len(proxy.requests)} requests; "
    line += f"{fetched} shards fetched in an epoch of 80"
    record_property("figures", line)
    print(line)


def check_writing(endpoint: str, tmp_path: Path, monkeypatch) -> None:
    """Files go to S3 and from it whole, over the same spoilt connections."""
    from mbv3dist.data.remote import Remote

    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    remote = Remote("s3://bucket/written", backoff_s=0.02, timeout_s=20.0)
    for number in range(10):
        source = tmp_path / "file"
        source.write_bytes(random.Random(number).randbytes(5000 + number))
        remote.upload(source, f"{number}.tar")
        assert remote.read(f"{number}.tar") == source.read_bytes()
    assert remote.list() == [f"{number}.tar" for number in range(10)]
    remote.delete("3.tar")
    assert not remote.exists("3.tar") and remote.size("4.tar") == 5004
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/written/3\.tar does not exist"):
        remote.read("3.tar")


@pytest.mark.parametrize("nodes", [8, 32])
def test_many_nodes_fetch_each_shard_little_more_than_once(nodes, record_property):
    """What the caches of simulated nodes are asked for in an epoch: 400 shards, 8 ranks a node."""
    from mbv3dist.data.needs import rank_needs
    from mbv3dist.data.plan import Plan

    world = 8 * nodes
    plan = Plan(np.full(400, 997), global_batch_size=8 * world, epochs=2, lanes=world // 4)
    fetched = 0
    for node in range(nodes):
        asked = set()
        for rank in range(8 * node, 8 * node + 8):
            for need in rank_needs(plan, rank=rank, world_size=world):
                if need.first_step >= plan.num_samples // plan.global_batch_size:
                    break
                asked.add(need.shard)
        fetched += len(asked)
    record_property("figures", f"{nodes} nodes: each shard fetched {fetched / 400:.3f} times")
    print(f"{nodes} nodes: {fetched / 400:.3f}")
    assert 1 <= fetched / 400 <= 1.1
