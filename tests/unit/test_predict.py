"""Prediction: the same detections as evaluation, sources, names, files, errors."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mbv3dist.data.formats import PICTURE_SUFFIXES
from mbv3dist.data.index import open_split
from mbv3dist.data.reader import Reader
from mbv3dist.evaluation.detection import DetectionEvaluator
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.predict import _Runner, choose_device, classify, detect, predict
from mbv3dist.inference.sources import (
    MAX_NAMED,
    drawing_names,
    find_pictures,
    unreadable_error,
)
from mbv3dist.models.directory import LoadedModel, load_model, model_from_spec, new_spec, save_model

CLASSES = ("blue", "green", "red")


def small_model(architecture, *, size, classes=CLASSES):
    spec = new_spec(architecture, classes, input_size=size, width=0.5)
    torch.manual_seed(0)
    return LoadedModel(model_from_spec(spec).eval(), spec)


@pytest.fixture(scope="module")
def detector():
    return small_model("ssdlite_mobilenetv3_small", size=64)


@pytest.fixture(scope="module")
def classifier():
    return small_model("mobilenetv3_small", size=32)


def noise(width=90, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path):
    """A tree with equal stems, upper-case and unusual extensions, and files that are no pictures.

    a/one.jpg, a/two.PNG, b/one.jpg, b/deep/One.jpeg, notes.txt, .hidden.jpg
    """
    root = tmp_path / "pictures"
    names = ("a/one.jpg", "a/two.PNG", "b/one.jpg", "b/deep/One.jpeg")
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        noise(80 + number, 60, seed=number).save(root / name)
    (root / "notes.txt").write_text("no picture")
    (root / ".hidden.jpg").write_bytes(b"no picture")
    return root


def extracted(split, folder):
    """The stored pictures of a split as files, named by their index."""
    folder.mkdir()
    for index in range(len(split)):
        (folder / f"{index:03d}.jpg").write_bytes(split.sample(index)["jpg"])
    return folder


def test_predicts_what_evaluation_scores(detector, detection_data, tmp_path, monkeypatch):
    split = open_split(detection_data, "val")
    seen = {}
    add = DetectionEvaluator.add

    def spy(self, index, **values):
        seen[index] = values
        add(self, index, **values)

    monkeypatch.setattr(DetectionEvaluator, "add", spy)
    evaluate(detector.model, detector.spec, split, batch_size=4)
    folder = extracted(split, tmp_path / "pictures")

    images = [Image.open(folder / f"{i:03d}.jpg") for i in range(len(split))]
    found = detect(detector, images, batch_size=4)
    assert len(found) == len(split) == 7
    assert sum(len(one["boxes"]) for one in found) > 100
    for index, one in enumerate(found):
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(one[name].numpy(), seen[index][name])

    threshold = detector.spec.thresholds.score
    result = predict(
        detector, [folder], tmp_path / "out", score_threshold=threshold, batch_size=4, draw=False
    )
    for index, entry in enumerate(result["pictures"]):
        rows = entry["detections"]
        expected = seen[index]
        assert [CLASSES.index(row["label"]) for row in rows] == list(expected["labels"])
        np.testing.assert_allclose([row["score"] for row in rows], expected["scores"], atol=1e-6)
        np.testing.assert_allclose([row["box"] for row in rows], expected["boxes"], atol=1e-3)


def test_classifies_what_evaluation_scores(classifier, classification_data, tmp_path):
    split = open_split(classification_data, "val")
    result = evaluate(classifier.model, classifier.spec, split, batch_size=4)
    folder = extracted(split, tmp_path / "pictures")
    entries = predict(classifier, [folder], tmp_path / "out", batch_size=4)["pictures"]
    with Reader(split) as reader:
        truth = [CLASSES[reader.target(index).label] for index in range(len(split))]
    right = sum(
        entry["top"][0]["label"] == name for entry, name in zip(entries, truth, strict=True)
    )
    assert right == round(result["top1"] * len(split))
    for entry in entries:
        scores = [row["score"] for row in entry["top"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1.0, abs=1e-5)


def test_writes_pictures_and_json(detector, pictures, tmp_path):
    out = tmp_path / "new" / "out"
    done = []
    result = predict(
        detector,
        [str(pictures)],
        out,
        score_threshold=0.2,
        batch_size=3,
        progress=lambda *counts: done.append(counts),
    )
    assert done == [(3, 4), (4, 4)]
    assert json.loads((out / "predictions.json").read_text()) == result
    assert [entry["drawing"] for entry in result["pictures"]] == [
        "one.jpg",
        "two.jpg",
        "One-2.jpg",
        "one-3.jpg",
    ]
    expected = {entry["drawing"] for entry in result["pictures"]} | {"predictions.json"}
    assert set(os.listdir(out)) == expected
    for number, entry in enumerate(result["pictures"]):
        with Image.open(entry["file"]) as source:
            assert (entry["width"], entry["height"]) == source.size
        with Image.open(out / entry["drawing"]) as drawn:
            assert drawn.size[0] % entry["width"] == 0
        for row in entry["detections"]:
            x1, y1, x2, y2 = row["box"]
            assert 0 <= x1 <= x2 <= entry["width"]
            assert 0 <= y1 <= y2 <= entry["height"]
            assert row["score"] > 0.2
        assert number < 4
    again = predict(detector, [pictures], out, score_threshold=0.2, batch_size=2)
    assert [e["drawing"] for e in again["pictures"]] == [e["drawing"] for e in result["pictures"]]


def test_default_threshold_is_for_display(detector, pictures, tmp_path):
    result = predict(detector, [pictures], tmp_path / "out", draw=False)
    scores = [row["score"] for entry in result["pictures"] for row in entry["detections"]]
    assert all(score > 0.3 for score in scores)
    assert os.listdir(tmp_path / "out") == ["predictions.json"]


def test_model_directory(detector, pictures, tmp_path):
    save_model(detector.model, detector.spec, tmp_path / "model")
    from_memory = predict(detector, [pictures], tmp_path / "a", score_threshold=0.1)
    from_disk = predict(tmp_path / "model", [pictures], tmp_path / "b", score_threshold=0.1)
    assert from_memory == from_disk
    assert load_model(tmp_path / "model").spec == detector.spec


def test_exif_pictures_are_upright(detector, tmp_path):
    upright = noise(90, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    files = [tmp_path / "lying.png", tmp_path / "upright.png"]
    first, second = predict(detector, files, tmp_path / "out", score_threshold=0.1)["pictures"]
    assert (first["width"], first["height"]) == (90, 60)
    assert first["detections"] == second["detections"]
    drawings = [Image.open(tmp_path / "out" / entry["drawing"]) for entry in (first, second)]
    assert drawings[0].tobytes() == drawings[1].tobytes()
    with Image.open(files[0]) as opened:
        (found,) = detect(detector, [opened], score_threshold=0.1)
    assert len(found["boxes"]) == len(second["detections"])


def test_detect_takes_pil_arrays_and_tensors(detector):
    picture = noise()
    pixels = np.array(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = [picture, pixels, tensor, tensor.float() / 255, picture.convert("RGBA")]
    results = detect(detector, forms, batch_size=len(forms))
    for result in results[1:]:
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(result[name], results[0][name], rtol=1e-4, atol=1e-4)
    assert results[0]["labels"].dtype == torch.int64
    assert results[0]["labels"].min() >= 0
    assert results[0]["labels"].max() <= 2
    assert detect(detector, []) == []
    assert len(detect((detector.model, detector.spec), [pixels[..., 0]])) == 1
    for bad in (pixels.astype(np.float32), tensor.float(), tensor[None], pixels[..., :2]):
        with pytest.raises(ValueError, match=r"give|divide"):
            detect(detector, [bad])


def test_classify(classifier, detector):
    (best,) = classify(classifier, [noise()], top=2)
    assert len(best) == 2
    assert {name for name, _ in best} <= set(CLASSES)
    with pytest.raises(ValueError, match=r"use classify\(\)"):
        detect(classifier, [noise()])
    with pytest.raises(ValueError, match=r"use detect\(\)"):
        classify(detector, [noise()])


def test_training_mode_is_left_as_it_was(detector):
    model = model_from_spec(detector.spec).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detect((model, detector.spec), [noise()])
    assert model.training
    assert not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_globs_folders_and_files(pictures, tmp_path):
    out = tmp_path / "out"

    def names(*sources):
        found = find_pictures(sources, out=out)
        return [path.relative_to(pictures).as_posix() for path in found]

    everything = ["a/one.jpg", "a/two.PNG", "b/deep/One.jpeg", "b/one.jpg"]
    assert names(pictures) == everything
    assert names(f"{pictures}/**/*.jp*g") == ["a/one.jpg", "b/deep/One.jpeg", "b/one.jpg"]
    assert names(f"{pictures}/*/one.jpg") == ["a/one.jpg", "b/one.jpg"]
    assert names(pictures / "b" / "one.jpg", pictures) == ["b/one.jpg", *everything[:3]]
    for suffix in PICTURE_SUFFIXES:  # what convert takes, predict takes
        (pictures / "b" / f"all{suffix}").write_bytes(b"")
    assert len(names(f"{pictures}/b/all*")) == len(PICTURE_SUFFIXES)
    odd = pictures / "a" / "[x].jpg"
    noise().save(odd)
    assert names(str(odd)) == ["a/[x].jpg"]


def test_sources_without_pictures_are_named(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    for source in (tmp_path / "empty", tmp_path / "missing", f"{pictures}/*.gif"):
        with pytest.raises(ValueError, match=r"no picture in|no such") as error:
            find_pictures([pictures, source], out=out)
        assert str(source) in str(error.value)
        assert "\n" not in str(error.value)


def test_results_are_never_mixed_with_pictures(pictures):
    for source in (pictures / "a", pictures, pictures / "a" / "one.jpg"):
        with pytest.raises(ValueError, match="folder of its own"):
            find_pictures([source], out=pictures / "a") if source != pictures else find_pictures(
                [pictures / "a" / "two.PNG"], out=pictures / "a"
            )
    # What an earlier run left below the folder is not predicted again.
    noise().save(pictures / "b" / "earlier.jpg")
    found = find_pictures([pictures], out=pictures / "b")
    assert [path.name for path in found] == ["one.jpg", "two.PNG"]


def test_drawing_names_never_meet(tmp_path):
    stems = ["a", "a-2", "A", "a", "b.tar", "a-2"]
    names = drawing_names([tmp_path / str(i) / f"{stem}.png" for i, stem in enumerate(stems)])
    assert names == ["a.jpg", "a-2.jpg", "A-3.jpg", "a-4.jpg", "b.tar.jpg", "a-2-2.jpg"]


def test_unreadable_pictures_are_named(detector, pictures, tmp_path):
    good = (pictures / "a" / "one.jpg").read_bytes()
    for name, data in (("cut.jpg", good[: len(good) // 2]), ("text.jpg", b"hello"), ("0.jpg", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            predict(detector, [tmp_path / name], tmp_path / "out")
        assert "\n" not in str(error.value)


@pytest.fixture
def damaged(pictures):
    """The tree of `pictures` with four that cannot be read; cut.jpg only shows it when decoded."""
    good = (pictures / "a" / "one.jpg").read_bytes()
    (pictures / "a" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (pictures / "a" / "empty.jpg").write_bytes(b"")
    (pictures / "b" / "text.png").write_text("no picture")
    bomb = b"BM" + bytes(12) + (40).to_bytes(4, "little") + 2 * (60_000).to_bytes(4, "little")
    (pictures / "b" / "vast.bmp").write_bytes(bomb + b"\1\0\x18\0" + bytes(24))
    return pictures


def test_all_bad_headers_are_named_before_the_model_is_loaded(damaged, tmp_path):
    with pytest.raises(ValueError, match="3 pictures cannot be read") as error:
        predict(tmp_path / "no model", [damaged], tmp_path / "out")
    lines = str(error.value).splitlines()
    for name, line in zip(("empty.jpg", "text.png", "vast.bmp"), lines[1:-1], strict=True):
        assert f"{name}: " in line
    assert "--on-error skip" in lines[-1]
    assert not (tmp_path / "out").exists()


def test_a_picture_found_bad_while_decoding_ends_the_run(detector, damaged, tmp_path):
    with pytest.raises(ValueError, match=r"cut\.jpg: .*--on-error skip") as error:
        predict(detector, [damaged / "a" / "cut.jpg"], tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bad_pictures_are_left_out_and_listed(detector, damaged, tmp_path, batch_size):
    done = []
    result = predict(
        detector,
        [damaged],
        tmp_path / "out",
        on_error="skip",
        batch_size=batch_size,
        progress=lambda *counts: done.append(counts),
    )
    assert json.loads((tmp_path / "out" / "predictions.json").read_text()) == result
    skipped = [os.path.basename(item["file"]) for item in result["skipped"]]
    assert skipped == ["cut.jpg", "empty.jpg", "text.png", "vast.bmp"]
    assert all(item["reason"] and "\n" not in item["reason"] for item in result["skipped"])
    assert "limit" in result["skipped"][-1]["reason"]
    assert done[-1] == (5, 5)
    good = ("a/one.jpg", "a/two.PNG", "b/deep/One.jpeg", "b/one.jpg")
    assert [e["file"] for e in result["pictures"]] == [(damaged / g).as_posix() for g in good]
    alone = predict(detector, [damaged / name for name in good], tmp_path / "alone")
    assert alone["skipped"] == []
    assert alone["pictures"] == result["pictures"]  # each with its own answer and drawing


def test_messages_about_bad_pictures_are_bounded(tmp_path):
    problems = {tmp_path / f"{n}\x1b[2J\n.jpg": "it is cut off" for n in range(1000)}
    lines = str(unreadable_error(problems)).splitlines()
    assert len(lines) == MAX_NAMED + 3
    assert lines[0] == "1000 pictures cannot be read:"
    assert lines[-2] == f"  and {1000 - MAX_NAMED} more"
    assert not any("\x1b" in line for line in lines)


def test_wrong_usage_is_one_line(detector, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"--score-threshold 1\.5"):
        predict(detector, [pictures], tmp_path / "out", score_threshold=1.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is a file; give a folder$"):
        predict(detector, [pictures], tmp_path / "file")
    with pytest.raises(OSError, match=r"choose another place: '/proc/x/predictions\.json'"):
        predict(detector, [pictures], "/proc/x")
    with pytest.raises(ValueError, match="--device nonsense"):
        choose_device("nonsense")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("what", ["picture", "predictions.json"])
def test_a_full_disk_names_the_file(what, detector, pictures, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if what == "picture":
        monkeypatch.setattr(Image.Image, "save", full)
    else:
        monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left on device; free some") as caught:
        predict(detector, [pictures / "a" / "one.jpg"], out)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(out / ("one.jpg" if what == "picture" else what))
    assert len(list(out.iterdir())) == (what == "predictions.json")  # the picture


def test_an_impossible_folder_is_found_before_the_work(detector, pictures, monkeypatch):
    monkeypatch.setattr(_Runner, "run", lambda *args, **kwargs: pytest.fail("too late"))
    for out in ("/proc/out", "/proc"):
        with pytest.raises(OSError, match=f"another place: '{out}"):
            predict(detector, [pictures], out)
