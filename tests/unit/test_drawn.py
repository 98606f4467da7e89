"""The drawn data set: quotas, boxes against masks, VOC layout, determinism."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from defusedxml import ElementTree
from PIL import Image

from mbv3dist.tools import drawn
from mbv3dist.tools.drawings import CLASSES
from mbv3dist.tools.drawn import make_drawn_dataset, plan_split

NUM_TRAIN, NUM_VAL, NUM_TEST, SIZE = 60, 10, 30, 200


def digest(root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float | int]]:
    root = tmp_path_factory.mktemp("drawn") / "voc"
    statistics = make_drawn_dataset(
        root, num_train=NUM_TRAIN, num_val=NUM_VAL, num_test=NUM_TEST, size=SIZE, seed=3
    )
    return root, statistics


def read_boxes(path: Path) -> list[tuple[str, list[int]]]:
    """Class and 1-based inclusive box of every object of an XML file."""
    tree = ElementTree.parse(path).getroot()
    corners = ("xmin", "ymin", "xmax", "ymax")
    return [
        (item.findtext("name"), [int(item.findtext(f"bndbox/{corner}")) for corner in corners])
        for item in tree.iter("object")
    ]


def test_shares_measured_from_the_files(dataset):
    root, statistics = dataset
    found = [read_boxes(path) for path in sorted((root / "Annotations").iterdir())]
    boxes = [[box for _, box in objects] for objects in found]
    num_objects = sum(map(len, boxes))
    small = sum(
        max(box[2] - box[0], box[3] - box[1]) + 1 < 0.12 * SIZE for row in boxes for box in row
    )

    def meet(a: list[int], b: list[int]) -> bool:
        return max(a[0], b[0]) <= min(a[2], b[2]) and max(a[1], b[1]) <= min(a[3], b[3])

    overlapping = sum(
        any(meet(box, other) for other in row if other is not box) for row in boxes for box in row
    )
    assert statistics["pictures"] == len(boxes) == NUM_TRAIN + NUM_VAL + NUM_TEST
    assert statistics["objects"] == num_objects
    assert statistics["small_objects"] == small / num_objects == pytest.approx(0.30, abs=0.03)
    assert statistics["overlapping_objects"] == overlapping / num_objects
    assert statistics["overlapping_objects"] == pytest.approx(0.15, abs=0.03)
    empty = sum(not row for row in boxes) / len(boxes)
    assert statistics["empty_pictures"] == empty == pytest.approx(0.10, abs=0.02)
    assert {name for objects in found for name, _ in objects} == set(CLASSES)


@pytest.mark.parametrize("count", [20, 250, 1200])
def test_plan_keeps_the_quotas(count):
    plans = plan_split(count, seed=0, stream=1)
    things = [thing for plan in plans for thing in plan]
    assert len(plans) == count
    assert sum(not plan for plan in plans) == round(0.10 * count)
    assert sum(thing.size < 0.12 for thing in things) == round(0.30 * len(things))
    pairs = sum(thing.overlaps_previous for thing in things)
    assert pairs == round(0.15 * len(things) / 2)
    per_class = [sum(thing.name == name for thing in things) for name in CLASSES]
    assert max(per_class) - min(per_class) <= 1


def test_xml_boxes_are_tight_around_the_drawn_masks(dataset):
    root, _ = dataset
    plans = plan_split(NUM_TRAIN, seed=3, stream=0)
    for number in range(1, 21):
        picture = drawn.draw_picture(number, plans[number - 1], size=SIZE, seed=3)
        objects = read_boxes(root / "Annotations" / f"{number:06d}.xml")
        assert [name for name, _ in objects] == [found.name for found in picture.objects]
        for (_, box), found in zip(objects, picture.objects, strict=True):
            rows, columns = np.nonzero(found.mask)
            tight = [columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1]
            assert box == tight
            assert max(box[2] - box[0], box[3] - box[1]) + 1 >= 13
        masks = [found.mask for found in picture.objects]
        if masks:
            assert np.sum(masks, axis=0).max() == 1, "a pixel belongs to the thing on top"


def test_a_lone_thing_has_the_size_asked_for():
    """A lone thing has the size that was asked for and fills a good part of its box."""
    thing = drawn.Thing("house", 0.3, overlaps_previous=False)
    picture = drawn.draw_picture(5, (thing,), size=SIZE, seed=0)
    (found,) = picture.objects
    x0, y0, x1, y1 = found.box
    assert found.mask[y0:y1, x0:x1].mean() > 0.4
    assert found.mask.sum() == found.mask[y0:y1, x0:x1].sum()
    assert max(x1 - x0, y1 - y0) == pytest.approx(0.3 * SIZE, abs=2)


def test_voc_layout(dataset):
    root, _ = dataset
    lists = root / "ImageSets" / "Main"
    names = {path.stem: path.read_text().split() for path in lists.iterdir()}
    assert {name: len(stems) for name, stems in names.items()} == {
        "train": NUM_TRAIN,
        "val": NUM_VAL,
        "trainval": NUM_TRAIN + NUM_VAL,
        "test": NUM_TEST,
    }
    assert names["trainval"] == names["train"] + names["val"]
    assert not set(names["trainval"]) & set(names["test"])
    for stem in names["trainval"] + names["test"]:
        with Image.open(root / "JPEGImages" / f"{stem}.jpg") as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    tree = ElementTree.parse(root / "Annotations" / "000001.xml").getroot()
    assert tree.findtext("filename") == "000001.jpg"
    assert tree.findtext("size/width") == str(SIZE)
    assert not Path(tree.findtext("path")).is_absolute()


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    counts = {"num_train": 20, "num_val": 3, "num_test": 5, "size": 160}
    calls: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        calls.append((done, total))

    one = make_drawn_dataset(tmp_path / "a", **counts, seed=1, progress=note)
    two = make_drawn_dataset(tmp_path / "b", **counts, seed=1, num_workers=2)
    make_drawn_dataset(tmp_path / "c", **counts, seed=2)
    assert one == two
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert calls == [(done, 28) for done in range(1, 29)]


def test_refusals(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        make_drawn_dataset(tmp_path / "full")
    with pytest.raises(ValueError, match="at least 160"):
        make_drawn_dataset(tmp_path / "new", size=100)
    with pytest.raises(ValueError, match="num_test = 0"):
        make_drawn_dataset(tmp_path / "new", num_test=0)
    assert not (tmp_path / "new").exists()
