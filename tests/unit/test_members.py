"""Chunks of members: what one sample's reader and parser say, for many at once."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.reader import Members, Reader
from mbv3dist.data.target import parse_target
from mbv3dist.data.targets import parse_targets

NUM_CLASSES = 5


def members(texts):
    """Members whose targets are these texts; pictures are empty."""
    arrays = [np.frombuffer(text, np.uint8) if text else np.zeros(1, np.uint8) for text in texts]
    addresses = np.array([[0, a.__array_interface__["data"][0]] for a in arrays], np.int64)
    sizes = np.array([[0, len(text)] for text in texts], np.int64)
    views = [memoryview(text) for text in texts]
    result = Members(list(range(len(texts))), views, views, addresses, sizes)
    result.kept = arrays
    return result


def check_equal(texts, task):
    """Each is parsed as alone, or refused with the same words."""
    targets, errors = parse_targets(members(texts), task, num_classes=NUM_CLASSES)
    assert targets.starts[-1] == len(targets.boxes) == len(targets.labels)
    for n, text in enumerate(texts):
        if n in errors:
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are compared
                parse_target(text, task, num_classes=NUM_CLASSES)
            assert str(caught.value) == str(errors[n])
            assert targets.starts[n] == targets.starts[n + 1]
            continue
        expected = parse_target(text, task, num_classes=NUM_CLASSES)
        found = targets.one(n)
        assert found.label == expected.label
        assert (found.width, found.height) == (expected.width, expected.height)
        for name in ("boxes", "labels", "difficult"):
            mine, theirs = getattr(found, name), getattr(expected, name)
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            assert (mine == theirs).all()


numbers = st.one_of(
    st.integers(0, 2000),
    st.floats(0, 2000, allow_nan=False).map(lambda x: round(x, 3)),
    st.floats(-10, 1e9, allow_nan=False),
)


@st.composite
def targets_of_pictures(draw):
    count = draw(st.integers(0, 6))
    boxes = []
    for _ in range(count):
        x, y = sorted(draw(st.tuples(numbers, numbers))), sorted(draw(st.tuples(numbers, numbers)))
        boxes.append([x[0], y[0], x[1], y[1]])
    value = {
        "width": draw(st.integers(1, 5000)),
        "height": draw(st.integers(1, 5000)),
        "boxes": boxes,
        "labels": draw(st.lists(st.integers(0, NUM_CLASSES), min_size=count, max_size=count)),
        "difficult": draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)),
    }
    separators = draw(st.sampled_from([(",", ":"), (",", ":"), (", ", ": ")]))
    return json.dumps(value, separators=separators).encode()


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(targets_of_pictures(), min_size=1, max_size=5))
def test_boxes_are_parsed_as_by_json(texts):
    check_equal(texts, "detection")


@settings(max_examples=150, deadline=None)
@given(text=targets_of_pictures(), data=st.data())
def test_mutated_boxes_are_refused_alike(text, data):
    place = data.draw(st.integers(0, len(text) - 1))
    byte = data.draw(st.sampled_from(b'0123456789.,-+eE[]{}"x \x00\xff'))
    changed = text[:place] + bytes([byte]) + text[place + 1 :]
    check_equal([text, changed, changed[:place], text + b" "], "detection")


ODD_NUMBERS = ("1e3", "-0", "00", "1.", ".5", "123456789012345678", "0.1234567890123456", "1.5e-3")


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_odd_numbers_are_read_or_refused_alike(number):
    text = '{"width":9,"height":9,"boxes":[[NUMBER,1,2000,2]],"labels":[1],"difficult":[0]}'
    check_equal([text.replace("NUMBER", number).encode()], "detection")


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("0123456789 -x", max_size=11).map(str.encode), min_size=1))
def test_classes_are_parsed_as_alone(texts):
    check_equal(texts, "classification")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("members")
    for n in range(40):
        folder = root / "in" / f"c{n % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + n, 30), (5 * n, 0, 0)).save(folder / f"{n}.jpg")
    convert_imagefolder(root / "in", out=root / "out", split="train", shard_bytes=20_000)
    return open_split(root / "out", "train")


def test_a_chunk_is_its_samples(split):
    order = np.random.default_rng(0).permutation(len(split)).tolist()
    assert len(split.shards) > 2
    with Reader(split) as reader:
        chunk, errors = reader.read_chunk(order, [True] * len(order))
        assert errors == {}
        assert chunk.places == list(range(len(order)))
        for n, index in enumerate(order):
            picture, target = reader.read(index)
            assert chunk.pictures[n] == picture
            assert chunk.targets[n] == target
            address, size = chunk.addresses[n, 0], chunk.sizes[n, 0]
            base = np.frombuffer(chunk.pictures[n], np.uint8).__array_interface__["data"][0]
            assert (base, len(picture)) == (address, size)


def test_damage_in_a_chunk_is_that_of_the_sample(split, tmp_path):
    """One flipped byte anywhere in a shard: the same samples fail, with the same words."""
    shard = split.shards[1].path
    data = shard.read_bytes()
    rng = np.random.default_rng(0)
    order = list(range(len(split)))
    seen = 0
    try:
        for place in rng.integers(0, len(data), 60).tolist():
            changed = bytearray(data)
            changed[place] ^= 1 << int(rng.integers(8))
            shard.write_bytes(bytes(changed))
            with Reader(split) as reader:
                chunk, errors = reader.read_chunk(order, [True] * len(order))
                assert sorted([*chunk.places, *errors]) == order
                for index in order:
                    if index not in errors:
                        reader.read(index)
                        continue
                    with pytest.raises(DamagedShardError) as caught:
                        reader.read(index)
                    assert str(caught.value) == str(errors[index])
                    seen += 1
    finally:
        shard.write_bytes(data)
    assert seen > 10


def test_without_checksums_headers_are_checked_all_the_same(split):
    shard = split.shards[1].path
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[:3] + b"9" + data[4:])
        with Reader(split, verify="open") as reader:
            first = int(split.starts[1])
            _, errors = reader.read_chunk([0, first], [False, False])
            assert list(errors) == [1]
            assert "index and tar disagree" in str(errors[1])
    finally:
        shard.write_bytes(data)


def test_a_sample_that_is_not_there_does_not_hide_others(split):
    with Reader(split) as reader:
        chunk, errors = reader.read_chunk([0, 10**6, 1], [True] * 3)
        assert chunk.places == [0, 2]
        assert "does not exist" in str(errors[1])


def test_json_of_other_writers_is_taken():
    text = json.dumps(
        {"boxes": [[1, 2, 3, 4]], "labels": [0], "difficult": [False], "height": 9, "width": 8}
    )
    check_equal([text.encode(), io.BytesIO(b"{}").getvalue()], "detection")
