"""Several data sets as one: keys, bytes, labels, what is refused, and how recipes name them."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.data.decode import Picture
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.joined import JoinedSplit, choose_pass, open_splits
from mbv3dist.data.loader import Loader, eval_batches
from mbv3dist.data.passes import BalancedPass, WeightedPass
from mbv3dist.data.plan import Plan
from mbv3dist.data.reader import Reader
from mbv3dist.recipe import load_config

PLAIN = ViewConfig(name="resize", flip=0)
SIZES = {"first": 23, "second": 11, "third": 6}


def convert(root: Path, name: str, num_pictures: int, *, classes=("cat", "dog")) -> Path:
    """A data set of noise with all classes but, where there are few pictures, the last."""
    rng = np.random.default_rng(num_pictures)
    for number in range(num_pictures):
        folder = root / f"{name} src" / classes[number % 2 if num_pictures > 6 else 0]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")
    source = root / f"{name} src"
    convert_imagefolder(
        source, root / name, split="train", classes=classes, workers=1, shard_bytes=12_000
    )
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, size in SIZES.items():
        convert(root, name, size)
    return root


@pytest.fixture(scope="module")
def joined(root) -> JoinedSplit:
    split = open_splits([root / name for name in SIZES], "train")
    assert isinstance(split, JoinedSplit)
    return split


def test_every_sample_is_that_of_its_data_set(root, joined):
    parts = [open_split(root / name, "train") for name in SIZES]
    assert [len(part) for part in parts] == list(SIZES.values())
    assert len(joined) == sum(SIZES.values())
    assert (joined.task, joined.classes) == (parts[0].task, parts[0].classes)
    assert len(joined.shards) == sum(len(part.shards) for part in parts) > len(parts)
    assert joined.shard_sizes.tolist() == [n for part in parts for n in part.shard_sizes.tolist()]
    assert [s.path for s in joined.shards] == [s.path for part in parts for s in part.shards]
    numbers = [(number, own) for number, part in enumerate(parts) for own in range(len(part))]
    keys = [f"{number}:{own:09d}" for number, own in numbers]
    assert joined.keys(np.arange(len(joined))) == keys
    with Reader(joined, verify="always") as reader:
        for index, (number, own) in enumerate(numbers):
            part = parts[number]
            assert joined.part_of(index) == (number, own)
            assert joined.key(index) == keys[index]
            assert joined.source(index) == part.source(own)
            sample = part.sample(own)
            picture, target = reader.read(index)
            assert (bytes(picture), int(bytes(target))) == (sample["jpg"], sample["cls"])
            assert joined.labels()[index] == part.labels()[own] == sample["cls"]
    for index in (-1, len(joined)):
        with pytest.raises(ValueError, match="does not exist"):
            joined.key(index)
        with pytest.raises(ValueError, match="does not exist"):
            joined.part_of(index)


def test_one_data_set_is_not_joined(root):
    split = open_splits([root / "first"], "train")
    assert not isinstance(split, JoinedSplit)
    assert split.key(3) == "000000003"


def test_the_fingerprint_is_that_of_all_parts_in_their_order(root, joined, tmp_path):
    paths = [root / name for name in SIZES]
    shutil.copytree(root / "second", tmp_path / "elsewhere")
    moved = open_splits([paths[0], tmp_path / "elsewhere", paths[2]], "train")
    assert moved.fingerprint == joined.fingerprint
    others = [paths[:2], paths[1:], [paths[1], paths[0], paths[2]], paths[:1], paths[1:2]]
    prints = {open_splits(choice, "train").fingerprint for choice in others}
    assert len(prints) == len(others)
    assert joined.fingerprint not in prints


def test_the_same_data_set_twice_is_refused(root, tmp_path):
    shutil.copytree(root / "third", tmp_path / "copy")
    for twice in (root / "third", tmp_path / "copy"):
        with pytest.raises(ValueError, match="is given twice; give each data set once") as error:
            open_splits([root / "third", root / "first", twice], "train")
        assert "third" in str(error.value) or "copy" in str(error.value)


def test_other_tasks_and_classes_are_refused(root, tmp_path, detection_data):
    first = root / "first"
    with pytest.raises(ValueError, match=r"is a detection data set and .*first a classification"):
        open_splits([first, detection_data], "train")
    other = convert(tmp_path, "other", 7, classes=("cat", "doge"))
    with pytest.raises(ValueError, match=r"class 1 is 'doge' and 'dog'; .*--classes FILE") as error:
        open_splits([first, root / "second", other], "train")
    assert re.search(r"/other and .*/first differ", str(error.value))
    more = convert(tmp_path, "more", 9, classes=("cat", "dog", "emu"))
    with pytest.raises(ValueError, match="class 2 is 'emu' and 'nothing'"):
        open_splits([first, more], "train")
    convert_imagefolder(root / "first src", tmp_path / "both", split="val", workers=1)
    with pytest.raises(ValueError, match=r"no split 'val' in .*second"):
        open_splits([tmp_path / "both", root / "second"], "val")


def test_a_damaged_sample_is_named_with_its_data_set(root, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(root / name, tmp_path / name)
    split = open_splits([tmp_path / "first", tmp_path / "second"], "train")
    shard = split.parts[1].shards[0]
    data = bytearray(shard.path.read_bytes())
    data[700] ^= 1
    shard.path.write_bytes(data)
    source = re.escape(split.parts[1].source(0))
    with Reader(split) as reader:
        with pytest.raises(DamagedShardError, match=rf"1:000000000 \({source}\): checksum"):
            reader.read(SIZES["first"])
        reader.read(0)
        shard.path.unlink()
    with (
        Reader(split) as reader,
        pytest.raises(DamagedShardError, match=r"second/train/000000.tar: the shard is missing"),
    ):
        reader.read(SIZES["first"])


def test_passes(joined):
    assert choose_pass(joined) is None
    weighted = choose_pass(joined, weights=(1, 0, 2.5))
    assert isinstance(weighted, WeightedPass)
    assert weighted.num_entries == 23 + 15
    balanced = choose_pass(joined, balance_classes=True)
    assert isinstance(balanced, BalancedPass)
    assert abs(balanced.num_entries - len(joined)) <= 2
    first = open_splits([joined.parts[0].root], "train")
    alone = choose_pass(first, weights=[2])  # one data set may have a weight, too
    assert alone is not None and alone.num_entries == 46


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": (1, 2)}, "2 weights for 3 data sets; give one for each in --data.weights"),
        ({"weights": (0, 0, 0)}, "weights are 0 0 0; --data.weights takes numbers of 0 or more"),
        ({"weights": (1, -1, 1)}, "weights are 1 -1 1"),
        ({"weights": (1, float("nan"), 1)}, "weights are 1 nan 1"),
        ({"weights": (1, 1, 1), "balance_classes": True}, "exclude each other; choose one"),
    ],
)
def test_impossible_passes_are_refused(joined, options, words):
    with pytest.raises(ValueError, match=words) as error:
        choose_pass(joined, **options)
    assert "\n" not in str(error.value)


def test_balancing_needs_the_labels_of_every_part(root, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "second" / "train.labels.npy").unlink()
    split = open_splits([tmp_path / "first", tmp_path / "second"], "train")
    with pytest.raises(ValueError, match=r"second/train.labels.npy.*copy the data set again"):
        choose_pass(split, balance_classes=True)
    np.save(tmp_path / "second" / "train.labels.npy", np.zeros(5, np.int32))
    with pytest.raises(ValueError, match=r"second/train.labels.npy.* 11 samples"):
        choose_pass(split, balance_classes=True)


@pytest.mark.parametrize("options", [{}, {"weights": (0.4, 2, 1)}, {"balance_classes": True}])
def test_the_loader_gives_pictures_and_labels_of_the_right_samples(joined, options):
    plan = Plan(
        joined.shard_sizes,
        global_batch_size=7,
        epochs=2,
        samples=choose_pass(joined, **options),
    )
    seen = []
    loader = Loader(joined, plan, view=PLAIN, size=20, seed=0, num_threads=3)
    with Reader(joined) as reader:
        for _, batch in loader:
            for place, index in enumerate(batch.index.tolist()):
                number, own = joined.part_of(index)
                sample = joined.parts[number].sample(own)
                pixels = np.asarray(Picture(sample["jpg"]).image())
                assert (batch.image[place].permute(1, 2, 0).numpy() == pixels).all()
                assert batch.label[place] == sample["cls"] == reader.target(index).label
                if batch.weight[place]:
                    seen.append(index)
    assert len(seen) == 2 * plan.num_samples
    if not options:
        assert sorted(seen) == sorted(2 * list(range(len(joined))))
    order = [i for b in eval_batches(joined, view=PLAIN, size=8, batch_size=9) for i in b.index]
    assert [int(index) for index in order] == list(range(len(joined)))


def test_a_plan_of_one_part_does_not_fit(root, joined):
    plan = Plan(joined.parts[0].shard_sizes, global_batch_size=7, epochs=1)
    with pytest.raises(ValueError, match="the plan is for 23 samples"):
        Loader(joined, plan, view=PLAIN, size=8, seed=0)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("data: {path: [VOC2007, VOC2012], weights: [1, 2.5], view: {name: ssd}}\n")
    return path


def test_recipes_and_flags_name_data_sets(recipe):
    config = load_config(recipe)
    assert config.data.path == ("VOC2007", "VOC2012")
    assert config.data.weights == (1.0, 2.5)
    flags = ["--data.path", "a", "b c", "d", "--data.weights", "1", "0", "3", "--epochs", "2"]
    config = load_config(recipe, flags)
    assert (config.data.path, config.data.weights) == (("a", "b c", "d"), (1.0, 0.0, 3.0))
    # Names keep their letters, whatever YAML would make of them.
    names = ("2007", "1e3", "0x10", "007", "no", "null", "1_000", "2012-01-01", "a: b", "{x")
    flags = ["--data.path", *names, "--data.weights", *("1" for _ in names)]
    assert load_config(recipe, flags).data.path == names
    for name in names:
        one = load_config(recipe, [f"--data.path={name}", "--data.weights", "2"])
        assert one.data.path == (name,)
        assert one.data.weights == (2.0,)
    assert load_config(recipe, ["--data.val_path", "2012", "7"]).data.val_path == ("2012", "7")
    assert load_config(recipe, ["--data.path", "[x, y]"]).data.path == ("x", "y")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path: [a, b], weights: [1]", "data.weights = .*one number for each of the 2 data sets"),
        ("path: a, weights: [1, 2]", "data.weights = .*one number for each of the 1 data sets"),
        ("path: [a, b], weights: [0, 0]", "data.weights = .*all are 0"),
        ("path: [a, b], weights: [1, -2]", "data.weights = .*must be at least 0"),
        ("path: [a, ''], weights: [1, 2]", "data.path = .*an empty name"),
        ("path: []", "data.path = .*mbv3dist convert"),
        ("path: 2007", r"data.path = 2007: expected \[str"),  # 007 would be 7: quotes are needed
        ("path: [2007, a]", r"data.path = \[2007, 'a'\]: expected \[str"),
        ("path: [a, b], weights: [1, 1], balance_classes: true", "choose it or --data.weights"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, text, words):
    path = tmp_path / "demo.yaml"
    path.write_text(f"data: {{{text}, view: {{name: ssd}}}}\n")
    with pytest.raises(ValueError, match=words) as error:
        load_config(path)
    assert "\n" not in str(error.value)
