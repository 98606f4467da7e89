"""Conversion in parts: the same samples in the same order, whatever is started when."""

import itertools
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import NUM_PICTURES, content, convert, convert_all, tree, whole_after, write_source
from PIL import Image

from mbv3dist.convert import conversion, work
from mbv3dist.convert.order import PackOrder
from mbv3dist.convert.records import Box, ConversionError, Job, Record, Settings, parse_part
from mbv3dist.convert.samples import sample_labels, take_ragged
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import list_splits, open_split


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("pictures") / "src")


@pytest.fixture(scope="module")
def broken(source, tmp_path_factory):
    """The same, with every ninth picture cut off."""
    root = tmp_path_factory.mktemp("broken") / "src"
    shutil.copytree(source, root)
    for path in sorted(root.rglob("*.jpg"))[::9]:
        path.write_bytes(path.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc") / "VOC"
    root.mkdir()
    rng = np.random.default_rng(1)
    for number in range(31):
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(root / f"{number}.jpg")
        text = ""
        for place in range(number % 5):
            name = ("cat", "dog", "emu")[min(place, 2)]
            # Each seventh picture has a box wholly outside of it.
            x = 60 if number % 7 == 0 and place == 1 else 2 + place
            text += (
                f"<object><name>{name}</name><bndbox><xmin>{x}</xmin><ymin>3</ymin>"
                f"<xmax>{x + 9}</xmax><ymax>11</ymax></bndbox></object>"
            )
        (root / f"{number}.xml").write_text(f"<annotation>{text}</annotation>")
    return root


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_parts_hold_the_same_samples_in_the_same_order(source, tmp_path, count):
    convert(source, tmp_path / "whole", val_fraction=0.2)
    order = np.random.default_rng(count).permutation(count) + 1
    report = convert_all(source, tmp_path / "parts", count, order.tolist(), val_fraction=0.2)
    whole_after(tmp_path / "parts")
    for split in ("train", "val"):
        assert content(tmp_path / "parts", split) == content(tmp_path / "whole", split)
        assert report.splits[split].samples == len(open_split(tmp_path / "whole", split))
    if count == 1:
        assert tree(tmp_path / "parts") == tree(tmp_path / "whole")
    for part in (None, (1, count), (2, count + 5)):  # made before, however it was divided
        assert convert(source, tmp_path / "parts", part, val_fraction=0.2).reused
    whole_after(tmp_path / "parts")


def test_bytes_do_not_depend_on_who_is_first_or_on_workers(source, tmp_path):
    trees = []
    for number, order in enumerate(itertools.permutations((1, 2, 3))):
        out = tmp_path / str(number)
        convert_all(source, out, 3, order, workers=2 if number == 5 else 1)
        trees.append(tree(out))
    assert all(item == trees[0] for item in trees)


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_keys_have_gaps_at_the_ends_of_parts_only(broken, tmp_path, count):
    convert(broken, tmp_path / "whole", on_error="skip")
    convert_all(broken, tmp_path / "parts", count, on_error="skip")
    whole_after(tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    rows = json.loads((tmp_path / "parts/train.json").read_text())["shardlist"]
    split = open_split(tmp_path / "parts", "train")
    assert any("first_key" in row for row in rows) == (count > 1)
    total = 0
    for row, shard in zip(rows, split.shards, strict=True):
        assert row.get("first_key", total) == shard.first_key
        assert ("first_key" in row) == (shard.first_key != total)
        total += shard.num_samples
    keys = [int(split.key(index)) for index in range(len(split))]
    assert keys == sorted(set(keys)) and keys[-1] < NUM_PICTURES
    jumps = [b for a, b in itertools.pairwise(keys) if b != a + 1]
    assert set(jumps) <= {number * NUM_PICTURES // count for number in range(count)}


def test_each_problem_is_named_by_one_part_and_nothing_is_published(broken, tmp_path):
    (broken / "loose.jpg").write_bytes(b"")
    try:
        with pytest.raises(ConversionError) as whole:
            convert(broken, tmp_path / "whole")
        named = []
        for number in (1, 2, 3):
            with pytest.raises(ConversionError) as caught:
                convert(broken, tmp_path / "parts", (number, 3))
            path = tmp_path / f"parts/train.part{number}of3.failed.json"
            assert f"(listed in {path}):" in str(caught.value)
            listed = json.loads(path.read_text())
            assert [item["file"] for item in listed["problems"]] == [
                problem.file for problem in caught.value.problems
            ]
            named += caught.value.problems
        assert sorted(map(str, named)) == sorted(map(str, whole.value.problems))
        assert list_splits(tmp_path / "parts") == []
        assert not (tmp_path / "parts/train").exists()
        # What was prepared is kept: skipping needs no second look at a picture.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "prepare_chunk", None)
            report = convert_all(broken, tmp_path / "parts", 3, (3, 1, 2), on_error="skip")
        whole_after(tmp_path / "parts")
        assert list(report.splits["train"].problems) == whole.value.problems
        with pytest.raises(ConversionError, match=r"listed in .*/parts/train\.report\.json\)"):
            convert(broken, tmp_path / "parts", (2, 3))
    finally:
        (broken / "loose.jpg").unlink()


def test_a_mended_picture_is_prepared_again_by_its_part_only(source, tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(source, src)
    for path in sorted(src.rglob("*.jpg"))[::30]:
        path.write_bytes(path.read_bytes()[:-100])
    failed = []
    for number in range(1, 7):
        try:
            convert(src, out, (number, 6))
        except ConversionError:
            failed.append(number)
    assert 0 < len(failed) < 6
    for path in src.rglob("*.jpg"):
        path.write_bytes((source / path.relative_to(src)).read_bytes())
    again = []
    with pytest.MonkeyPatch.context() as patch:
        prepare = work.prepare_chunk
        patch.setattr(
            work, "prepare_chunk", lambda *args: again.append(args[2].parent.name) or prepare(*args)
        )
        for number in failed:
            report = convert(src, out, (number, 6))
    assert not report.waiting and again == [f"{number:05d}" for number in failed]
    whole_after(out)
    convert(src, tmp_path / "whole")
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "--seed: 0 there, 1 here"),
        ({"shard_bytes": 9999}, "the shard size: 20000 there, 9999 here"),
        ({"resize": 5}, "--resize: None there, 5 here"),
        ({"quality": 50}, "--quality: 90 there, 50 here"),
        ({"part": (2, 4)}, "the number of parts: 3 there, 4 here"),
        ({"val_fraction": 0.5}, "--val-fraction: 0.0 there, 0.5 here"),
        ({"classes": ["a", "b", "c", "d"]}, "the class list: d new here"),
        ({"classes": ["b", "a", "c"]}, "the class list: another order, class 0 is 'a' there"),
    ],
)
def test_parts_must_be_started_alike(source, tmp_path, changed, words):
    convert(source, tmp_path, (1, 3))
    before = tree(tmp_path)
    options = {"part": (2, 3), **changed}
    with pytest.raises(ValueError, match="does not fit to the parts started before") as caught:
        convert(source, tmp_path, **options)
    message = str(caught.value)
    assert words in message and "\n" not in message and "remove" in message
    assert tree(tmp_path) == before


def test_other_pictures_and_other_versions_are_refused(source, tmp_path, monkeypatch):
    src, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(source, src)
    convert(src, out, (1, 3))
    (src / "a/more.jpg").write_bytes((src / "a/003.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"the number of pictures: 83 there, 84 here"):
        convert(src, out, (2, 3))
    (src / "a/more.jpg").unlink()
    (src / "a/003.jpg").rename(src / "a/004.jpg")
    with pytest.raises(ValueError, match=r"the list of pictures: [0-9a-f]{16} there, [0-9a-f]"):
        convert(src, out, (2, 3))
    (src / "a/004.jpg").rename(src / "a/003.jpg")
    monkeypatch.setattr(conversion, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"the version of mbv3dist: .* there, 9.9.9 here"):
        convert(src, out, (2, 3))


def test_annotations_that_changed_behind_a_part_are_named(voc, tmp_path):
    src, out = tmp_path / "VOC", tmp_path / "out"
    shutil.copytree(voc, src)
    options = {"split": "train", "workers": 1, "on_error": "skip"}
    convert_voc(src, out, part=(1, 2), **options)
    for path in src.glob("*.xml"):
        path.write_text(path.read_text().replace("<xmin>2<", "<xmin>1<"))
    with pytest.raises(ValueError, match=r"part 1/2 .* was made from other .*; start that part"):
        convert_voc(src, out, part=(2, 2), **options)
    assert not convert_voc(src, out, part=(1, 2), **options).waiting
    whole_after(out)


@pytest.mark.parametrize("task", ["boxes", "largest", "crops"])
@pytest.mark.parametrize("count", [2, 5])
def test_voc_in_parts(voc, tmp_path, task, count):
    options = {"split": "train", "workers": 1, "on_error": "skip", "shard_bytes": 20_000}
    if task != "boxes":
        options.update(task="classification", object_crops=task == "crops")
    whole, out = tmp_path / "whole", tmp_path / "out"
    convert_voc(voc, whole, **options)
    for number in range(1, count + 1):
        report = convert_voc(voc, out, part=(number, count), **options)
    whole_after(out)
    assert content(out) == content(whole)
    assert report.splits["train"].boxes == open_split(whole, "train").num_boxes
    labels = open_split(out, "train").labels().tolist()
    for label, (_, sample) in zip(labels, content(out)[0], strict=True):
        if task == "boxes":  # emu is rarer than dog, dog rarer than cat
            assert label == max(sample["json"]["labels"], default=-1)
        else:
            assert label == sample["cls"]


def test_with_parts_overwrite_replaces_other_splits_only(source, tmp_path):
    convert(source, tmp_path, seed=5)
    with pytest.raises(ValueError, match="other input or settings; replace it with --overwrite"):
        convert(source, tmp_path, (1, 2))
    first = tree(tmp_path)
    convert(source, tmp_path, (1, 2), overwrite=True)
    visible = {name: data for name, data in tree(tmp_path).items() if not name.startswith(".")}
    assert visible == first  # until the last part ends
    assert convert(source, tmp_path, seed=5).reused  # and that leaves the parts alone
    convert(source, tmp_path, (2, 2), overwrite=True)
    whole_after(tmp_path)
    done = tree(tmp_path)
    assert done != first
    # An array job that is queued again with the same words.
    assert convert(source, tmp_path, (1, 2), overwrite=True).reused
    assert tree(tmp_path) == done


def test_a_part_is_not_done_twice_at_once(source, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    convert(source, tmp_path, (1, 3))
    with open(tmp_path / ".train.parts/00002.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"another conversion .* \(it holds 00002.lock\)"):
            convert(source, tmp_path, (2, 3))
        convert(source, tmp_path, (3, 3))
    # Nor an undivided conversion while a part is at work.
    with open(tmp_path / ".train.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match="another conversion"):
            convert(source, tmp_path)
    assert not convert(source, tmp_path, (2, 3)).waiting
    whole_after(tmp_path)


def test_a_split_without_a_usable_sample_is_not_published(tmp_path):
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/1.jpg").write_bytes(b"")
    convert(tmp_path / "src", tmp_path / "out", (1, 2), on_error="skip")
    with pytest.raises(ValueError, match="split 'train' has no usable sample"):
        convert(tmp_path / "src", tmp_path / "out", (2, 2), on_error="skip")
    assert list_splits(tmp_path / "out") == []


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1/0"])
def test_wrong_parts(source, tmp_path, text):
    with pytest.raises(ValueError, match=r"--part is .*; use I/N"):
        convert(source, tmp_path / "out", parse_part(text))
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    boxes=st.lists(st.integers(0, 4), max_size=40),
    label_from=st.sampled_from(["folder", "boxes", "largest", "crops"]),
    count=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
)
def test_shares_are_a_partition_of_one_order(boxes, label_from, count, seed):
    box = Box((0, 0, 1, 1), 0, False, 1)
    job = Job("train", [Record("r", str(n), boxes=(box,) * k) for n, k in enumerate(boxes)])
    task = "detection" if label_from == "boxes" else "classification"
    order = PackOrder(job, Settings(task, label_from, None, 90), seed)
    shares = [order.share(number, count) for number in range(1, count + 1)]
    places = np.concatenate([share.places for share in shares])
    assert places.tolist() == order.share(1, 1).places.tolist()
    assert sorted(places) == list(range(order.starts[-1]))
    assert max(len(s.places) for s in shares) - min(len(s.places) for s in shares) <= 1
    first = 0
    for share in shares:
        assert share.first == first
        first += len(share.places)
        holders = np.searchsorted(order.starts, share.places, side="right") - 1
        assert set(holders) <= set(share.records.tolist())
        assert share.records.tolist() == sorted(set(share.records.tolist()))
    owners = np.concatenate([share.records[share.owned] for share in shares])
    assert sorted(owners) == list(range(len(boxes)))  # each record counts once


@given(
    labels=st.lists(st.lists(st.integers(0, 5), unique=True).map(sorted), max_size=30),
    data=st.data(),
)
def test_labels_of_samples(labels, data):
    pictures = [sum(label in row for row in labels) for label in range(6)]
    expected = [min(row, key=lambda n: (pictures[n], n), default=-1) for row in labels]
    counts = np.array([len(row) for row in labels], np.int32)
    flat = np.array([label for row in labels for label in row], np.int32)
    assert sample_labels(counts, flat, 6).tolist() == expected
    order = np.array(data.draw(st.permutations(range(len(labels)))), np.int64)
    taken = take_ragged(flat, counts, order)
    assert taken.tolist() == [label for number in order for label in labels[number]]
