"""Conversion in parts by real processes: started together, killed, started again."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command_line, environment, kill_tree
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.verify import verify_dataset
from mbv3dist.data.index import list_splits

pytest.importorskip("fcntl")
NUM_PARTS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures") / "src"
    rng = np.random.default_rng(0)
    for number in range(241):
        folder = root / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.png", compress_level=1)
    return root


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "out"
    for number in range(1, NUM_PARTS + 1):
        convert_imagefolder(
            source, out, split="train", workers=1, shard_bytes=2**20, part=(number, NUM_PARTS)
        )
    return tree(out)


def tree(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def start(source, out, number):
    words = ["convert", "imagefolder", source, "--out", out, "--split", "train", "--workers", 1]
    words += ["--shard-mb", 1, "--part", f"{number}/{NUM_PARTS}"]
    return subprocess.Popen(
        command_line(words),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def test_parts_started_together_merge_once(source, reference, tmp_path):
    out = tmp_path / "out"
    processes = [start(source, out, number) for number in range(1, NUM_PARTS + 1)]
    outputs = [finish(process) for process in processes]
    assert tree(out) == reference and verify_dataset(out)["ok"]
    assert not list(out.glob(".*"))
    merged = [text for text in outputs if "not visible yet" not in text]
    assert any("nothing to do" not in text for text in merged)
    rows = json.loads((out / "train.json").read_text())["shardlist"]
    assert sum(row["nsamples"] for row in rows) == 241


def test_killed_parts_and_a_killed_merge_go_on(source, reference, tmp_path):
    out = tmp_path / "out"
    parts = out / ".train.parts"
    # Each is killed as soon as it has come that far; the last one at the end, while merging.
    marks = [
        parts / "00001/prepared/000000.json",
        parts / "00002/shards/000000.tar",
        parts / "00003/sources.tsv",
    ]
    for number, mark in enumerate(marks, start=1):
        kill_at(start(source, out, number), mark)
        assert list_splits(out) == [] and not (out / "train").exists()
    for number in (3, 1, 2):
        assert "not visible yet" in finish(start(source, out, number))
    kill_at(start(source, out, 4), parts / "merging")
    finish(start(source, out, 2))
    assert tree(out) == reference and not list(out.glob(".*"))


def kill_at(process, mark):
    deadline = time.monotonic() + 60
    while not mark.exists() and process.poll() is None:
        assert time.monotonic() < deadline, f"{mark} did not appear"
        time.sleep(0.001)
    if process.poll() is None:
        kill_tree(process)
    process.communicate()
