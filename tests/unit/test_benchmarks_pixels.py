"""The benchmarks of loaders and decoders: their pictures, their quick forms."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from PIL import Image

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
import loader  # noqa: E402
from pixel_peers import decoders, pictures, serve, systems  # noqa: E402
from pixel_peers.torchvision_peer import read_boxes  # noqa: E402


def run_script(name, *words):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name, *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# what is timed


class FakeTime:
    """A clock that only the batches move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(serve.time, "perf_counter", lambda: self.now)

    def epoch(self, durations, batch=8):
        """Yield a batch after each of the durations, in seconds."""
        for number, took in enumerate(durations):
            self.now += took
            yield np.zeros((batch, 3)), np.arange(number * batch, (number + 1) * batch)


def test_only_the_middle_of_an_epoch_is_timed(monkeypatch):
    fake = FakeTime(monkeypatch)
    # Slow to start, 2 s a batch in the middle, and at the end the workers run dry.
    durations = [100.0, 50.0, 2.0, 2.0, 2.0, 2.0, 0.1, 0.1]
    started = []

    def epoch():
        started.append(fake.now)
        return fake.epoch(durations)

    answer = serve.timed_round(epoch, warm=16, tail=16, seconds=10)
    assert answer["samples"] / answer["seconds"] == pytest.approx(8 / 2)
    assert answer["epochs"] == 2  # 8 s are timed in one
    assert len(started) == 3  # the first one warms up
    assert answer["labels"] == [(number, 2) for number in range(64)]
    assert answer["output"] == "float64 [8, 3]"


def test_an_epoch_too_short_to_be_timed_is_refused(monkeypatch):
    fake = FakeTime(monkeypatch)
    with pytest.raises(ValueError, match="too short"):
        serve.timed_round(lambda: fake.epoch([1.0, 1.0]), warm=8, tail=8, seconds=1)


@pytest.mark.parametrize(("count", "ok"), [(2, True), (1, False), (3, False)])
def test_a_loader_that_loses_or_doubles_pictures_has_no_figure(count, ok):
    class Child:
        def ask(self, job):
            labels = [[0, 4], [1, 2 * count]]
            return {"samples": 100, "seconds": 2.0, "epochs": 2, "labels": labels}

    args = loader.parse(["--samples", "1024"])
    data = {"samples": 4, "labels": [[0, 2], [1, 2]]}
    if ok:
        assert loader._round(Child(), "x", data, {}, args) == 50
    else:
        with pytest.raises(RuntimeError, match="an epoch of 4 pictures delivered"):
            loader._round(Child(), "x", data, {}, args)


# pictures


def test_copies_are_plain_jpegs_that_go_round(tmp_path):
    source = tmp_path / "source"
    pictures.write_pictures(source, 3, width=60, height=40)
    gray = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40))
    gray.save(source / "class0" / "gray.jpg")
    rotated = Image.new("RGB", (40, 20))
    rotated.save(source / "class1" / "rotated.jpg", exif=b"Exif\0\0" + orientation_exif(6))
    files = pictures.list_folder(source)
    encoded = pictures.copy_folder(files, tmp_path / "out", samples=12)
    assert encoded == 2
    copies = sorted((tmp_path / "out").glob("*/*.jpg"))
    assert len(copies) == 12
    for copy in copies:
        with Image.open(copy) as image:
            assert image.mode == "RGB" and image.format == "JPEG"
            assert image.getexif().get(0x0112, 1) == 1
            if "rotated" in copy.name:
                assert image.size == (20, 40)
    same = tmp_path / "out" / files[0].parent.name / f"{files[0].stem}-000.jpg"
    assert same.read_bytes() == files[0].read_bytes()
    with pytest.raises(ValueError, match="no pictures in folders"):
        pictures.list_folder(tmp_path / "out" / "class0")


def orientation_exif(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes().removeprefix(b"Exif\0\0")


def test_resized_copies_have_the_shorter_side(tmp_path):
    big, small = tmp_path / "a" / "x", tmp_path / "a" / "y"
    for place, size in ((big, (400, 300)), (small, (300, 200))):
        place.mkdir(parents=True)
        Image.new("RGB", size, (9, 200, 60)).save(place / "p-000.jpg")
        Image.new("RGB", size, (9, 200, 60)).save(place / "p-001.jpg")
    pictures.resize_folder(tmp_path / "a", tmp_path / "b")
    sizes = {}
    for path in (tmp_path / "b").glob("*/*.jpg"):
        with Image.open(path) as image:
            sizes[f"{path.parent.name}/{path.name}"] = image.size
    assert sizes == {
        "x/p-000.jpg": (341, 256),
        "x/p-001.jpg": (341, 256),
        "y/p-000.jpg": (300, 200),
        "y/p-001.jpg": (300, 200),
    }


def test_a_voc_folder_is_copied_without_empty_boxes(tmp_path):
    pictures.write_voc(tmp_path / "voc", 3, width=120, height=90)
    notes = tmp_path / "voc" / "Annotations" / "00001.xml"
    whole = notes.read_text()
    empty = (
        "<object><name>kind9</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>5</xmax>"
        "<ymax>9</ymax></bndbox></object></annotation>"
    )
    notes.write_text(whole.replace("</annotation>", empty))
    assert pictures.copy_voc(tmp_path / "voc", tmp_path / "out", samples=7) == 1
    names = (tmp_path / "out" / "ImageSets" / "Main" / "trainval.txt").read_text().split()
    assert len(names) == len(set(names)) == 7
    for name in names:
        assert (tmp_path / "out" / "JPEGImages" / f"{name}.jpg").is_file()
        boxes, labels = read_boxes(tmp_path / "out" / "Annotations" / f"{name}.xml")
        given, _ = read_boxes(tmp_path / "voc" / "Annotations" / f"{name[:-4]}.xml")
        expected = [box for box in given if box[2] - box[0] > 1]
        assert boxes == expected and len(labels) == len(boxes) >= 1
    with pytest.raises(ValueError, match="Pascal VOC"):
        pictures.copy_voc(tmp_path, tmp_path / "other", samples=1)


# decoders


@pytest.fixture(scope="module")
def drawn():
    crops = np.array([[0, 0, 120, 90], [10, 20, 50, 60], [30, 5, 33, 80], [60, 40, 118, 90]])
    flips = np.array([False, True, False, True])
    files = [bytearray(data) for data in pictures.draw_pictures(4, width=120, height=90)]
    return files, crops, flips


@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize(("name", "mean", "worst"), [("ours", 0.25, 1.5), ("torchvision", 0.6, 1)])
def test_decoders_draw_the_same_crops(drawn, name, mean, worst):
    if name == "torchvision":
        pytest.importorskip("torchvision")
    files, crops, flips = drawn
    out = np.zeros((2, 4, 64, 64, 3), np.uint8)
    decoders.make_decoder("pillow")(files, crops, flips, out[0])
    decoders.make_decoder(name)(files, crops, flips, out[1])
    levels = np.abs(out[0].astype(int) - out[1]).mean(axis=(1, 2, 3))
    assert out[0].std() > 10  # there is something to see
    assert levels.mean() <= mean and levels.max() <= worst
    wrong = np.abs(out[0][:, :, ::-1].astype(int) - out[1]).mean(axis=(1, 2, 3))
    assert wrong.min() > 5  # a mirrored one would be noticed


class FakePictures:
    """Files that nobody decodes."""

    size = 8

    def __init__(self, count):
        self.files = [bytearray(b"x")] * count
        self.crops, self.flips = np.zeros((count, 4), np.int64), np.zeros(count, bool)

    def __len__(self):
        return len(self.files)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_picture_is_decoded_once_and_errors_come_out(threads):
    seen = []

    def draw(data, crops, flips, out):
        assert len(data) == len(crops) == len(flips) == len(out)
        seen.append(len(data))

    out = decoders.new_slots(threads, 8)
    assert decoders.decode_all(draw, FakePictures(77), out, threads=threads) > 0
    assert sum(seen) == 77

    def broken(data, crops, flips, out):
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        decoders.decode_all(broken, FakePictures(3), out, threads=threads)


def test_a_slower_decoder_is_seen_as_slower():
    def draw(data, crops, flips, out):
        time.sleep(0.0005 * len(data))

    def slower(data, crops, flips, out):
        time.sleep(0.0015 * len(data))

    out = decoders.new_slots(1, 8)
    runs = {
        name: lambda function=function: decoders.decode_all(
            function, FakePictures(32), out, threads=1
        )
        for name, function in (("draw", draw), ("slower", slower))
    }
    figures = harness.interleave(runs, rounds=5)
    assert harness.ratio(figures["slower"], figures["draw"])["high"] < 0.8


# wrong usage


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("loader", ["--only", "fcv"], "no pipeline 'fcv'"),
        ("loader", ["--sizes", "512"], "it takes originals,256"),
        ("loader", ["--samples", "1000"], "must be a multiple of --batch 64"),
        ("loader", ["--data", "nowhere"], "no pictures in folders in nowhere"),
        ("loader", ["--task", "detection", "--voc", "nowhere"], "Pascal VOC"),
        ("decode", ["--parts", "speed"], "'speed' is none of"),
        ("decode", ["--threads", "0"], "it takes numbers like"),
    ],
)
def test_wrong_usage_is_one_line(script, words, message, capsys):
    module = pytest.importorskip(script)
    assert module.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith(f"{script}: ") and message in last


def test_a_work_folder_with_other_pictures_is_refused(tmp_path, capsys):
    place = tmp_path / "originals"
    place.mkdir()
    (place / "mine.txt").write_text("keep")
    assert loader.main(["--work", str(tmp_path)]) == 2
    assert "not of this benchmark" in capsys.readouterr().err
    (place / "about.json").write_text(json.dumps({"source": "a", "samples": 1, "quick": False}))
    assert loader.main(["--work", str(tmp_path)]) == 2
    assert "holds other pictures" in capsys.readouterr().err


# the quick forms, without the peers' environment


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "detection"])
def test_quick_loaders(task, tmp_path):
    saved = tmp_path / "report.json"
    words = ["--quick", "--task", task, "--peers-python", tmp_path / "none", "--json", saved]
    report = run_script("loader.py", *words, "--markdown", tmp_path / "report.md")
    assert report == json.loads(saved.read_text())
    (part,) = report["sections"].values()
    rows = part["systems"]
    assert {systems.OURS, systems.DELAYED} < set(rows)
    # The pause at each of our batches is seen.
    assert rows[systems.DELAYED]["ours_is"]["low"] > 1.2
    limit = part["settings"]["batch"] / loader.DELAY_S
    assert rows[systems.DELAYED]["images_per_s"]["median"] < 1.05 * limit
    assert rows[systems.OURS]["output"].startswith("uint8 [16, 3, ")
    named = set(rows) | set(part["not_measured"])
    known = systems.DETECTION if task == "detection" else systems.CLASSIFICATION
    assert named == (set(known) - {systems.CHECKED}) | {systems.DELAYED}
    if task == "classification":
        assert "not installed here (cv2, ffcv)" in part["not_measured"]["ffcv"]["reason"]
    text = (tmp_path / "report.md").read_text()
    assert all(row["title"] in text for row in rows.values())


@pytest.mark.slow
def test_quick_decoders(tmp_path):
    report = run_script("decode.py", "--quick", "--peers-python", tmp_path / "none")
    sections = report["sections"]
    assert set(sections) == {"decoders originals", "loader originals", "stages originals"}
    rows = sections["decoders originals"]["decoders"]
    assert rows["ours"]["difference"]["mean"] <= 0.25
    assert rows["ours"]["difference"]["worst"] <= 1.5
    assert rows["pillow"]["difference"] == {"mean": 0, "worst": 0}
    assert "simplejpeg" in sections["decoders originals"]["not_measured"]
    for row in sections["loader originals"]["threads"].values():
        assert row["loader_images_per_s"]["median"] > 0
        assert 0 < row["share_of_limit"]["ratio"] < 2
    us = sections["stages originals"]["us"]
    assert set(us) == set(pytest.importorskip("decode").STAGES)
    # Nothing is counted for a stage that is not watched, so each has taken its time.
    assert all(row["median"] > 0 for name, row in us.items() if name != "hand-over")
    assert us["decode"]["median"] > us["parse"]["median"]
