"""Converting class folders: classes, kinds of pictures, the validation cut."""

import io

import numpy as np
import pytest
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.pictures import load_picture
from mbv3dist.convert.records import ConversionError
from mbv3dist.data.class_names import read_class_file
from mbv3dist.data.formats import PictureError
from mbv3dist.data.index import open_split


def add(path, *, mode="RGB", size=(24, 16), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(values).convert(mode).save(path, **save)


def convert(src, out, **options):
    return convert_imagefolder(src, out, **{"split": "train", "workers": 1, **options})


def samples(out, split="train"):
    opened = open_split(out, split)
    return {opened.source(index): opened.sample(index) for index in range(len(opened))}


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_classes_and_kept_bytes(tmp_path):
    src = tmp_path / "src"
    add(src / "b/deep/er/1.jpg")
    add(src / "a/2.JPG", format="JPEG")
    add(src / "c/3.jpeg")
    (src / "a/notes.txt").write_text("no picture")
    (src / ".hidden").mkdir()
    report = convert(src, tmp_path / "out").splits["train"]
    found = samples(tmp_path / "out")
    assert {name: item["cls"] for name, item in found.items()} == {
        "a/2.JPG": 0,
        "b/deep/er/1.jpg": 1,
        "c/3.jpeg": 2,
    }
    for name, item in found.items():
        assert item["jpg"] == (src / name).read_bytes()
    assert report.counts == {"kept": 3, "ignored_files": 1}


@pytest.mark.parametrize(
    ("name", "mode", "save", "count"),
    [
        ("x.png", "RGB", {}, "reencoded_png"),
        ("x.png", "P", {}, "reencoded_png"),
        ("x.png", "1", {}, "reencoded_png"),
        ("x.webp", "RGB", {"lossless": True}, "reencoded_webp"),
        ("x.bmp", "RGB", {}, "reencoded_bmp"),
        ("x.jpg", "CMYK", {}, "reencoded_cmyk"),
        ("x.jpg", "L", {}, "reencoded_grayscale"),
        ("png.jpg", "RGB", {"format": "PNG"}, "reencoded_png"),
    ],
)
def test_other_kinds_become_rgb_jpeg(tmp_path, name, mode, save, count):
    add(tmp_path / "src/a" / name, mode=mode, **save)
    report = convert(tmp_path / "src", tmp_path / "out").splits["train"]
    assert report.counts == {count: 1}
    image = Image.open(io.BytesIO(samples(tmp_path / "out")[f"a/{name}"]["jpg"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 16))
    assert image.layer[0][1:3] == (1, 1)  # 4:4:4


def test_alpha_lies_on_white_and_16_bits_are_scaled():
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "PNG")
    picture = load_picture(buffer.getvalue())
    assert picture.has_alpha and np.asarray(picture.image).min() == 255
    ramp = np.arange(256, dtype=np.uint16)[None] * 257
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    assert np.array_equal(np.asarray(load_picture(buffer.getvalue()).image)[0, :, 1], range(256))


def test_bad_pictures_are_named_without_addresses(tmp_path):
    src = tmp_path / "src"
    add(src / "a/good.jpg")
    add(src / "a/cut.jpg")
    (src / "a/cut.jpg").write_bytes((src / "a/cut.jpg").read_bytes()[:-300])
    (src / "a/empty.jpg").touch()
    (src / "a/text.png").write_text("hello")
    with pytest.raises(ConversionError) as caught:
        convert(src, tmp_path / "out")
    message = str(caught.value)
    assert "a/cut.jpg: damaged picture" in message and "a/empty.jpg: the file is empty" in message
    assert "a/text.png: not a picture" in message and "0x" not in message
    assert not list((tmp_path / "out").glob(".*"))
    report = convert(src, tmp_path / "out", on_error="skip").splits["train"]
    assert (report.samples, len(report.problems)) == (1, 3)
    with pytest.raises(PictureError):
        load_picture(b"\x89PNG\r\n\x1a\n")


def test_resize_only_shrinks(tmp_path):
    add(tmp_path / "src/a/large.jpg", size=(60, 40))
    add(tmp_path / "src/a/small.jpg", size=(30, 20))
    report = convert(tmp_path / "src", tmp_path / "out", resize=20).splits["train"]
    assert report.counts == {"resized": 1, "kept": 1}
    found = samples(tmp_path / "out")
    assert decode(found["a/large.jpg"]["jpg"]).shape == (20, 30, 3)
    assert found["a/small.jpg"]["jpg"] == (tmp_path / "src/a/small.jpg").read_bytes()


def test_validation_is_cut_by_class(tmp_path):
    for label, count in (("a", 10), ("b", 20), ("c", 2), ("d", 1)):
        for number in range(count):
            add(tmp_path / f"src/{label}/{number}.jpg")
    report = convert(tmp_path / "src", tmp_path / "out", val_fraction=0.1)
    train, val = samples(tmp_path / "out"), samples(tmp_path / "out", "val")
    assert sorted(name[0] for name in val) == ["a", "b", "b", "c"]
    assert len(train) + len(val) == 33 and not set(train) & set(val)
    assert report.splits["val"].samples == 4


def test_a_cut_that_leaves_nothing_is_refused(tmp_path):
    for label in "abc":
        add(tmp_path / f"src/{label}/1.jpg")
    with pytest.raises(ValueError, match=r"--val-fraction 0.5 leaves none of 3 pictures for 'val'"):
        convert(tmp_path / "src", tmp_path / "out", val_fraction=0.5)
    assert not (tmp_path / "out").exists()


def test_pictures_without_a_class_are_problems(tmp_path):
    src = tmp_path / "src"
    add(src / "a/1.jpg")
    add(src / "loose.PNG", format="PNG")
    add(src / ".hidden.jpg")
    (src / "labels.txt").write_text("a\n")
    reason = r"  loose.PNG: lies beside the class folders, so it has no class"
    with pytest.raises(ConversionError, match=reason) as caught:
        convert(src, tmp_path / "out")
    assert len(caught.value.problems) == 1
    report = convert(src, tmp_path / "out", on_error="skip").splits["train"]
    assert (report.samples, report.counts["problems_unknown_class"]) == (1, 1)


def pixels(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


@pytest.mark.parametrize(
    "options", [{}, {"overwrite": True}, {"split": "new", "val_fraction": 0.5}]
)
def test_the_source_and_other_folders_are_never_overwritten(tmp_path, options):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for number in range(2):
            add(data / split / f"cat/{number}.jpg")
    (tmp_path / "link").symlink_to(data)
    before = pixels(data)
    # The split that is written is the source, holds it, or is a folder of other pictures.
    for src, out in (
        (data / "train", data),
        (data / "train", tmp_path / "link"),
        (data / "val", data),
        (data / "train/../train", data),
    ):
        with pytest.raises(ValueError, match="use another --split or --out"):
            convert(src, out, **options)
    with pytest.raises(ValueError, match="pictures would be lost"):
        convert(data / "train", tmp_path, split="data", overwrite=True)
    assert pixels(data) == before
    assert sorted(path.name for path in data.iterdir()) == ["train", "val"]


def test_what_stands_in_the_place_of_a_split(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    add(src / "cat/1.jpg")
    (out / "train").mkdir(parents=True)
    for text in ('{"annotations": []}', '{"a": 1}\n{"a": 2}\n'):  # COCO, JSON lines
        (out / "train.json").write_text(text)
        with pytest.raises(ValueError, match=r"train.json' exists and is no split of mbv3dist"):
            convert(src, out, overwrite=True)
        assert (out / "train.json").read_text() == text
    (out / "train.json").unlink()
    for name in ("notes.txt", "000000.tar", "000000.tar.txt"):  # a tar of ours has its .crc
        (out / "train" / name).write_text("mine")
        with pytest.raises(ValueError, match="exists and is no split of mbv3dist") as caught:
            convert(src, out)
        assert repr(name) in str(caught.value)
        assert (out / "train" / name).read_text() == "mine"
        (out / "train" / name).unlink()
    convert(src, out)
    whole = (out / "train.json").read_text()
    for damaged in ("", whole[:50]):
        (out / "train.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"train.json is not a split description"):
            convert(src, out)
        convert(src, out, overwrite=True)
        assert (out / "train.json").read_text() == whole
    # Later, something of the user's got into a finished split.
    (out / "train/notes.txt").write_text("mine")
    assert convert(src, out).reused
    with pytest.raises(ValueError, match=r"would be replaced \(it holds 'notes.txt'\)"):
        convert(src, out, overwrite=True)
    assert (out / "train/notes.txt").is_file() and (out / "train/000000.tar").is_file()


def test_class_lists(tmp_path):
    for label in "abc":
        add(tmp_path / f"src/{label}/1.jpg")
    (tmp_path / "src/labels.txt").write_text("c\na\nb\n\n")
    convert(tmp_path / "src", tmp_path / "out")
    assert open_split(tmp_path / "out", "train").classes == ("c", "a", "b")
    with pytest.raises(ValueError, match="another order, class 0 is 'c' there, 'a' here"):
        convert(tmp_path / "src", tmp_path / "out", split="test", classes=["a", "b", "c"])
    with pytest.raises(ConversionError, match="folder 'c' is not in the class list"):
        convert(tmp_path / "src", tmp_path / "other", classes=["a", "b"])
    more = ["a", "z", "b", "c"]
    assert convert(tmp_path / "src", tmp_path / "more", classes=more).classes == tuple(more)


@pytest.mark.parametrize("text", ["", "a\na\n", "BACKGROUND\na\n", "a\n\nb\n"])
def test_bad_class_files(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    with pytest.raises(ValueError, match="class file"):
        read_class_file(tmp_path / "labels")


def test_wrong_folders_and_options(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    with pytest.raises(ValueError, match="no folder"):
        convert(src, out)
    src.mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        convert(src, out)
    (src / "train").mkdir()
    with pytest.raises(ValueError, match="are splits"):
        convert(src, out)
    (src / "cat").mkdir()
    with pytest.raises(ValueError, match="no pictures in the class folders"):
        convert(src, out)
    add(src / "cat/1.jpg")
    with pytest.raises(ValueError, match="lies inside the source"):
        convert(src, src / "out")
    for wrong in (
        {"split": "a/b"},
        {"val_fraction": 1.0},
        {"split": "val", "val_fraction": 0.5},
        {"seed": -1},
        {"resize": 0},
        {"quality": 0},
        {"on_error": "ignore"},
        {"workers": 0},
    ):
        with pytest.raises(ValueError, match="--"):
            convert(src, out, **wrong)
    assert not out.exists()
