"""Reading samples: bytes, threads, bounded shards, damage."""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.reader import Reader
from mbv3dist.data.target import parse_target

NUM_SAMPLES = 40


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    for number in range(NUM_SAMPLES):
        folder = root / "src" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (8 + number % 5, 9, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    convert_imagefolder(root / "src", root / "out", split="train", workers=1, shard_bytes=10_000)
    return root


@pytest.fixture
def data(original, tmp_path):
    shutil.copytree(original / "out", tmp_path / "out")
    return tmp_path / "out"


def test_bytes_are_the_sources_on_many_threads(original):
    split = open_split(original / "out", "train")
    assert len(split.shards) > 4
    expected = [(original / "src" / split.source(i)).read_bytes() for i in range(NUM_SAMPLES)]
    with Reader(split, verify="always", max_open_shards=2) as reader:
        order = np.random.default_rng(0).integers(0, NUM_SAMPLES, 2000).tolist()
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(reader.read, order))
        assert len(reader._open) <= 2
    # Views outlive the shards that were closed meanwhile.
    for index, (picture, target) in zip(order, results, strict=True):
        assert picture == expected[index]
        assert split.classes[int(bytes(target))] == split.source(index)[0]
        assert picture.readonly


def test_targets(original):
    split = open_split(original / "out", "train")
    with Reader(split) as reader:
        for index in range(NUM_SAMPLES):
            target = reader.target(index)
            assert split.classes[target.label] == split.source(index)[0]
            assert target.boxes.shape == (0, 4) and target.width == 0
        for wrong in (-1, NUM_SAMPLES):
            with pytest.raises(ValueError, match="does not exist") as caught:
                reader.read(wrong)
            assert not isinstance(caught.value, DamagedShardError)
    with pytest.raises(ValueError, match="'open', 'first' or 'always'"):
        Reader(split, verify="never")


def test_detection_targets():
    value = {"width": 40, "height": 30, "boxes": [[0, 1, 2.5, 3]], "labels": [4], "difficult": [1]}
    target = parse_target(json.dumps(value).encode(), "detection")
    assert target.label == -1 and (target.width, target.height) == (40, 30)
    assert target.boxes.dtype == np.float32 and target.boxes.tolist() == [[0, 1, 2.5, 3]]
    assert target.labels.dtype == np.int64 and target.labels.tolist() == [4]
    assert target.difficult.dtype == np.bool_ and target.difficult.tolist() == [True]
    empty = {**value, "boxes": [], "labels": [], "difficult": []}
    assert parse_target(memoryview(json.dumps(empty).encode()), "detection").boxes.shape == (0, 4)
    wrong = [{"boxes": [[1, 2]]}, {"labels": []}, {"width": 0}, {"boxes": 3}, {"boxes": [[1] * 8]}]
    for change in wrong:
        with pytest.raises(ValueError, match=r"its .json member"):
            parse_target(json.dumps({**value, **change}).encode(), "detection")
    assert parse_target(json.dumps(value).encode(), "detection", num_classes=5).labels == [4]
    for labels, wrong in (([4], 4), ([-1], -1)):
        data = json.dumps({**value, "labels": labels}).encode()
        with pytest.raises(ValueError, match=f"class number {wrong} for 4 classes"):
            parse_target(data, "detection", num_classes=4)
    for data in (b"{", b"[]", b"\xff"):
        with pytest.raises(ValueError, match=r"its .json member"):
            parse_target(data, "detection")
    for data in (b"", b"-1", b"x", b"1.0"):
        with pytest.raises(ValueError, match=r"its .cls member"):
            parse_target(data, "classification")
    with pytest.raises(ValueError, match="class number 3 for 3 classes"):
        parse_target(b"3", "classification", num_classes=3)


def flip(path, offset, value=0xFF):
    data = bytearray(path.read_bytes())
    data[offset] ^= value
    path.write_bytes(data)


def test_wrong_size_and_missing_files(data):
    split = open_split(data, "train")
    tar = split.shards[1].path
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    first = int(split.starts[1])
    Reader(split).read(first - 1)
    with pytest.raises(DamagedShardError, match=rf"000001.tar: it has .*samples {first:09d}"):
        Reader(split).read(first)
    tar.unlink()
    with pytest.raises(DamagedShardError, match="the shard is missing"):
        Reader(split).read(first)
    tar.write_bytes(whole)
    tar.with_suffix(".idx").unlink()
    with pytest.raises(DamagedShardError, match=r"000001.idx is missing"):
        Reader(split).read(first)


def test_index_of_another_tar(data):
    split = open_split(data, "train")
    shutil.copy(split.shards[0].path.with_suffix(".idx"), split.shards[1].path.with_suffix(".idx"))
    with pytest.raises(DamagedShardError, match=r"000001.tar: its .idx"):
        Reader(split).read(int(split.starts[1]))


def test_index_that_disagrees_with_the_tar(data):
    split = open_split(data, "train")
    path = split.shards[0].path.with_suffix(".idx")
    lines = path.read_text().split("\n")
    words = [line.split(" ") for line in lines[1:3]]
    words[0][1:3], words[1][1:3] = words[1][1:3], words[0][1:3]
    path.write_text("\n".join([lines[0], *(" ".join(row) for row in words), *lines[3:]]))
    with pytest.raises(
        DamagedShardError, match=r"its .idx and the tar disagree from sample 0000000"
    ):
        Reader(split).read(0)
    path.write_text("\n".join(lines).replace("jpg 512 ", "jpg 512 9"))
    with pytest.raises(DamagedShardError, match=r"its .idx and the tar disagree"):
        Reader(split).read(0)
    path.write_text(re.sub(r" cls (\d+) 1 ", r" cls \1 2 ", "\n".join(lines), count=1))
    source = split.source(0).replace(".", r"\.")
    with pytest.raises(DamagedShardError, match=rf"000000.tar: sample 000000000 \({source}\): ind"):
        Reader(split).read(0)


def test_checksums_find_a_flipped_bit(data):
    split = open_split(data, "train")
    with Reader(split) as reader:
        size = len(reader.read(0)[0])
    flip(split.shards[0].path, 512 + size // 2, 1)
    Reader(split, verify="open").read(0)
    Reader(split, verify="first").read(0, first=False)
    for verify, first in (("always", False), ("first", True)):
        with pytest.raises(
            DamagedShardError, match=r"checksum of its .jpg member at byte 512 is wrong"
        ):
            Reader(split, verify=verify).read(0, first=first)
    split.shards[0].path.with_suffix(".crc").write_bytes(b"")
    with pytest.raises(DamagedShardError, match=r"000000.crc has 0 bytes"):
        Reader(split).read(0)


def test_a_file_that_changes_while_it_is_read(data):
    """Even where checksums are off: a file that somebody wrote to is checked from then on."""
    split = open_split(data, "train")
    tar = split.shards[0].path
    with Reader(split, verify="open") as reader:
        size = len(reader.read(0)[0])
        os.utime(tar)
        assert len(reader.read(0)[0]) == size
        with open(tar, "r+b") as file:
            file.seek(512 + size // 2)
            byte = file.read(1)
            file.seek(512 + size // 2)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(DamagedShardError, match=r"checksum of its .jpg member"):
            reader.read(0)
        with open(tar, "r+b") as file:
            file.truncate(700)
        message = "the tar ends at byte 700; it was cut short while it was read"
        with pytest.raises(DamagedShardError, match=message):
            reader.read(0)


def test_a_file_that_is_replaced_while_it_is_read(data):
    split = open_split(data, "train")
    tar = split.shards[0].path
    with Reader(split) as reader:
        before = bytes(reader.read(0)[0])
        (data / "new").write_bytes(b"something else")
        os.replace(data / "new", tar)
        assert reader.read(0)[0] == before, "the file that was opened is still there"


def test_no_file_stays_open(data):
    def open_files():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        names = [os.path.realpath(link) for link in links]
        return sorted(name for name in names if name.startswith(str(data)))

    before = open_files()
    split = open_split(data, "train")
    with Reader(split, max_open_shards=2) as reader:
        for index in range(NUM_SAMPLES):
            reader.read(index)
        assert 1 <= len(open_files()) <= 2
    assert open_files() == before


def test_damaged_header_and_target(data):
    split = open_split(data, "train")
    flip(split.shards[0].path, 0)
    with pytest.raises(DamagedShardError, match=r"000000000.jpg expected"):
        Reader(split).read(0)
    (data / "train.sources.tsv").unlink()
    with pytest.raises(DamagedShardError, match="source unknown"):
        Reader(open_split(data, "train")).read(0)
    with Reader(split) as reader:
        offset = int(reader._shard(1).index.target_offset[0])
    index = int(split.starts[1])
    flip(split.shards[1].path, offset, ord("0") ^ ord("7"))
    with pytest.raises(DamagedShardError, match=r"class number [67] for 2 classes"):
        Reader(split, verify="open").target(index)
    flip(split.shards[1].path, offset, 0x80)
    with pytest.raises(DamagedShardError, match="not a class number"):
        Reader(split, verify="open").target(index)
    with pytest.raises(DamagedShardError, match=r"checksum of its .cls member"):
        Reader(split).target(index)
