"""Conversion in parts that is killed, at any step, or meets a full disk."""

import errno
import os
import shutil

import pytest
from parts import Killed, convert, convert_all, tree, write_source

from mbv3dist.convert import parts, publish, run, work


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("pictures") / "src")


MERGE_STEPS = [
    (parts, "write_file", 1),  # plan.json is written with it too
    (parts.os, "replace", 1),
    (parts.os, "replace", 7),
    (publish, "sync_folder", 1),
    (publish, "write_file", 1),
    (publish, "write_report", 1),
    (publish, "sync_folder", 2),
    (publish, "write_file", 3),
    (publish, "write_manifest", 1),
    (parts.shutil, "rmtree", 1),
    (parts.shutil, "rmtree", 3),
]


MERGE_OPTIONS = {"val_fraction": 0.3, "shard_bytes": 9000}


@pytest.fixture(scope="module")
def unmerged(source, tmp_path_factory):
    """Two of three parts done, and what all three become."""
    root = tmp_path_factory.mktemp("unmerged")
    for number in (1, 2):
        convert(source, root / "out", (number, 3), **MERGE_OPTIONS)
    convert_all(source, root / "reference", 3, **MERGE_OPTIONS)
    return root


@pytest.mark.parametrize("step", range(len(MERGE_STEPS)))
@pytest.mark.parametrize("again", [1, 3])
def test_a_merge_that_is_killed_is_cured_by_any_part(
    source, unmerged, tmp_path, monkeypatch, step, again
):
    out = tmp_path / "out"
    shutil.copytree(unmerged / "out", out)
    owner, name, call = MERGE_STEPS[step]
    real, merge, calls = getattr(owner, name), run._merge, 0

    def stop(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    def killed_merge(item):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            return merge(item)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_merge", killed_merge)
        with pytest.raises(Killed):
            convert(source, out, (3, 3), **MERGE_OPTIONS)
    assert calls == call
    with monkeypatch.context() as patch:
        patch.setattr(work, "prepare_chunk", None)  # nothing is prepared or packed again
        patch.setattr(work, "pack_shard", None)
        assert not convert(source, out, (again, 3), **MERGE_OPTIONS).waiting
    assert tree(out) == tree(unmerged / "reference")
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("name", ["prepare_chunk", "pack_shard", "write_file"])
def test_a_killed_part_goes_on(source, tmp_path, monkeypatch, name):
    convert_all(source, tmp_path / "reference", 2, shard_bytes=5000)
    convert(source, tmp_path / "out", (1, 2), shard_bytes=5000)
    real, calls = getattr(work, name), 0

    def stop(*args):
        nonlocal calls
        calls += 1
        if calls == {"prepare_chunk": 1, "pack_shard": 3, "write_file": 4}[name]:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(work, name, stop)
        with pytest.raises(Killed):
            convert(source, tmp_path / "out", (2, 2), shard_bytes=5000)
    shards = len(list((tmp_path / "out/.train.parts/00002/shards").glob("*.tar")))
    assert shards == {"prepare_chunk": 0, "pack_shard": 2}.get(name, shards)
    assert not (tmp_path / "out/train.json").exists()
    packed = []
    pack_shard = work.pack_shard
    monkeypatch.setattr(work, "pack_shard", lambda *a: packed.append(a[-1]) or pack_shard(*a))
    assert not convert(source, tmp_path / "out", (2, 2), shard_bytes=5000).waiting
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")
    assert min(packed, default=shards) == shards  # what was whole is not packed again


def test_a_full_disk_takes_only_its_own_part(source, tmp_path, monkeypatch):
    convert(source, tmp_path, (1, 2))
    before = tree(tmp_path)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(work, "pack_shard", full)
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path, (2, 2))
    assert tree(tmp_path) == before
    assert not convert(source, tmp_path, (2, 2)).waiting
