"""Converting VOC folders: what labelImg writes, boxes, splits, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.pictures import rotate_box
from mbv3dist.convert.records import ConversionError
from mbv3dist.convert.voc import convert_voc
from mbv3dist.convert.voc_xml import AnnotationError, parse_annotation
from mbv3dist.data.decode import upright
from mbv3dist.data.index import list_splits, open_split

WHOLE = "<size><width>40</width><height>30</height><depth>3</depth></size>"


def obj(box, name="cat", extra="", inner=""):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return f"<object><name>{name}</name>{extra}{inner}<bndbox>{corners}</bndbox></object>"


def add(root, key, *objects, size=WHOLE, suffix=".jpg", filename=None, shape=(40, 30), **save):
    """Write a picture and its XML under a VOC root."""
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    noise = np.random.default_rng(len(key)).integers(0, 256, (shape[1], shape[0], 3), np.uint8)
    Image.fromarray(noise).save(root / "JPEGImages" / f"{key}{suffix}", **save)
    name = f"{key}{suffix}" if filename is None else filename
    text = f"<annotation><filename>{name}</filename><path>C:\\pictures\\{name}</path>{size}"
    (root / "Annotations" / f"{key}.xml").write_text(text + "".join(objects) + "</annotation>")


def add_list(root, split, *lines):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in lines))


def samples(out, split):
    opened = open_split(out, split)
    return {opened.source(index): opened.sample(index) for index in range(len(opened))}


def convert(root, out, **options):
    return convert_voc(root, out, **{"split": "train", "workers": 1, **options})


def test_boxes_are_zero_based_and_half_open(tmp_path):
    add(tmp_path / "voc", "a", obj((1, 1, 40, 30), extra="<difficult>1</difficult>"))
    convert(tmp_path / "voc", tmp_path / "out")
    sample = samples(tmp_path / "out", "train")["JPEGImages/a.jpg"]
    expected = {"width": 40, "height": 30, "boxes": [[0, 0, 40, 30]], "labels": [0]}
    assert sample["json"] == {**expected, "difficult": [1]}
    assert sample["jpg"] == (tmp_path / "voc/JPEGImages/a.jpg").read_bytes()


def test_labelimg_as_it_is(tmp_path):
    root = tmp_path / "voc"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    add(root, "no extension", obj((2, 2, 9, 9)), filename="no extension")
    add(root, "wrong.name", obj((2, 2, 9, 9)), filename="another.jpg")
    add(root, "jpeg", obj((2.0, "3.7", "12.0", "12.7")), suffix=".JPEG")
    add(root, "png", obj((2, 2, 9, 9), inner=part), suffix=".PNG", size="")
    add(root, "size0", obj((2, 2, 9, 9)), size="<size><width>0</width><height>0</height></size>")
    add(root, "size9", obj((2, 2, 9, 9)), size="<size><width>9</width><height>9</height></size>")
    add(root, "boxless")
    add(root, "outside", obj((-3, 5, 60, 20), name="dog"))
    bom = root / "Annotations/boxless.xml"
    bom.write_bytes(b"\xef\xbb\xbf" + bom.read_bytes())
    (root / "Annotations/._boxless.xml").write_bytes(b"\0\5\x16")
    report = convert(root, tmp_path / "out").splits["train"]
    found = samples(tmp_path / "out", "train")
    assert report.samples == len(found) == 8
    assert report.boxes == 7
    assert open_split(tmp_path / "out", "train").classes == ("cat", "dog")
    assert found["JPEGImages/jpeg.JPEG"]["json"]["boxes"] == [[1, 2.7, 12, 12.7]]
    assert found["JPEGImages/boxless.jpg"]["json"]["boxes"] == []
    assert found["JPEGImages/outside.jpg"]["json"]["boxes"] == [[0, 4, 40, 20]]
    assert found["JPEGImages/size9.jpg"]["json"]["width"] == 40
    counts = report.counts
    assert (counts["clipped_boxes"], counts["wrong_size"], counts["missing_size"]) == (1, 1, 2)
    assert counts["reencoded_png"] == 1


def test_no_picture_is_used_twice(tmp_path):
    root, out = tmp_path / "voc", tmp_path / "out"
    add(root, "a", obj((2, 2, 9, 9)))
    add(root, "b", obj((5, 5, 20, 20)), filename="a.jpg")  # a copy: its <filename> is stale
    add(root, "c", obj((2, 2, 9, 9)), filename="third.jpg")
    add(root, "d", obj((5, 5, 20, 20)), filename="third.jpg")
    (root / "JPEGImages/b.jpg").unlink()
    (root / "JPEGImages/d.jpg").unlink()
    (root / "JPEGImages/c.jpg").rename(root / "JPEGImages/third.jpg")
    with pytest.raises(ConversionError) as caught:
        convert(root, out)
    first, second = map(str, caught.value.problems)
    assert first == "Annotations/b.xml: no picture of that name (<filename> is 'a.jpg')"
    assert second.startswith("Annotations/d.xml: <filename> names JPEGImages/third.jpg, the ")
    assert "Annotations/c.xml" in second
    convert(root, out, on_error="skip")
    found = samples(out, "train")
    assert set(found) == {"JPEGImages/a.jpg", "JPEGImages/third.jpg"}
    assert found["JPEGImages/a.jpg"]["json"]["boxes"] == [[1, 1, 9, 9]]


def test_the_source_is_never_overwritten(tmp_path):
    add(tmp_path / "data/VOC2007", "a", obj((2, 2, 9, 9)))
    for split in ("VOC2007", "data"):
        out = tmp_path / "data" if split == "VOC2007" else tmp_path
        with pytest.raises(ValueError, match="pictures would be lost; use another --split"):
            convert(tmp_path / "data/VOC2007", out, split=split, overwrite=True)
    assert (tmp_path / "data/VOC2007/JPEGImages/a.jpg").is_file()


def test_all_problems_are_named_and_nothing_is_left(tmp_path):
    root, out = tmp_path / "voc", tmp_path / "out"
    add(root, "good", obj((2, 2, 9, 9)), obj((5, 5, 9, 9)))
    add(root, "flat", obj((2, 2, 9, 9)), obj((9, 5, 9, 9)), obj((9, 5, 3, 9)))
    add(root, "away", obj((90, 5, 99, 9)))
    add(root, "text", obj(("x", 5, 99, 9)), obj(("nan", 5, 99, 9)))
    add(root, "cut", obj((2, 2, 9, 9)))
    add(root, "gone", obj((2, 2, 9, 9)))
    add(root, "xml", obj((2, 2, 9, 9)))
    picture = root / "JPEGImages/cut.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])
    (root / "JPEGImages/gone.jpg").unlink()
    (root / "Annotations/xml.xml").write_text("<annotation><object>")
    with pytest.raises(ConversionError) as caught:
        convert(root, out)
    message = str(caught.value)
    for key in ("flat.xml: object 2", "flat.xml: object 3", "away.jpg: object 1", "cut.jpg"):
        assert key in message
    assert "gone.xml" in message and "xml.xml" in message and "text.xml: object 2" in message
    assert message.splitlines()[-1].endswith("--on-error skip")
    assert len(caught.value.problems) == 8
    assert [path.name for path in out.iterdir()] == ["train.failed.json"]

    report = convert(root, out, on_error="skip").splits["train"]
    assert (report.samples, report.boxes) == (4, 3)
    assert len(report.problems) == 8
    assert json.loads((out / "train.report.json").read_text())["status"] == "finished"
    assert not (out / "train.failed.json").exists()
    with pytest.raises(ConversionError):
        convert(root, out)


def test_lists_with_columns_spaces_and_dots(tmp_path):
    root = tmp_path / "voc"
    for key in ("a.jpg", "my cell 1", "my cell", "b", "unused"):
        add(root, key, obj((2, 2, 9, 9)))
    add(root, "other", obj((2, 2, 9, 9), name="ant"))
    add_list(root, "train", "a.jpg  1", "my cell 1", "b.jpg -1", "b", "")
    add_list(root, "test", "my cell -1", "other 0")
    convert(root, tmp_path / "out")
    convert(root, tmp_path / "out", split="test")
    pictures = {"JPEGImages/a.jpg.jpg", "JPEGImages/my cell 1.jpg", "JPEGImages/b.jpg"}
    assert set(samples(tmp_path / "out", "train")) == pictures
    found = samples(tmp_path / "out", "test")
    assert set(found) == {"JPEGImages/my cell.jpg", "JPEGImages/other.jpg"}
    # Classes come from the whole root: 'ant' stands in no XML of train.
    assert open_split(tmp_path / "out", "train").classes == ("ant", "cat")
    with pytest.raises(ValueError, match=r"no list ImageSets/Main/val.txt; it has test, train"):
        convert(root, tmp_path / "out", split="val")
    add_list(root, "more", "b", "nowhere")
    with pytest.raises(ConversionError, match=r"nowhere.xml: listed, but there is no such file"):
        convert(root, tmp_path / "out", split="more")


def test_several_roots(tmp_path):
    for name, kind in (("VOC2007", "cat"), ("VOC2012", "dog")):
        add(tmp_path / name, "same", obj((2, 2, 9, 9), name=kind))
        add_list(tmp_path / name, "train", "same")
    convert([tmp_path / "VOC2007", tmp_path / "VOC2012"], tmp_path / "out")
    found = samples(tmp_path / "out", "train")
    assert found["VOC2007/JPEGImages/same.jpg"]["json"]["labels"] == [0]
    assert found["VOC2012/JPEGImages/same.jpg"]["json"]["labels"] == [1]
    with pytest.raises(ValueError, match="VOC2007, VOC2012 in it do"):
        convert(tmp_path, tmp_path.parent / "elsewhere")


def test_flat_folder_and_seeded_cut(tmp_path):
    root = tmp_path / "voc"
    for number in range(20):
        add(root, f"p{number:02d}", obj((2, 2, 9, 9)))
    for path in [*root.glob("*/*.xml"), *root.glob("*/*.jpg")]:
        path.rename(root / path.name)
    (root / "Annotations").rmdir()
    (root / "JPEGImages").rmdir()
    cuts = []
    for seed in (0, 0, 1):
        out = tmp_path / f"out{len(cuts)}"
        convert(root, out, val_fraction=0.25, seed=seed)
        train, val = set(samples(out, "train")), set(samples(out, "val"))
        assert len(val) == 5 and len(train | val) == 20 and not train & val
        cuts.append(val)
    assert cuts[0] == cuts[1] != cuts[2]


def test_classification_by_largest_and_by_crops(tmp_path):
    root = tmp_path / "voc"
    add(root, "a", obj((1, 1, 10, 10)), obj((1, 1, 20, 20), name="dog"))
    add(root, "boxless")
    largest = convert(root, tmp_path / "largest", task="classification").splits["train"]
    assert largest.counts["pictures_without_object"] == 1
    assert samples(tmp_path / "largest", "train")["JPEGImages/a.jpg"]["cls"] == 1
    convert(root, tmp_path / "crops", task="classification", object_crops=True)
    crops = samples(tmp_path / "crops", "train")
    assert {name: crop["cls"] for name, crop in crops.items()} == {
        "JPEGImages/a.jpg#1": 0,
        "JPEGImages/a.jpg#2": 1,
    }


def test_resize_scales_boxes(tmp_path):
    root = tmp_path / "voc"
    add(root, "a", obj((9, 7, 40, 30)))
    convert(root, tmp_path / "out", resize=15)
    target = samples(tmp_path / "out", "train")["JPEGImages/a.jpg"]["json"]
    assert (target["width"], target["height"]) == (20, 15)
    assert target["boxes"] == [[4, 3, 20, 15]]


@pytest.mark.parametrize("orientation", range(2, 9))
def test_box_follows_the_picture_upright(orientation):
    stored = np.zeros((30, 40), np.uint8)
    stored[5:12, 3:21] = 255
    rows, columns = np.nonzero(np.asarray(upright(Image.fromarray(stored), orientation)))
    expected = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert rotate_box((3, 5, 21, 12), orientation, (40, 30)) == expected


@pytest.mark.parametrize(("size", "box"), [((40, 30), [18, 3, 25, 21]), ((30, 40), [3, 5, 21, 12])])
def test_exif_boxes_go_by_the_declared_size(tmp_path, size, box):
    exif = Image.Exif()
    exif[0x0112] = 6
    declared = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    add(tmp_path / "voc", "a", obj((4, 6, 21, 12)), size=declared, exif=exif)
    report = convert(tmp_path / "voc", tmp_path / "out").splits["train"]
    sample = samples(tmp_path / "out", "train")["JPEGImages/a.jpg"]
    assert (sample["json"]["width"], sample["json"]["height"]) == (30, 40)
    assert sample["json"]["boxes"] == [box]
    assert report.counts["reencoded_exif_rotated"] == 1


def test_class_lists_must_agree(tmp_path):
    add(tmp_path / "one", "a", obj((2, 2, 9, 9)))
    add(tmp_path / "two", "a", obj((2, 2, 9, 9)), obj((2, 2, 9, 9), name="dog"))
    out = tmp_path / "out"
    convert(tmp_path / "one", out)
    with pytest.raises(ValueError, match="dog new here; give --classes FILE"):
        convert(tmp_path / "two", out, split="test")
    with pytest.raises(ValueError, match="for detection, not classification"):
        convert(tmp_path / "two", out, split="test", task="classification")
    with pytest.raises(ConversionError, match="class 'dog' is not in the class list"):
        convert(tmp_path / "two", out, split="test", classes=["cat"])
    report = convert(tmp_path / "two", out, split="test", classes=["cat"], on_error="skip")
    assert report.splits["test"].boxes == 1
    assert list_splits(out) == ["test", "train"]


def test_entities_are_refused():
    bomb = b'<!DOCTYPE a [<!ENTITY b "c">]><annotation><filename>&b;</filename></annotation>'
    with pytest.raises(AnnotationError, match="entities"):
        parse_annotation(bomb)
    with pytest.raises(AnnotationError, match="not <annotation>"):
        parse_annotation(b"<html/>")


def test_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no annotation"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="no folder"):
        convert(tmp_path / "missing", tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
