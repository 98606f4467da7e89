"""Input made to do harm: refused in one line, within bounds, with nothing else touched."""

import io
import os
import re
import socket
import struct
import subprocess
import zlib

import pytest
from hostile import MAX_PEAK_MB, add, mbv3dist, posix, refused, snapshot
from PIL import Image

from mbv3dist.convert.files import UnusableFileError, read_bounded, show, walk_files
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.pictures import load_picture
from mbv3dist.convert.records import ConversionError
from mbv3dist.convert.voc import convert_voc
from mbv3dist.convert.voc_xml import AnnotationError, parse_annotation
from mbv3dist.data.class_names import read_class_file
from mbv3dist.data.formats import PictureError
from mbv3dist.data.index import open_split

SECRET = "sesame-4711"


def problems_of(kind, source, out, **options):
    """Convert what is usable; return the report's problems by file."""
    convert = convert_imagefolder if kind == "imagefolder" else convert_voc
    defaults = {"split": "train", "workers": 1, "on_error": "skip"}
    report = convert(source, out, **{**defaults, **options}).splits["train"]
    for problem in report.problems:
        assert str(problem).isprintable() and len(str(problem)) < 1000
    return {problem.file: problem.reason for problem in report.problems}


# XML


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
HOSTILE_XML = {
    "laughs": f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l11;</annotation>',
    "blowup": f'<!DOCTYPE a [<!ENTITY a "{"a" * 100_000}">]><annotation>{"&a;" * 9000}',
    "external": '<!DOCTYPE a [<!ENTITY x SYSTEM "%s">]><annotation>&x;</annotation>',
    "parameter": '<!DOCTYPE a [<!ENTITY %% x SYSTEM "%s"> %%x;]><annotation/>',
    "dtd": '<!DOCTYPE annotation SYSTEM "%s"><annotation/>',
    "plain_dtd": "<!DOCTYPE annotation><annotation/>",
    "deep": "<annotation>" + "<a>" * 1_000_000,
    "nested": "<annotation>" + "<object>" * 500 + "</object>" * 500 + "</annotation>",
    "huge": "<annotation>" + " " * (9 << 20) + "</annotation>",
    "encoding": '<?xml version="1.0" encoding="nonsense"?><annotation/>',
    "codec": '<?xml version="1.0" encoding="zlib_codec"?><annotation/>',
    "nothing": "\0" * 1000,
}
REASONS = {
    "deep": "nested more than 100 deep",
    "nested": "nested more than 100 deep",
    "huge": "more than 8 MiB",
    "encoding": "damaged XML",
    "codec": "damaged XML",
    "nothing": "damaged XML",
}


def test_hostile_xml_is_named_file_by_file(tmp_path):
    root, out = tmp_path / "voc", tmp_path / "out"
    add(root / "good.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    good = f"<annotation><object><name>cat</name>{box}</object></annotation>"
    (root / "good.xml").write_text(good)
    (tmp_path / "secret").write_text(SECRET)
    for name, text in HOSTILE_XML.items():
        if "%s" in text:
            text = text % (tmp_path / "secret").as_uri()
        (root / f"{name}.xml").write_text(text)
        add(root / f"{name}.jpg")
    before = snapshot(tmp_path)
    words = ["convert", "voc", root, "--out", out, "--split", "train", "--workers", 1]
    code, _, lines, peak = mbv3dist(*words)
    assert code == 2 and len(lines) == len(HOSTILE_XML) + 2  # a headline, one each, the cure
    for name in HOSTILE_XML:
        (line,) = [line for line in lines if line.strip().startswith(f"{name}.xml: ")]
        assert REASONS.get(name, "DOCTYPE or entities is refused") in line
    assert peak < MAX_PEAK_MB
    assert SECRET not in "".join(lines)
    assert snapshot(tmp_path, without=out) == before
    code, _, lines, _ = mbv3dist(*words, "--on-error", "skip")
    assert code == 0 and len(open_split(out, "train")) == 1
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    assert snapshot(tmp_path, without=out) == before


def test_large_values_in_an_xml_stay_out_of_messages():
    box = "<bndbox><xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    found = parse_annotation(
        f"<annotation><object><name>{'n' * 5000}</name>{box.format(1)}</object>"
        f"<object><name>cat</name>{box.format('9' * 5000 + 'x')}</object>"
        f"<object><name>cat</name>{box.format('9' * 5000)}</object>"
        f"<object><name>cat</name>{box.format('1e999')}</object></annotation>".encode()
    )
    assert not found.objects and found.names == ("cat",)
    assert len(found.refused) == 4 and all(len(reason) < 350 for reason in found.refused)
    with pytest.raises(AnnotationError) as caught:
        parse_annotation(b"<" + b"x" * 10_000 + b"/>")
    assert len(str(caught.value)) < 500


def test_a_filename_never_leads_out_of_the_folder(tmp_path):
    root = tmp_path / "voc"
    add(tmp_path / "outside.jpg")
    names = [
        str(tmp_path / "outside.jpg"),
        "../outside.jpg",
        "..\\outside.jpg",
        "..",
        "/etc/passwd",
        "C:\\outside.jpg",
        "outside.jpg\0",
        "~/outside.jpg",
    ]
    add(root / "JPEGImages/good.jpg")
    (root / "Annotations").mkdir()
    (root / "Annotations/good.xml").write_text("<annotation/>")
    for number, name in enumerate(names):
        text = f"<annotation><folder>..</folder><filename>{name}</filename><path>{name}</path>"
        (root / f"Annotations/{number}.xml").write_text(f"{text}</annotation>")
    found = problems_of("voc", root, tmp_path / "out", classes=["cat"])
    assert len(found) == len(names)
    for number, name in enumerate(names):
        reason = found[f"Annotations/{number}.xml"]
        assert ("damaged XML" if "\0" in name else "no picture of that name") in reason
    assert len(open_split(tmp_path / "out", "train")) == 1


def test_hostile_lists(tmp_path):
    root, out = tmp_path / "voc", tmp_path / "out"
    add(root / "JPEGImages/good.jpg")
    for name in ("Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "Annotations/good.xml").write_text("<annotation/>")
    (tmp_path / "other.xml").write_text("<annotation/>")
    (root / "labels.txt").write_text("cat\n")
    path = root / "ImageSets/Main/train.txt"
    lines = ["../../other", str(tmp_path / "other"), "..", "/", "a\x1b[2Jb", "../Annotations/good"]
    path.write_text("\n".join(["good", *lines]))
    found = problems_of("voc", root, out, classes=["cat"])
    assert len(found) == len(lines) and set(found.values()) == {"listed, but there is no such file"}
    assert open_split(out, "train").source(0) == "JPEGImages/good.jpg"
    words = ["convert", "voc", root, "--out", tmp_path / "new", "--split", "train", "--workers", 1]
    for content, match in (
        (b"x" * 10_000, "has a line of more than 5000 characters"),
        (b"\xff\xfe\x00\x01", "is not UTF-8 text"),
        (b"\n".join(b"%d" % n for n in range(1_000_003)), "names far more annotations than there"),
    ):
        path.write_bytes(content)
        refused(words, match)
    os.truncate(path, 300 << 20)
    refused(words, "is not read: it has more than 256 MiB")


# Pictures


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(mode, form, **options):
    buffer = io.BytesIO()
    Image.new(mode, (16, 16)).save(buffer, form, **options)
    return bytearray(buffer.getvalue())


def bomb(kind):
    """A small file of a kind that claims to be an enormous picture."""
    if kind == "png":
        header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")
    if kind == "jpeg":  # whose sizes have 16 bits
        data = saved("RGB", "JPEG")
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", 65500, 65500)
    elif kind == "webp":
        data = saved("RGB", "WEBP")
        side = (100_000 - 1).to_bytes(3, "little")
        extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + side + side
        body = b"WEBP" + extended + bytes(data[12:])
        return b"RIFF" + struct.pack("<I", len(body)) + body
    elif kind == "webp_lossy":  # whose sizes have 14 bits
        data = saved("RGB", "WEBP")
        start = data.index(b"\x9d\x01\x2a") + 3
        data[start : start + 4] = struct.pack("<HH", 16383, 16383)
    elif kind == "gif":
        data = saved("L", "GIF")
        data[6:10] = struct.pack("<HH", 65535, 65535)
    elif kind == "bmp":
        data = saved("RGB", "BMP")
        data[18:26] = struct.pack("<ii", 100_000, 100_000)
    else:
        data = saved("RGB", "TIFF")
        start = struct.unpack("<I", data[4:8])[0] + 2
        for place in range(start, len(data) - 12, 12):
            if struct.unpack("<H", data[place : place + 2])[0] in (256, 257):
                data[place + 2 : place + 12] = struct.pack("<HII", 4, 1, 100_000)
    return bytes(data)


BOMBS = ("png", "jpeg", "webp", "webp_lossy", "gif", "bmp", "tiff")
# Up to Pillow 12 "webp" is refused by its decoder, before Pillow has seen a size.
ENORMOUS = "more than 89478485 pixels|could not create decoder object"


def test_pictures_that_claim_to_be_enormous(tmp_path):
    source, out = tmp_path / "src", tmp_path / "out"
    add(source / "a/good.jpg")
    for kind in BOMBS:
        (source / f"a/{kind}.jpg").write_bytes(bomb(kind))
        with pytest.raises(PictureError, match=ENORMOUS):
            load_picture(bomb(kind))
    words = ["convert", "imagefolder", source, "--out", out, "--split", "train", "--workers", 1]
    code, _, lines, peak = mbv3dist(*words)
    assert code == 2 and len(lines) == len(BOMBS) + 2 and peak < MAX_PEAK_MB
    assert sum(bool(re.search(ENORMOUS, line)) for line in lines) == len(BOMBS)


def test_files_that_pillow_would_start_a_program_for_are_no_pictures():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(PictureError, match="not a picture"):
        load_picture(postscript)


@posix
def test_pipes_devices_and_sockets_are_not_read(tmp_path):
    source = tmp_path / "src"
    add(source / "a/good.jpg")
    os.mkfifo(source / "a/pipe.jpg")
    (source / "a/zero.jpg").symlink_to("/dev/zero")
    (source / "a/gone.jpg").symlink_to("nowhere.jpg")
    (source / "a/loop.jpg").symlink_to("loop.jpg")
    os.truncate(os.open(source / "a/huge.jpg", os.O_CREAT | os.O_RDWR), 1 << 40)
    with socket.socket(socket.AF_UNIX) as endpoint:
        place = os.getcwd()
        os.chdir(source / "a")  # a socket's path is short
        try:
            endpoint.bind("socket.jpg")
        finally:
            os.chdir(place)
        found = problems_of("imagefolder", source, tmp_path / "out")
    assert set(found) == {f"a/{n}.jpg" for n in ("pipe", "zero", "gone", "loop", "huge", "socket")}
    assert "more than 512 MiB" in found["a/huge.jpg"]
    for name in ("pipe", "zero"):
        assert found[f"a/{name}.jpg"] == "it is a pipe, a device or the like, not a file"
    for path in (source / "a/pipe.jpg", "/dev/zero"):
        with pytest.raises(UnusableFileError):
            read_bounded(path, 10)
    with pytest.raises(UnusableFileError, match="more than 0 MiB"):
        read_bounded(source / "a/good.jpg", 10)


# Names and links


@posix
def test_links_are_followed_and_those_to_outside_counted(tmp_path):
    source, elsewhere = tmp_path / "src", tmp_path / "elsewhere"
    add(source / "a/own.jpg")
    add(elsewhere / "one.jpg")
    add(elsewhere / "two.jpg")
    (source / "a/inside.jpg").symlink_to("own.jpg")
    (source / "a/outside.jpg").symlink_to(elsewhere / "one.jpg")
    (source / "a/folder").symlink_to(elsewhere)
    (source / "a/up").symlink_to(source / "a")  # a circle is left out
    report = convert_imagefolder(source, tmp_path / "out", split="train", workers=1)
    assert report.splits["train"].counts == {"kept": 5, "linked_from_outside": 3}
    (source / "a/again").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"'again' and 'folder' are links to one folder"):
        convert_imagefolder(source, tmp_path / "new", split="train", workers=1)


@posix
def test_links_that_multiply_end(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}").mkdir()
        if number:
            for name in "xy":
                (tmp_path / f"{number - 1}/{name}").symlink_to(tmp_path / f"{number}")
    with pytest.raises(ValueError, match="are links to one folder"):
        list(walk_files(tmp_path / "0"))


@posix
def test_folders_of_any_depth(tmp_path):
    place = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):  # beyond Python's limit of calls within calls
            os.mkdir("d")
            os.chdir("d")
        open("x.jpg", "w").close()
        os.chdir(place)
        assert list(walk_files(tmp_path)) == ["d/" * 1200 + "x.jpg"]
    finally:
        os.chdir(place)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # too deep for shutil's


STRANGE = ["line\nbreak", "tab\ttab", "esc\x1b[2J", "bell\x07", "next\x85", "line\u2028", "\udcff"]


@posix
def test_names_that_could_not_be_written_down(tmp_path):
    source = tmp_path / "src"
    add(source / "a/good..name ü.jpg")
    try:
        for name in STRANGE:
            add(source / "tmp.jpg")
            os.rename(source / "tmp.jpg", source / f"a/{name}.jpg")
            (source / f"{name}.png").touch()  # beside the class folders
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such names")
    found = problems_of("imagefolder", source, tmp_path / "out")
    assert len(found) == 2 * len(STRANGE)
    written = (tmp_path / "out/train.sources.tsv").read_bytes()
    assert written == "000000000\ta/good..name ü.jpg\n".encode()
    with pytest.raises(ConversionError) as caught:
        convert_imagefolder(source, tmp_path / "new", split="train", workers=1)
    assert len(str(caught.value).splitlines()) == 2 * len(STRANGE) + 2
    for name in STRANGE:
        os.mkdir(source / name)
        with pytest.raises(ValueError, match="one name a line") as refusal:
            convert_imagefolder(source, tmp_path / "new", split="train", workers=1)
        assert str(refusal.value).isprintable()
        os.rmdir(source / name)


def test_show():
    assert show("plain ü 図 name") == "plain ü 図 name"
    assert show("a\nb\x1b\u202e\udcff") == "a\\nb\\x1b\\u202e\\udcff"
    assert len(show("x" * 10_000)) < 310


@posix
def test_hostile_class_files(tmp_path):
    source = tmp_path / "src"
    add(source / "a/1.jpg")
    path = tmp_path / "classes"
    words = ["convert", "imagefolder", source, "--out", tmp_path / "out", "--split", "train"]
    words += ["--classes", path]
    for content, match in (
        (b"\x89PNG\r\n\x1a\n\0\0\xff", "is not UTF-8 text"),
        (b"a\0b\n", "control characters"),
        (b"a\x1b[31m\n", "control characters"),
        (b"x" * 5000, "at most 1000 characters"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match) as caught:
            read_class_file(path)
        assert str(caught.value).isprintable()
    path.write_bytes(b"".join(b"%07d\n" % n for n in range(2_000_000)))
    refused(words, "names 2000000 classes; there must be")
    os.truncate(path, 1 << 40)
    refused(words, "is not read: it has more than 16 MiB")
    path.unlink()
    os.mkfifo(path)
    refused(words, "is not read: it is a pipe")


def test_a_picture_too_long_for_a_jpeg_is_named(tmp_path):
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    Image.new("RGB", (70_000, 2)).save(folder / "long.png")
    Image.new("RGB", (9, 9)).save(folder / "good.png")
    with pytest.raises(
        ValueError, match=r"a/long.png: 70000 x 2 pixels: a JPEG holds at most 65500"
    ):
        convert_imagefolder(tmp_path / "src", tmp_path / "out", split="train", workers=1)
