"""Shards on disk: format, determinism, order, kills and full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert import parts, publish, run, work, writer
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.records import ConversionError
from mbv3dist.convert.verify import verify_dataset
from mbv3dist.data.index import list_splits, open_split

NUM_PICTURES = 150  # more than two chunks of 64


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "src"
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        folder = root / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "png" if number % 10 == 0 else "jpg"
        noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.{suffix}")
    return root


def convert(source, out, **options):
    defaults = {"split": "train", "workers": 1, "shard_bytes": 60_000, "val_fraction": 0.2}
    return convert_imagefolder(source, out, **{**defaults, **options})


def tree(folder):
    """Every file, hidden ones too, with its bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    convert(source, out)
    return out


def test_bytes_do_not_depend_on_workers_or_place(source, whole, tmp_path):
    convert(source, tmp_path / "elsewhere", workers=2)
    assert tree(tmp_path / "elsewhere") == tree(whole)
    for name, data in tree(whole).items():
        assert b"\r" not in data or name.endswith((".tar", ".crc"))
        assert str(source.parent).encode() not in data


def test_seed_changes_the_order_only(source, whole, tmp_path):
    convert(source, tmp_path, seed=1, val_fraction=0.0)
    first, second = (open_split(out, "train") for out in (whole, tmp_path))
    assert first.source(0) != second.source(0)
    sources = [second.source(index) for index in range(len(second))]
    assert len(set(sources)) == NUM_PICTURES and sources != sorted(sources)


def test_tars_are_plain_ustar_with_index_and_checksums(whole):
    split = open_split(whole, "train")
    assert len(split.shards) > 2
    for shard in split.shards:
        with tarfile.open(shard.path) as tar:
            members = tar.getmembers()
            data = [tar.extractfile(member).read() for member in members]
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert not member.pax_headers and member.uname == member.gname == ""
        assert shard.path.stat().st_size % tarfile.RECORDSIZE == 0
        # The same line per sample that DALI's wds2idx derives from the tar.
        rows = [f"{m.name.split('.')[1]} {m.offset_data} {m.size} {m.name}" for m in members]
        lines = [" ".join(pair) for pair in zip(rows[::2], rows[1::2], strict=True)]
        text = "\n".join([f"v1.2 {len(lines)}", *lines, ""])
        assert shard.path.with_suffix(".idx").read_text() == text
        checksums = np.array([zlib.crc32(item) for item in data], "<u4").tobytes()
        assert shard.path.with_suffix(".crc").read_bytes() == checksums
    listing = subprocess.run(["tar", "-tf", split.shards[0].path], capture_output=True, check=True)
    assert listing.stdout.decode().split()[:2] == ["000000000.jpg", "000000000.cls"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
def test_stock_readers_read_every_sample(whole):
    webdataset = pytest.importorskip("webdataset")
    split = open_split(whole, "train")
    keys = []
    for shard in split.shards:
        for sample in webdataset.WebDataset(str(shard.path), shardshuffle=False, empty_check=False):
            keys.append(sample["__key__"])
            assert sample["cls"] == str(split.sample(int(sample["__key__"]))["cls"]).encode()
    assert keys == [split.key(index) for index in range(len(split))]


def test_same_again_is_nothing_to_do_and_another_is_refused(source, whole):
    before = tree(whole)
    assert convert(source, whole).reused
    with pytest.raises(ValueError, match="other input or settings; replace it with --overwrite"):
        convert(source, whole, seed=5)
    assert tree(whole) == before


@pytest.mark.parametrize("name", ["000001.tar", "000000.idx", "000001.crc", "sources"])
def test_a_split_that_lost_a_file_is_made_again(source, whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "out")
    out = tmp_path / "out"
    (out / "train.sources.tsv" if name == "sources" else out / "train" / name).unlink()
    assert not convert(source, out).reused
    assert tree(out) == tree(whole)
    (out / "train/000001.tar").write_bytes(b"cut")
    assert not convert(source, out).reused
    assert tree(out) == tree(whole)


def test_a_failed_overwrite_leaves_the_split_and_its_report(source, whole, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "src"
    shutil.copytree(whole, out)
    shutil.copytree(source, broken)
    for path in sorted(broken.rglob("*.jpg"))[::7]:  # in both splits
        path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(ConversionError) as caught:
        convert(broken, out, overwrite=True)
    first = str(caught.value).splitlines()[0]
    paths = ", ".join(str(out / f"{name}.failed.json") for name in ("train", "val"))
    assert first.endswith(f"(listed in {paths}):")
    listed = [
        item["file"]
        for name in ("train", "val")
        for item in json.loads((out / f"{name}.failed.json").read_text())["problems"]
    ]
    assert listed == [problem.file for problem in caught.value.problems]
    kept = {name: data for name, data in tree(out).items() if not name.endswith(".failed.json")}
    assert kept == tree(whole)
    assert list_splits(out) == ["train", "val"] and verify_dataset(out)["ok"]
    assert convert(source, out).reused
    assert tree(out) == tree(whole)


def test_only_splits_with_problems_are_named(source, tmp_path):
    broken = tmp_path / "src"
    shutil.copytree(source, broken)
    convert(source, tmp_path / "whole")
    name = open_split(tmp_path / "whole", "val").source(0)
    (broken / name).write_bytes(b"")
    with pytest.raises(ConversionError, match=r"listed in .*/out/val\.failed\.json\)"):
        convert(broken, tmp_path / "out")
    assert list(tree(tmp_path / "out")) == ["val.failed.json"]
    convert(source, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/val.failed.json").exists()


def test_a_lost_report_is_not_called_other_input(source, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    for text in (None, "{", '{"status": "failed"}', "[]"):
        path = tmp_path / "out/train.report.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(ValueError, match=r"its train.report.json is missing or damaged"):
            convert(source, tmp_path / "out")


class Killed(BaseException):
    """Like SIGKILL: nothing in the way of it cleans up."""


@pytest.mark.parametrize("step", ["write_file", "write_report", "write_manifest", "sync_folder"])
def test_goes_on_with_a_half_published_split(source, whole, tmp_path, monkeypatch, step):
    def kill(*args):
        raise Killed

    shutil.copytree(whole, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(publish, step, kill)
        with pytest.raises(Killed):
            convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/train.json").exists() == (step == "write_manifest")
    prepared = []
    monkeypatch.setattr(work, "prepare_chunk", lambda *args: prepared.append(args))
    convert(source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(whole) and not prepared


def test_a_lost_shard_of_a_half_published_split_is_named(source, tmp_path, monkeypatch):
    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publish, "write_report", kill)
        with pytest.raises(Killed):
            convert(source, tmp_path / "out")
    (tmp_path / "out/train/000000.crc").unlink()
    with pytest.raises(ValueError, match=r"shard 0 of split 'train' is lost: neither .*convert"):
        convert(source, tmp_path / "out")


def test_work_in_progress_is_removed_under_its_lock(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/1.jpg").write_text("no picture")
    removed = []

    def remove(path, **options):
        with open(tmp_path / "out/.train.lock") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed.append(path.name)

    monkeypatch.setattr(run.shutil, "rmtree", remove)
    for options in ({}, {"on_error": "skip"}):
        with pytest.raises(ValueError, match="problem"):
            convert(tmp_path / "src", tmp_path / "out", val_fraction=0.0, **options)
    assert removed == [".train.part"] * 2
    assert not (tmp_path / "out/.train.lock").exists()


def test_overwrite(source, whole, tmp_path):
    convert(source, tmp_path, seed=5)
    convert(source, tmp_path, overwrite=True)
    assert tree(tmp_path) == tree(whole)


@pytest.mark.parametrize("step", ["prepare_chunk", "pack_shard", "publish"])
def test_goes_on_after_a_kill(source, whole, tmp_path, monkeypatch, step):
    calls = 0

    def stop_second(function):
        def replacement(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2:
                raise Killed
            return function(*args, **kwargs)

        return replacement

    module = parts if step == "publish" else work
    with monkeypatch.context() as patch:
        patch.setattr(module, step, stop_second(getattr(module, step)))
        with pytest.raises(Killed):
            convert(source, tmp_path)
    visible = [path for path in tree(tmp_path) if not path.startswith(".")]
    assert step == "publish" or not visible
    whole_chunks = len(list(tmp_path.glob(".*.part/prepared/*.json")))
    calls = 2  # only count from here on
    monkeypatch.setattr(work, "prepare_chunk", stop_second(work.prepare_chunk))
    convert(source, tmp_path)
    assert tree(tmp_path) == tree(whole)
    # 120 pictures in train are two chunks, 30 in val are one; those done before are kept.
    assert calls - 2 == 3 - whole_chunks == {"prepare_chunk": 2}.get(step, 0)


def test_goes_on_after_sigkill(source, whole, tmp_path):
    program = (
        "import os, sys\n"
        "from mbv3dist.convert.imagefolder import convert_imagefolder\n"
        "def stop(done, total):\n"
        "    if done > total * 0.6: os.kill(os.getpid(), 9)\n"
        "convert_imagefolder(sys.argv[1], sys.argv[2], split='train', val_fraction=0.2, "
        "shard_bytes=60_000, workers=1, progress=stop)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, source, tmp_path], check=False)
    assert result.returncode == -9
    assert not (tmp_path / "train.json").exists() and (tmp_path / ".train.part").is_dir()
    convert(source, tmp_path)
    assert tree(tmp_path) == tree(whole)


def test_changed_input_clears_work_in_progress(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "pack", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    report = convert(source, tmp_path / "out", resize=6)
    assert report.splits["train"].counts["resized"] == report.splits["train"].samples
    assert verify_dataset(tmp_path / "out")["ok"]


def test_full_disk_leaves_nothing(source, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        convert(source, tmp_path)
    assert not tree(tmp_path)


def test_progress_ends_at_the_total(source, tmp_path):
    seen = []
    convert(source, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (2 * NUM_PICTURES, 2 * NUM_PICTURES)


def test_description_has_the_shape_of_wids(whole):
    value = json.loads((whole / "train.json").read_text())
    assert value["wids_version"] == 1 and value["source"] == ["src"]
    assert {"task", "classes", "seed", "boxes", "mbv3dist_version"} <= value.keys()
    for entry in value["shardlist"]:
        assert entry.keys() == {"url", "nsamples", "filesize", "sha256"}
        assert (whole / entry["url"]).stat().st_size == entry["filesize"]
    counts = [entry["nsamples"] for entry in value["shardlist"]]
    assert max(counts) - min(counts) <= 1


def test_no_torch_and_no_pillow_on_import():
    program = (
        "import sys, mbv3dist.convert.voc, mbv3dist.convert.imagefolder, mbv3dist.convert.verify, "
        "mbv3dist.convert.inspect, mbv3dist.data.reader\n"
        "sys.exit(bool({'torch', 'PIL', 'defusedxml', 'concurrent.futures'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_two_conversions_at_once_are_refused(source, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / ".train.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another conversion is writing to .* wait until it"):
            convert(source, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".train.lock"]
    convert(source, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_file_system_without_locks_is_named(source, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def fail(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match=r"cannot lock files .* convert to another folder"):
        convert(source, tmp_path)


def test_what_a_kill_left_behind_the_last_step_is_removed(source, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(whole / "train", tmp_path / "out/.train.part.old")
    (tmp_path / "out/.val.part/prepared").mkdir(parents=True)
    assert convert(source, tmp_path / "out").reused
    assert tree(tmp_path / "out") == tree(whole)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_picture_that_changes_meanwhile_is_named(source, tmp_path, monkeypatch):
    changed = tmp_path / "src"
    shutil.copytree(source, changed)
    real_pack = run.pack

    def change(item, tick):
        path = changed / "a/003.jpg"
        path.write_bytes(path.read_bytes()[::-1])
        real_pack(item, tick)

    monkeypatch.setattr(run, "pack", change)
    with pytest.raises(ValueError, match=r"a/003.jpg changed while it was converted"):
        convert(changed, tmp_path / "out")


def test_labels_are_the_classes_in_pack_order(whole):
    for name in ("train", "val"):
        split = open_split(whole, name)
        expected = [split.sample(index)["cls"] for index in range(len(split))]
        assert split.labels().tolist() == expected


def test_a_split_without_its_labels_is_made_again(source, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    for damage in (b"", None):
        path = tmp_path / "out/train.labels.npy"
        path.unlink() if damage is None else path.write_bytes(damage)
        assert not convert(source, tmp_path / "out").reused
        assert tree(tmp_path / "out") == tree(whole)
