"""Pictures stored smaller or raw: sizes, boxes, pixels, and the same bytes whoever does it."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.inspect import inspect_dataset
from mbv3dist.convert.pictures import shrunk_size
from mbv3dist.convert.pixels import raw_bytes, raw_size
from mbv3dist.convert.verify import verify_dataset
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.decode import Picture
from mbv3dist.data.idx import read_idx
from mbv3dist.data.index import open_split
from mbv3dist.data.joined import open_splits
from mbv3dist.data.reader import Reader

SIZES = [(90, 60), (60, 90), (61, 33), (40, 40), (39, 20), (200, 7)]
KINDS = {"jpg": {"quality": 85}, "png": {}, "jpeg": {"quality": 85, "progressive": True}}
side = st.integers(1, 5000)


def smooth(width, height, seed):
    """A picture that survives JPEG: noise of a few pixels, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("stored") / "src"
    for number, size in enumerate(SIZES * 3):
        suffix = list(KINDS)[number // len(SIZES)]
        path = root / "ab"[number % 2] / f"{number:02d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(*size, number).save(path, **KINDS[suffix])
    smooth(80, 50, 99).convert("L").save(root / "a/gray.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(80, 50, 98).save(root / "b/turned.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc") / "voc"
    (root / "JPEGImages").mkdir(parents=True)
    (root / "Annotations").mkdir()
    rng = np.random.default_rng(3)
    for number, (width, height) in enumerate(SIZES):
        smooth(width, height, number).save(root / f"JPEGImages/{number}.jpg")
        objects = ""
        for _ in range(3):
            x = np.sort(rng.choice(np.arange(1, width + 1), 2, replace=False))
            y = np.sort(rng.choice(np.arange(1, height + 1), 2, replace=False))
            corners = zip(("xmin", "xmax", "ymin", "ymax"), (*x, *y), strict=True)
            tags = "".join(f"<{name}>{value}</{name}>" for name, value in corners)
            objects += f"<object><name>cat</name><bndbox>{tags}</bndbox></object>"
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        (root / f"Annotations/{number}.xml").write_text(
            f"<annotation><filename>{number}.jpg</filename>{size}{objects}</annotation>"
        )
    return root


def convert(source, out, **options):
    return convert_imagefolder(source, out, **{"split": "train", "workers": 1, **options})


def samples(out):
    split = open_split(out, "train")
    return {split.source(index): split.sample(index) for index in range(len(split))}


def tree(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def original(path):
    """The pixels of a source picture, upright RGB, without this project's decoder."""
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_270) if image.getexif() else image
        return turned.convert("RGB")


@given(width=side, height=side, limit=side)
def test_a_side_is_brought_down_exactly_and_never_up(width, height, limit):
    for pick, name in ((max, "longer"), (min, "shorter")):
        new = shrunk_size((width, height), **{name: limit})
        if pick(width, height) <= limit:
            assert new == (width, height)
            continue
        assert pick(new) == limit
        scale = limit / pick(width, height)
        for before, after in zip((width, height), new, strict=True):
            assert 1 <= after <= before
            assert abs(after - before * scale) <= 0.5 or after == 1


@pytest.mark.parametrize("limit", [{"max_side": 40}, {"resize": 20}])
@pytest.mark.parametrize("form", ["jpeg", "raw"])
def test_boxes_move_with_their_pictures(voc, tmp_path, limit, form):
    convert_voc(voc, tmp_path / "small", split="train", workers=1, format=form, **limit)
    convert_voc(voc, tmp_path / "same", split="train", workers=1)
    small, same = samples(tmp_path / "small"), samples(tmp_path / "same")
    assert len(small) == len(SIZES)
    resized = 0
    for source, item in small.items():
        new, old = item["json"], same[source]["json"]
        with_pixels = Picture(item["jpg" if form == "jpeg" else "npy"])
        assert (with_pixels.width, with_pixels.height) == (new["width"], new["height"])
        scale = np.array([new["width"] / old["width"], new["height"] / old["height"]] * 2)
        assert (scale <= 1).all()
        assert np.allclose(new["boxes"], np.array(old["boxes"]) * scale, atol=1e-4)
        assert (new["labels"], new["difficult"]) == (old["labels"], old["difficult"])
        if (scale == 1).all():
            if form == "jpeg":
                assert item["jpg"] == (voc / source).read_bytes()
        else:
            resized += 1
            if "max_side" in limit:
                assert max(new["width"], new["height"]) == 40
    assert 0 < resized < len(SIZES)
    assert verify_dataset(tmp_path / "small")["ok"]


@pytest.mark.parametrize("limit", [{}, {"max_side": 45}, {"resize": 25}])
def test_raw_members_hold_pillows_pixels(folders, tmp_path, limit):
    report = convert(folders, tmp_path / "out", format="raw", **limit).splits["train"]
    found = samples(tmp_path / "out")
    assert report.counts["stored_raw"] == len(found) == 20 and "kept" not in report.counts
    assert report.counts["decoded_png"] == 6
    for source, item in found.items():
        pixels = np.load(io.BytesIO(item["npy"]), allow_pickle=False)
        image = original(folders / source)
        size = shrunk_size(image.size, longer=limit.get("max_side"), shorter=limit.get("resize"))
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        expected = np.asarray(image).astype(int)
        assert pixels.dtype == np.uint8 and pixels.shape == expected.shape
        difference = np.abs(pixels - expected)
        assert difference.max() <= (size != image.size) and difference.mean() < 0.01
        assert (np.asarray(Picture(item["npy"]).image()) == pixels).all()
        assert raw_size(item["npy"]) == size


def test_resized_jpegs_are_those_that_pillow_makes(folders, tmp_path):
    convert(folders, tmp_path / "out", resize=25, quality=80)
    for source, item in samples(tmp_path / "out").items():
        image = original(folders / source)
        size = shrunk_size(image.size, shorter=25)
        if size != image.size:
            buffer = io.BytesIO()
            image.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=80)
            expected, found = (
                np.asarray(Image.open(io.BytesIO(data))).astype(int)
                for data in (buffer.getvalue(), item["jpg"])
            )
            assert np.abs(found - expected).mean() < 0.1


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
def test_everybody_knows_raw_data_sets(folders, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    out = tmp_path / "out"
    convert(folders, out, format="raw", max_side=30, shard_bytes=30_000)
    assert json.loads((out / "train.json").read_text())["format"] == "raw"
    assert inspect_dataset(out)["splits"]["train"]["format"] == "raw"
    assert verify_dataset(out) == {"ok": True, "samples": 20, "problems": []}
    split = open_split(out, "train")
    assert len(split.shards) > 1 and split.format == "raw"
    with Reader(split, verify="always") as reader:
        members = [bytes(reader.read(index)[0]) for index in range(len(split))]
    seen = 0
    for shard in split.shards:
        assert read_idx(shard.path.with_suffix(".idx")).image_ext == "npy"
        with tarfile.open(shard.path) as tar:
            names = tar.getnames()
            assert {name.partition(".")[2] for name in names} == {"npy", "cls"}
            for name in names[::2]:
                assert tar.extractfile(name).read() == members[int(name.partition(".")[0])]
        reading = webdataset.WebDataset(str(shard.path), shardshuffle=False, empty_check=False)
        for sample in reading.decode():  # by extension, as any data set of theirs
            expected = np.load(io.BytesIO(members[int(sample["__key__"])]))
            assert (sample["npy"] == expected).all() and sample["cls"] in (0, 1)
            seen += 1
        reading.close()
    assert seen == 20


def test_verify_names_damage_in_raw_members(folders, tmp_path):
    out = tmp_path / "out"
    convert(folders, out, format="raw", max_side=30)
    tar = out / "train/000000.tar"
    data = bytearray(tar.read_bytes())
    place = data.index(b"'fortran_order': False")
    data[place + 17 : place + 22] = b"True "
    tar.write_bytes(data)
    problems = verify_dataset(out)["problems"]
    assert any("its picture is no raw picture that can be used" in text for text in problems)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_only_whole_raw_members_have_a_size(height, width, data):
    rng = np.random.default_rng(height * 41 + width)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    member = raw_bytes(pixels[:, ::-1])
    assert raw_size(member) == (width, height)
    assert (np.load(io.BytesIO(member), allow_pickle=False) == pixels[:, ::-1]).all()
    head = len(member) - pixels.size
    assert head % 64 == 0
    for changed in (member[:-1], member + b"\0", member[: data.draw(st.integers(0, head))]):
        assert raw_size(changed) is None
    place = data.draw(st.integers(0, head - 1))
    other = bytes([member[place] ^ data.draw(st.integers(1, 255))])
    found = raw_size(member[:place] + other + member[place + 1 :])
    assert found is None or found[0] * found[1] == width * height


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 25},
        {"max_side": 45, "quality": 70},
        {"format": "raw"},
        {"format": "raw", "max_side": 45},
    ],
)
def test_bytes_do_not_depend_on_workers(folders, tmp_path, options):
    many = tmp_path / "many"
    for number in range(4):  # more chunks than one
        for path in sorted(folders.rglob("*.*")):
            link = many / path.parent.name / f"{number}_{path.name}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        convert(many, out, workers=workers, shard_bytes=100_000, val_fraction=0.2, **options)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")
    assert len(open_split(tmp_path / "1", "train").shards) > 1


def test_both_sides_at_once_are_refused(folders, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--resize .* and --max-side .* give one of them") as e:
        convert(folders, out, resize=20, max_side=30)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"--max-side is 0; use the longer side in pixels"):
        convert(folders, out, max_side=0)
    with pytest.raises(ValueError, match=r"--format is 'bmp'; use 'jpeg' or 'raw'"):
        convert(folders, out, format="bmp")
    assert not out.exists()


def test_parts_agree_on_how_pictures_are_stored(folders, tmp_path):
    out = tmp_path / "out"
    convert(folders, out, part=(1, 2), max_side=45, format="raw")
    with pytest.raises(ValueError, match=r"does not fit .* --max-side: 45 there, 30 here"):
        convert(folders, out, part=(2, 2), max_side=30, format="raw")
    with pytest.raises(ValueError, match=r"does not fit .* --format: raw there, jpeg here"):
        convert(folders, out, part=(2, 2), max_side=45)
    convert(folders, out, part=(2, 2), max_side=45, format="raw")
    assert verify_dataset(out)["ok"]
    convert(folders, tmp_path / "whole", max_side=45, format="raw")
    assert samples(out) == samples(tmp_path / "whole")


def test_what_was_asked_for_before_is_the_same_input_today(folders, tmp_path):
    convert(folders, tmp_path, resize=25)
    assert convert(folders, tmp_path, resize=25).reused
    for other in ({"max_side": 25}, {"resize": 25, "format": "raw"}):
        with pytest.raises(ValueError, match="made from other input or settings"):
            convert(folders, tmp_path, **other)


def test_data_sets_of_both_kinds_are_joined(folders, tmp_path):
    convert(folders, tmp_path / "raw", format="raw")
    convert(folders, tmp_path / "jpeg")
    joined = open_splits([tmp_path / "raw", tmp_path / "jpeg"], "train")
    assert len(joined) == 40
    for index in range(40):
        item = joined.sample(index)
        pixels = Picture(item["npy" if index < 20 else "jpg"]).image()
        expected = original(folders / joined.source(index))
        assert pixels.size == expected.size
        if index < 20:
            assert (np.asarray(pixels) == np.asarray(expected)).all()
