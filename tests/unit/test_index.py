"""What is in a data set: splits, positions, sources, broken descriptions."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.inspect import inspect_dataset
from mbv3dist.data.idx import DamagedShardError, read_idx
from mbv3dist.data.index import list_splits, open_split

NUM_SAMPLES = 23


@pytest.fixture
def data(tmp_path):
    for number in range(NUM_SAMPLES):
        folder = tmp_path / "src" / ("cat", "a dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.jpg")
    out = tmp_path / "out"
    convert_imagefolder(tmp_path / "src", out, split="train", workers=1, shard_bytes=8000)
    return out


def test_locate_is_the_inverse_of_starts(data):
    split = open_split(data, "train")
    assert len(split) == NUM_SAMPLES and len(split.shards) > 3
    assert split.starts.dtype == np.int64 and split.starts[-1] == NUM_SAMPLES
    for index in range(NUM_SAMPLES):
        shard, position = split.locate(index)
        assert 0 <= position < split.shards[shard].num_samples
        assert split.starts[shard] + position == index
        assert split.key(index) == f"{index:09d}"
    for wrong in (-1, NUM_SAMPLES):
        with pytest.raises(ValueError, match="does not exist"):
            split.locate(wrong)


def test_sources_name_the_sample(data):
    split = open_split(data, "train")
    sources = [split.source(index) for index in range(NUM_SAMPLES)]
    assert len(set(sources)) == NUM_SAMPLES
    for index, source in enumerate(sources):
        assert split.classes[split.sample(index)["cls"]] == source.split("/")[0]
        assert split.sample(index)["jpg"] == (data.parent / "src" / source).read_bytes()


def test_missing_or_wrong_sources_are_errors(data):
    path = data / "train.sources.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="has no line for 000000000"):
        open_split(data, "train").source(0)
    path.unlink()
    with pytest.raises(ValueError, match=r"sources.tsv is missing"):
        open_split(data, "train").source(0)


def test_fingerprint_is_free_of_location(data, tmp_path):
    first = open_split(data, "train")
    shutil.move(data, tmp_path / "moved")
    moved = open_split(tmp_path / "moved", "train")
    assert moved.fingerprint == first.fingerprint and len(first.fingerprint) == 64
    path = tmp_path / "moved" / "train.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "classes": value["classes"][::-1]}))
    assert open_split(tmp_path / "moved", "train").fingerprint != first.fingerprint


def test_unknown_splits_name_what_there_is(data, tmp_path):
    assert list_splits(data) == ["train"]
    with pytest.raises(ValueError, match="it has train"):
        open_split(data, "test")
    with pytest.raises(ValueError, match="no finished split"):
        open_split(tmp_path / "src", "train")
    with pytest.raises(ValueError, match="no data set folder"):
        open_split(tmp_path / "missing", "train")
    with pytest.raises(ValueError, match="no finished split"):
        inspect_dataset(tmp_path / "src")


def test_inspect(data):
    split = open_split(data, "train")
    num_bytes = sum(shard.path.stat().st_size for shard in split.shards)
    sizes = {"samples": NUM_SAMPLES, "boxes": 0, "shards": len(split.shards), "bytes": num_bytes}
    sizes["format"] = "jpeg"
    assert inspect_dataset(data) == {
        "task": "classification",
        "classes": ["a dog", "cat"],
        "splits": {"train": sizes},
    }


@pytest.mark.parametrize(
    "change",
    [
        {"wids_version": 2},
        {"task": "poetry"},
        {"classes": None},
        {"shardlist": [{"url": "train/000000.tar"}]},
        {"shardlist": [{"url": "x.tar", "nsamples": "a", "filesize": 1, "sha256": ""}]},
        {"shardlist": [{"url": "x.tar", "nsamples": -1, "filesize": 1, "sha256": ""}]},
        {"boxes": "many"},
        {"shardlist": [{"url": "../x.tar", "nsamples": 1, "filesize": 1, "sha256": ""}]},
        {"shardlist": [{"url": "pipe:cat x", "nsamples": 1, "filesize": 1, "sha256": ""}]},
        {"shardlist": [{"url": "/x.tar", "nsamples": 1, "filesize": 1, "sha256": ""}]},
    ],
)
def test_broken_descriptions_are_errors(data, change):
    path = data / "train.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=r"train.json"):
        open_split(data, "train")


def test_json_files_of_others_are_no_splits(data):
    for name in ("notes", "train.failed", "train.report"):
        (data / name).mkdir()
        (data / f"{name}.json").write_text('{"mine": 1}')
    (data / "list.json").write_text("[]")
    assert list_splits(data) == ["train"]
    assert inspect_dataset(data)["splits"].keys() == {"train"}
    (data / "train.json").write_text('{"wids_ver')
    with pytest.raises(ValueError, match=r"train.json is not a split description"):
        open_split(data, "train")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1.1 1\njpg 512 3 0.jpg cls 1536 1 0.cls\n",
        "v1.2 2\njpg 512 3 0.jpg cls 1536 1 0.cls\n",
        "v1.2 1\njpg 512 3 0.jpg cls 1536 1 0.cls",
        "v1.2 1\njpg 512 3 0.jpg\n",
        "v1.2 1\njpg x 3 0.jpg cls 1536 1 0.cls\n",
        "v1.2 1\njpg 99999999999999999999 3 0.jpg cls 1536 1 0.cls\n",
    ],
)
def test_broken_indexes_are_named(tmp_path, text):
    path = tmp_path / "000000.idx"
    path.write_text(text)
    with pytest.raises(DamagedShardError, match=r"000000.idx"):
        read_idx(path)


def test_missing_index_is_named(tmp_path):
    with pytest.raises(DamagedShardError, match="is missing"):
        read_idx(tmp_path / "000000.idx")
