"""JPEGs that are only copied: found whole by their structure, read once, and named when bad."""

import io
import json
import random
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mbv3dist.convert import prepare, run, work, writer
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.pictures import load_picture, open_picture
from mbv3dist.convert.records import ConversionError
from mbv3dist.convert.structure import plain_header, scan_is_whole
from mbv3dist.convert.verify import verify_dataset
from mbv3dist.data.formats import PictureError
from mbv3dist.data.idx import format_key
from mbv3dist.data.index import open_split

NUM_PICTURES = 140  # more than two chunks of 64
BAD = ("a/021.jpg", "b/061.jpg")  # in two chunks


class Killed(BaseException):
    """Like SIGKILL: nothing in the way of it cleans up."""


def jpeg(seed, size=(24, 16), mode="RGB", **save):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **{"quality": 90, **save})
    return buffer.getvalue()


def with_stray_table(data):
    """A JPEG whose scan has a table in the middle, with a wrong length: libjpeg gives up on it."""
    place = len(data) - 40
    return data[:place] + b"\xff\xc4\x00\x05\x00\x01\x02" + data[place:]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("copied") / "src"
    for number in range(NUM_PICTURES):
        path = root / "ab"[number % 2] / f"{number // 2:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))
    return root


@pytest.fixture(scope="module")
def broken(good, tmp_path_factory):
    root = tmp_path_factory.mktemp("broken") / "src"
    for path in good.rglob("*.jpg"):
        name = path.relative_to(good)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes()
        (root / name).write_bytes(with_stray_table(data) if str(name) in BAD else data)
    return root


def convert(source, out, **options):
    defaults = {"split": "train", "workers": 1, "shard_bytes": 40_000, "val_fraction": 0.2}
    return convert_imagefolder(source, out, **{**defaults, **options})


def tree(folder):
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def expected(broken, tmp_path_factory):
    """What comes of the broken source if every picture is read in full before any is packed."""
    out = tmp_path_factory.mktemp("expected") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_read_header", lambda *args: (b"", None))
        report = convert(broken, out, on_error="skip")
    assert sum(len(split.problems) for split in report.splits.values()) == 2
    return tree(out)


def test_a_clean_jpeg_is_read_in_full_once_and_never_decoded(good, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("read in full before packing, or decoded")

    monkeypatch.setattr(prepare, "read_open", refuse)
    monkeypatch.setattr(prepare, "open_picture", refuse)
    monkeypatch.setattr(writer, "load_picture", refuse)
    reads = Counter()
    real = writer.open_sized
    monkeypatch.setattr(writer, "open_sized", lambda p: reads.update([str(p)]) or real(p))
    convert(good, tmp_path / "out")
    monkeypatch.undo()
    pictures = {path: count for path, count in reads.items() if path.endswith(".jpg")}
    assert len(pictures) == NUM_PICTURES and set(pictures.values()) == {1}
    assert verify_dataset(tmp_path / "out")["ok"]
    split = open_split(tmp_path / "out", "train")
    for index in range(len(split)):
        assert split.sample(index)["jpg"] == (good / split.source(index)).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_packing_finds_is_left_out_as_if_it_had_been_known(
    broken, expected, tmp_path, workers
):
    report = convert(broken, tmp_path / "out", on_error="skip", workers=workers)
    assert tree(tmp_path / "out") == expected
    named = [problem.file for split in report.splits.values() for problem in split.problems]
    assert sorted(named) == sorted(BAD)
    assert verify_dataset(tmp_path / "out")["ok"]


def test_what_packing_finds_stops_a_conversion(broken, tmp_path):
    with pytest.raises(ConversionError, match="2 problems in the input") as caught:
        convert(broken, tmp_path / "out", val_fraction=0.0)
    assert "  a/021.jpg: damaged picture (broken data stream" in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.failed.json"]


def test_all_problems_are_named_at_once(broken, tmp_path):
    """Those that preparing finds, which ends the run, and those that packing would have found."""
    (broken / "loose.jpg").write_bytes(jpeg(0))
    try:
        with pytest.raises(ConversionError, match="3 problems in the input") as caught:
            convert(broken, tmp_path / "out")
    finally:
        (broken / "loose.jpg").unlink()
    assert all(name in str(caught.value) for name in (*BAD, "loose.jpg"))
    assert not list((tmp_path / "out").glob("*/*.tar"))


@pytest.mark.parametrize("step", ["_note_late", "prepare_chunk", "pack_shard", "_finish"])
def test_a_kill_after_packing_has_found_bad_pictures(broken, expected, tmp_path, monkeypatch, step):
    """Killed before it is noted, after it, and while preparing and packing again."""
    real, late = getattr(work, step), []
    real_note = work._note_late
    monkeypatch.setattr(work, "_note_late", lambda *args: late.append(real_note(*args)))

    def stop(*args):
        if late or step == "_note_late":
            raise Killed
        return real(*args)

    monkeypatch.setattr(work, step, stop)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        convert(broken, out, on_error="skip")
    monkeypatch.undo()
    convert(broken, out, on_error="skip")
    assert tree(out) == expected


def test_a_picture_that_goes_away_meanwhile_is_a_problem(good, tmp_path, monkeypatch):
    source = tmp_path / "src"
    for path in good.rglob("*.jpg"):
        (source / path.relative_to(good)).parent.mkdir(parents=True, exist_ok=True)
        (source / path.relative_to(good)).write_bytes(path.read_bytes())
    real = run.pack

    def remove(item, tick):
        (source / "a/003.jpg").unlink(missing_ok=True)
        return real(item, tick)

    monkeypatch.setattr(run, "pack", remove)
    with pytest.raises(ConversionError, match=r"a/003.jpg: cannot be read: No such file"):
        convert(source, tmp_path / "out")


def test_parts_find_bad_pictures_too(broken, tmp_path):
    out = tmp_path / "out"
    for number in (1, 2, 3):
        report = convert(broken, out, part=(number, 3), on_error="skip")
    assert sum(len(split.problems) for split in report.splits.values()) == 2
    assert verify_dataset(out)["ok"]
    num_samples = sum(split.samples for split in report.splits.values())
    assert num_samples == NUM_PICTURES - len(BAD)


SEEDS = [
    jpeg(0, subsampling=0),
    jpeg(1, quality=60, optimize=True),
    jpeg(2, (40, 24), subsampling=1),
    jpeg(3, restart_marker_blocks=2),
    jpeg(4, progressive=True),
    jpeg(5, comment=b"of no meaning", icc_profile=b"x" * 200),
    jpeg(6, mode="L"),
    jpeg(7, mode="CMYK"),
    jpeg(8, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\0\0\0\0"),
    jpeg(9, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
]


def is_plain(data):
    header = plain_header(data)
    return header is not None and scan_is_whole(data, header.scan, has_restarts=header.has_restarts)


def test_which_files_need_no_decoding():
    assert [is_plain(data) for data in SEEDS] == [True] * 4 + [False, True] + [False] * 2 + [
        True
    ] * 2
    decoded = [open_picture(data).decoded is not None for data in SEEDS]
    # Of the last two, one is upright and one is rotated.
    assert decoded == [False] * 4 + [True, False, True, True, False, True]
    for data in SEEDS:
        first, second = open_picture(data), load_picture(data)
        for name in ("size", "clean", "kind", "orientation", "stored_size"):
            assert getattr(first, name) == getattr(second, name)
        assert (np.asarray(first.image) == np.asarray(second.image)).all()


def mutated(data, rng):
    """Change some bytes, most of them in the headers."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(data) if rng.random() < 0.4 else min(700, len(data)))
        match rng.randrange(6):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.choice((0, 255, 0xD9, 0xC0, 0xC4, 0xDA, 1, 2, 0x11, 0x22, 0xD0))
            case 2:
                del data[place : place + rng.randrange(1, 40)]
            case 3:
                data[place:place] = data[place : place + rng.randrange(1, 40)]
            case 4:
                data = data[: len(data) - rng.randrange(1, 60)]
            case 5:
                marker = rng.choice((0xD9, 0xD0, 0xC4, 0xDB, 0xDA, 0xDD, 0xC0, 0xFF, 0xE1, 0xE2))
                data[place : place + rng.choice((0, 2))] = bytes((255, marker))
        if len(data) < 10:
            break
    return bytes(data)


@given(st.integers(0, 2**64))
def test_what_needs_no_decoding_decodes(seed):
    """The other way round is no promise: what is not sure is decoded."""
    rng = random.Random(seed)
    for _ in range(20):
        data = mutated(rng.choice(SEEDS), rng)
        if not is_plain(data):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                picture = load_picture(data)
            except PictureError as error:
                if plain_header(data).has_metadata:
                    assert open_picture_fails(data)  # Pillow reads that, and decides
                    continue
                raise AssertionError(data.hex()) from error
        assert picture.stored_size == plain_header(data).size
        assert picture.clean or plain_header(data).has_metadata


def open_picture_fails(data):
    try:
        open_picture(data)
    except PictureError:
        return True
    return False


@given(st.integers(0, 10**12), st.sampled_from(["jpg", "npy", "cls", "json"]), st.integers(0, 8**9))
def test_headers_are_those_of_tarfile(key, extension, size):
    name = f"{format_key(key)}.{extension}"
    info = tarfile.TarInfo(name)
    info.size = size
    header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
    assert writer.tar_header(name, size) == header


@given(st.lists(st.integers(0, 3 * writer._BUFFER_BYTES // 2), max_size=6))
def test_a_tar_through_the_buffer_is_that_of_tarfile(sizes):
    rng = np.random.default_rng(len(sizes))
    members = [rng.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    ours, theirs = io.BytesIO(), io.BytesIO()
    tar = writer.TarWriter(ours)
    for number, data in enumerate(members):
        offset, room = tar.add(f"{number}.npy", len(data))
        room[:] = data
        assert offset == tar.position - writer.padded(len(data))
    tar.finish()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number, data in enumerate(members):
            info = tarfile.TarInfo(f"{number}.npy")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert ours.getvalue() == theirs.getvalue() and len(ours.getvalue()) == tar.position


def test_done_marks_of_shards_with_other_samples_go_first(broken, tmp_path, monkeypatch):
    """Shards packed before a bad picture was found hold other samples than those wanted now."""
    notes = []
    real = work.write_file

    def write(path, data):
        if path.name == "late.json":
            notes.append((json.loads(data), sorted(path.parent.glob("*.done"))))
        real(path, data)

    monkeypatch.setattr(work, "write_file", write)
    convert(broken, tmp_path / "out", on_error="skip", val_fraction=0.0)
    assert len(notes) == 1 and len(notes[0][0]) == 2 and notes[0][1] == []
