"""Verify finds what is wrong and names it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.verify import verify_dataset
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import open_split

NUM_SAMPLES = 12


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify") / "voc"
    root.mkdir()
    rng = np.random.default_rng(0)
    box = "<xmin>2</xmin><ymin>3</ymin><xmax>9</xmax><ymax>11</ymax>"
    for number in range(NUM_SAMPLES):
        noise = rng.integers(0, 256, (20, 16, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{number}.jpg")
        objects = f"<object><name>cat</name><bndbox>{box}</bndbox></object>" * (number % 3)
        (root / f"{number}.xml").write_text(f"<annotation>{objects}</annotation>")
    convert_voc(root, root.parent / "out", split="train", workers=1, shard_bytes=10_000)
    return root.parent / "out"


@pytest.fixture
def data(original, tmp_path):
    shutil.copytree(original, tmp_path / "out")
    return tmp_path / "out"


def problems(data):
    result = verify_dataset(data)
    assert result["ok"] == (not result["problems"])
    return "\n".join(result["problems"])


def edit(path, old, new):
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def test_a_whole_data_set(original):
    assert verify_dataset(original) == {"ok": True, "samples": NUM_SAMPLES, "problems": []}
    assert verify_dataset(original, ["train"])["ok"]
    with pytest.raises(ValueError, match="no split 'test'"):
        verify_dataset(original, ["test"])
    shards, seen = len(open_split(original, "train").shards), []
    verify_dataset(original, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, shards) for number in range(1, shards + 1)] and shards > 1
    with pytest.raises(ValueError, match="no finished split"):
        verify_dataset(original / "train")


def test_every_flipped_byte_is_found(data):
    tar = open_split(data, "train").shards[0].path
    whole = tar.read_bytes()
    for offset in range(3, len(whole), 997):
        changed = bytearray(whole)
        changed[offset] ^= 0x10
        tar.write_bytes(changed)
        assert "train/000000.tar: its SHA-256" in problems(data)
    tar.write_bytes(whole)
    assert not problems(data)


@pytest.mark.parametrize("suffix", [".idx", ".crc", ".tar"])
def test_missing_or_changed_files(data, suffix):
    path = open_split(data, "train").shards[1].path.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-4])
    assert f"train/000001{suffix}: " in problems(data)
    path.unlink()
    assert f"train/000001{suffix}: " in problems(data)


def test_targets_are_checked_and_named(data):
    split = open_split(data, "train")
    index = next(i for i in range(NUM_SAMPLES) if split.sample(i)["json"]["boxes"])
    tar = split.shards[split.locate(index)[0]].path
    where = f"{split.key(index)} ({split.source(index)})"
    for old, new, reason in (
        (b"[[1,2,9,11]", b"[[9,2,9,11]", "no area"),
        (b"[[9,2,9,11]", b"[[1,2,9,21]", "reaches outside"),
        (b'"labels":[0', b'"labels":[7', "class number 7 for 1 classes"),
        (b'"width":16', b'"width":15', "the picture is 16x20"),
        (b'{"width"', b'{"weird"', "is no target"),
    ):
        edit(tar, old, new)
        found = problems(data)
        assert where in found and reason in found


def test_picture_headers_are_checked(data):
    tar = open_split(data, "train").shards[0].path
    edit(tar, b"\xff\xd8\xff", b"\xff\xd8\x00")
    assert "its picture is no RGB JPEG" in problems(data)


def test_damaged_tar_structure(data):
    tar = open_split(data, "train").shards[0].path
    edit(tar, b"000000001.jpg", b"000000009.jpg")
    assert "damaged tar header" in problems(data)


def test_description_and_sources(data):
    path = data / "train.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "boxes": 99}))
    assert f"says 99 boxes, the shards hold {NUM_SAMPLES}" in problems(data)
    path.write_text(json.dumps(value))
    shutil.copy(data / "train/000000.tar", data / "train/000099.tar")
    assert "train/000099.tar: not listed" in problems(data)
    (data / "train/000099.tar").unlink()
    (data / "train.sources.tsv").write_text("")
    assert "has 0 lines for 12 samples" in problems(data)
