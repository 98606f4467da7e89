"""Data sets made to do harm: verify names what is wrong, within bounds, and touches nothing."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from hostile import MAX_PEAK_MB, add, mbv3dist, posix, snapshot
from PIL import Image

from mbv3dist.convert.verify import verify_dataset
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import open_split


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    for number in range(3):
        add(root / f"voc/{number}.jpg")
        text = f"<annotation><object><name>cat</name>{box}</object></annotation>"
        (root / f"voc/{number}.xml").write_text(text)
    convert_voc(root / "voc", root / "out", split="train", workers=1)
    return root


@pytest.fixture
def data(converted, tmp_path):
    shutil.copytree(converted / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    "url",
    [
        "/etc/passwd",
        "../../etc/passwd",
        "train/../../other.tar",
        "..\\other.tar",
        "C:\\other.tar",
        "file:///etc/passwd",
        "pipe:touch pwned",
        "http://127.0.0.1:1/x.tar",
        "train/\0.tar",
        "train//etc/passwd",
        "",
        7,
        None,
    ],
)
def test_a_shard_outside_the_data_set_is_refused(converted, data, url):
    path = data / "train.json"
    value = json.loads(path.read_text())
    value["shardlist"][0]["url"] = url
    path.write_text(json.dumps(value))
    before = snapshot(data.parent)
    for action in (
        lambda: verify_dataset(data),
        lambda: open_split(data, "train"),
        lambda: convert_voc(converted / "voc", data, split="train", workers=1),
    ):
        with pytest.raises(ValueError, match=r"train.json is not a split description") as caught:
            action()
        assert "\n" not in str(caught.value)
    assert snapshot(data.parent) == before


def repack(data, shard):
    """Put these bytes in place of the shard, with size and digest to match."""
    shard += bytes(-len(shard) % tarfile.RECORDSIZE)
    (data / "train/000000.tar").write_bytes(shard)
    value = json.loads((data / "train.json").read_text())
    row = value["shardlist"][0]
    row.update(filesize=len(shard), sha256=hashlib.sha256(shard).hexdigest())
    (data / "train.json").write_text(json.dumps(value))


def member(name, kind=tarfile.REGTYPE, data=b"", form=tarfile.USTAR_FORMAT, **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(form, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


HOSTILE_MEMBERS = {
    "parent": (member("../../evil.jpg", data=b"x"), "member '../../evil.jpg' where"),
    "absolute": (member("/tmp/evil.jpg", data=b"x"), "member '/tmp/evil.jpg' where"),
    "symlink": (member("e.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain ustar file"),
    "hardlink": (member("e.jpg", tarfile.LNKTYPE, linkname="../x"), "no plain ustar file"),
    "device": (member("e.jpg", tarfile.CHRTYPE, devmajor=1, devminor=5), "no plain ustar file"),
    "block": (member("e.jpg", tarfile.BLKTYPE, devmajor=8), "no plain ustar file"),
    "pipe": (member("e.jpg", tarfile.FIFOTYPE), "no plain ustar file"),
    "folder": (member("e", tarfile.DIRTYPE), "no plain ustar file"),
    "sparse": (member("e.jpg", tarfile.GNUTYPE_SPARSE), "no plain ustar file"),
    "pax": (member("ü" * 90, form=tarfile.PAX_FORMAT), "no plain ustar file"),
    "long": (member("x" * 300, form=tarfile.GNU_FORMAT), "no plain ustar file"),
    "owner": (member("e.jpg", uid=1000, data=b"x"), "has a time, an owner or another mode"),
    "setuid": (member("e.jpg", mode=0o4755, data=b"x"), "has a time, an owner or another mode"),
    "escape": (member("\x1b[2J\n.jpg", data=b"x"), "member '\\\\x1b[2J\\\\n.jpg' where"),
    "bytes": (member("\udcff.jpg", data=b"x"), "member '\\\\udcff.jpg' where"),
    "large": (member("e.jpg", size=8**11 - 1), "is cut off"),
    "enormous": (member("e.jpg", size=2**62, form=tarfile.GNU_FORMAT), "no plain ustar file"),
    "negative": (member("e.jpg", size=-512, form=tarfile.GNU_FORMAT), "no plain ustar file"),
}


@pytest.mark.parametrize("kind", HOSTILE_MEMBERS)
def test_members_that_are_no_pictures(data, kind):
    header, reason = HOSTILE_MEMBERS[kind]
    target = member("000000000.json", data=b"{}")
    repack(data, header + target + bytes(1024))
    before = snapshot(data.parent)
    result = verify_dataset(data)
    assert any(reason in problem for problem in result["problems"])
    assert all(problem.isprintable() for problem in result["problems"])
    assert snapshot(data.parent) == before
    assert not result["ok"]


def test_verify_allocates_nothing_that_is_only_claimed(data):
    shard = (data / "train/000000.tar").read_bytes()
    # A member as large as its tar, of zeros that take no room on the disk.
    head = member("000000000.jpg", size=513 << 20)
    with open(data / "train/000000.tar", "wb") as file:
        file.write(head)
        file.truncate(len(head) + (513 << 20) + 1024)
    value = json.loads((data / "train.json").read_text())
    value["shardlist"][0]["filesize"] = len(head) + (513 << 20) + 1024
    (data / "train.json").write_text(json.dumps(value))
    code, output, lines, peak = mbv3dist("verify", data)
    assert code == 2 and f"has {513 << 20} bytes" in output and not lines and peak < MAX_PEAK_MB
    repack(data, shard)
    # Side files and lists that are larger than they have any reason to be.
    for name in ("train/000000.idx", "train/000000.crc", "train.labels.npy"):
        os.truncate(data / name, 1 << 40)
    code, output, lines, peak = mbv3dist("verify", data)
    assert code == 2 and not lines and peak < MAX_PEAK_MB
    assert "train/000000.idx: does not fit to the tar" in output
    assert "train/000000.crc: does not fit to the tar" in output


@posix
@pytest.mark.parametrize("name", ["train/000000.tar", "train/000000.idx", "train/000000.crc"])
def test_verify_reads_no_pipes_and_devices(data, name):
    (data / name).unlink()
    os.mkfifo(data / name)
    problems = verify_dataset(data)["problems"]
    assert len(problems) >= 1 and "000000" in problems[0]
    (data / name).unlink()
    (data / name).symlink_to("/dev/zero")
    assert not verify_dataset(data)["ok"]


@posix
def test_verify_reads_no_endless_sources_or_labels(data):
    for name in ("train.sources.tsv", "train.labels.npy"):
        (data / name).unlink()
        (data / name).symlink_to("/dev/zero")
    problems = "\n".join(verify_dataset(data)["problems"])
    assert "train.sources.tsv" in problems and "train.labels.npy" in problems


def test_labels_are_never_unpickled(data, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "pwned"),))

    np.save(data / "train.labels.npy", np.array([Evil()] * 3, object), allow_pickle=True)
    problems = verify_dataset(data)["problems"]
    assert len(problems) == 1 and "train.labels.npy" in problems[0]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "target",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"width":16,"height":12,"boxes":' + b"[" * 3000 + b"]" * 3000,
        b'{"width":16,"height":12,"boxes":[["1","2","3","4"]],"labels":[0],"difficult":[0]}',
        b'{"width":1e999,"height":12,"boxes":[],"labels":[],"difficult":[]}',
        b'{"width":16,"height":12,"boxes":[[1,2,3,1'
        + b"0" * 400
        + b']],"labels":[0],"difficult":[0]}',
        b'{"width":16,"height":12,"boxes":[[1,2,3,4]],"labels":[1'
        + b"0" * 30
        + b'],"difficult":[0]}',
        b'{"width":16,"height":12,"boxes":[[NaN,2,3,4]],"labels":[0],"difficult":[0]}',
        b"null",
        b"\xff\xfe",
        b"9" * 5000,
        b"",
    ],
)
def test_hostile_targets(data, target):
    picture = io.BytesIO()
    Image.new("RGB", (16, 12)).save(picture, "JPEG")
    first = member("000000000.jpg", data=picture.getvalue()) + member("000000000.json", data=target)
    repack(data, first + bytes(1024))
    problems = verify_dataset(data)["problems"]
    assert any("sample 000000000 (2.jpg): its target " in problem for problem in problems)
    assert all(len(problem) < 1000 for problem in problems)


def test_deep_json_beside_a_split(converted, data):
    (data / "train.report.json").write_text('{"status":' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"train.report.json is missing or damaged"):
        convert_voc(converted / "voc", data, split="train", workers=1)
    (data / "train.json").write_text('{"wids_version":' + "[" * 100_000)
    with pytest.raises(ValueError, match="not a split description"):
        verify_dataset(data)
