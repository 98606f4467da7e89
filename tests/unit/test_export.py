"""`mbv3dist export`: what is written, what is refused, and that no half file is left."""

import errno
import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch
from lively import classifier_graph, detector, detector_graph, lively_model, save_lively

from mbv3dist.cli import main
from mbv3dist.inference import export, fold, onnx_file
from mbv3dist.inference.check import (
    UNMATCHED_TOLERANCE,
    Agreement,
    check_export,
    compare_detections,
    drawn_canvases,
    reference_detections,
    reference_outputs,
)
from mbv3dist.inference.export import export_model, export_onnx
from mbv3dist.inference.formats import EXPORT_FORMATS
from mbv3dist.models.directory import Thresholds, spec_from_json
from mbv3dist.models.onnx_model import load_any_model, load_onnx
from mbv3dist.ops.nms import Detections


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Model directory of the detector."""
    return save_lively(detector(), tmp_path_factory.mktemp("model") / "detector")


@pytest.fixture
def fast(monkeypatch):
    """The detector's graph without tracing it anew."""
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: detector_graph())


def fails(capfd, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, words)])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


def test_the_command_writes_onnx_and_says_what_it_is(model, tmp_path, capsys):
    out = tmp_path / "new" / "model.onnx"
    main(["export", str(model), str(out)])
    text = capsys.readouterr().out
    for words in ("uint8: RGB, 0 to 255", "output boxes: x1, y1, x2, y2", "without a counterpart"):
        assert words in text
    assert [path.name for path in out.parent.iterdir()] == ["model.onnx"]
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert load_onnx(out).spec == detector().spec


def test_json_gives_the_facts(model, tmp_path, capsys, fast):
    out = tmp_path / "model.onnx"
    main(["export", str(model), str(out), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == out.stat().st_size
    assert result["outputs"] == ["boxes", "scores", "labels", "count"]
    assert result["int8"] is None
    check = result["check"]
    assert check["detections"] > 1000
    assert check["unmatched"] <= 0.001 * check["detections"]
    assert check["boxes_px"] < 1e-3 and check["scores"] < 1e-5 and check["class_logits"] < 1e-2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("raw", [False, True])
def test_torch_export_is_loaded_and_run_with_any_batch(raw, tmp_path):
    loaded = lively_model("ssdlite_mobilenetv3_small", slim=True)
    out = tmp_path / "model.pt2"
    result = export_model(loaded, out, raw=raw)
    extra = {"model.json": ""}
    module = torch.export.load(out, extra_files=extra).module()
    assert spec_from_json(extra["model.json"]) == loaded.spec
    for batch in (1, 7):
        canvas = drawn_canvases(loaded.spec, batch, seed=batch)
        expected = reference_outputs(loaded, canvas)
        found = dict(zip(result["outputs"], module(canvas), strict=True))
        if raw:
            assert torch.allclose(found["class_logits"], expected["class_logits"], atol=1e-3)
            assert torch.allclose(found["box_deltas"], expected["box_deltas"], atol=1e-3)
            assert torch.equal(found["anchors"], loaded.model.anchors)
        else:
            agreement = compare_detections(
                Detections(**found), reference_detections(loaded, *expected.values())
            )
            assert agreement.detections > 100 * batch
            assert agreement.unmatched <= 0.002 * agreement.detections


def test_rounding_of_peaky_scores_is_no_difference(tmp_path, monkeypatch):
    """As in a real detector of many layers, the file's network rounds otherwise than the model."""

    class Rounded(fold.DeployedNetwork):
        def __init__(self, loaded):
            super().__init__(loaded)
            torch.manual_seed(0)
            for weight in self.parameters():
                weight.data *= 1 + 3e-5 * torch.randn_like(weight)

    loaded = lively_model("ssdlite_mobilenetv3_small", slim=True)
    for head in loaded.model.class_heads:
        head[1].weight.data *= 32
        head[1].bias.data *= 32
    rounded, canvas = Rounded(loaded), drawn_canvases(loaded.spec, 3, seed=1)
    found, expected = rounded(canvas), reference_outputs(loaded, canvas).values()
    ends = compare_detections(
        reference_detections(loaded, *found), reference_detections(loaded, *expected)
    )
    assert ends.unmatched > UNMATCHED_TOLERANCE * ends.detections  # comparing them would refuse it
    monkeypatch.setattr(export, "DeployedNetwork", Rounded)
    check = export_model(loaded, tmp_path / "model.pt2")["check"]
    assert 0 < check["class_logits"] < 0.1 and check["unmatched"] == 0


@pytest.mark.parametrize("wrong", ["network", "postprocess"])
def test_a_pt2_file_that_is_not_the_model_is_not_written(wrong):
    program = export._Answers(detector(), raw=False)
    if wrong == "network":
        program.network.model.class_heads[0][1].bias.data += 0.1
    else:
        program._spec = replace(program._spec, thresholds=Thresholds(nms=0.9))
    words = {"network": "its class_logits differ", "postprocess": "have no counterpart"}[wrong]
    run = export._runner(program, ["boxes", "scores", "labels", "count"])
    with pytest.raises(ValueError, match=f"^m.pt2: not written: .*{words}.*versions of torch$"):
        check_export(run, detector(), source="m.pt2", libraries="torch")


def test_weights_go_out_under_the_names_of_torchvision(tmp_path):
    loaded = lively_model("mobilenetv3_small", size=64, width=1.0)
    result = export_model(loaded, tmp_path / "weights.pth", format="torchvision")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert "features.0.0.weight" in state
    assert result["lines"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.bin"], "its ending does not tell the format"),
        (["model.pt2", "--format", "onnx"], "end in .onnx"),
        (["model.onnx", "--format", "torchvision"], "end in .pth or .pt or .safetensors"),
        (["model.pth", "--format", "torchvision", "--raw"], "--raw: torchvision files hold"),
        (["model.pt2", "--int8", "DATA"], "only onnx files are quantised"),
        (["model.onnx", "--split", "val"], "--split val is the split of --int8"),
        (["model.onnx", "--int8", "DATA", "--num-pictures", "0"], "--num-pictures"),
        (["model.onnx", "--int8", "/nowhere"], "/nowhere"),
    ],
)
def test_flags_that_mean_nothing_are_one_line(words, message, model, tmp_path, capfd, fast):
    error = fails(capfd, model, tmp_path / words[0], *words[1:])
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_by_the_parser(model, tmp_path, capfd):
    error = fails(capfd, model, tmp_path / "m.tflite", "--format", "tflite")
    assert all(name in error for name in EXPORT_FORMATS)


def test_raw_is_for_detectors(tmp_path, capfd):
    folder = save_lively(lively_model("mobilenetv3_small", size=32), tmp_path / "classifier")
    assert "--raw is for detectors" in fails(capfd, folder, tmp_path / "c.onnx", "--raw")
    assert not (tmp_path / "c.onnx").exists()


def test_an_existing_file_is_replaced_only_when_asked(model, tmp_path, capfd, fast):
    out = tmp_path / "model.onnx"
    out.write_text("dear to somebody")
    assert "--overwrite" in fails(capfd, model, out)
    assert out.read_text() == "dear to somebody"
    main(["export", str(model), str(out), "--overwrite"])
    assert load_onnx(out).spec.task == "detection"
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    assert "exists" in fails(capfd, model, folder, "--overwrite")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_the_extra(package, model, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails from now on
    error = fails(capfd, model, tmp_path / "model.onnx")
    assert f"needs {package}," in error and "mbv3dist[onnx]" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_or_the_old_file(call, tmp_path, monkeypatch, fast):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "model.onnx"
    for before in (None, "old"):
        if before is not None:
            out.write_text(before)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match=r"No space left.*it takes .* MB.*model\.onnx'$"):
                export_onnx(detector(), out)
        assert [p.name for p in tmp_path.iterdir()] == ([] if before is None else ["model.onnx"])
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("format", "name"), [("torchvision", "w.pth"), ("timm", "w.safetensors"), (None, "w.onnx")]
)
def test_a_full_disk_is_one_line_that_names_the_file(format, name, tmp_path, capfd, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = save_lively(lively_model("mobilenetv3_small", size=64, width=1.0), tmp_path / "model")
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: classifier_graph())
    monkeypatch.setattr(export, "check_export", lambda *args, **kwargs: {})
    monkeypatch.setattr(os, "fsync", full)
    words = ["--format", format] if format else []
    error = fails(capfd, folder, tmp_path / name, *words)
    start = f"mbv3dist: error: {tmp_path / name}: No space left on device; free some (it takes "
    assert error.startswith(start) and error.endswith(" MB) or choose another place\n")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "place", ["/proc/m.onnx", "/proc/new/m.pt2", "FILE/m.onnx", "FILE/new/m.pt2"]
)
def test_an_impossible_place_is_found_before_the_work(place, model, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(export, "load_model", lambda path: pytest.fail("too late"))
    (tmp_path / "file").write_text("dear to somebody")
    place = place.replace("FILE", str(tmp_path / "file"))
    error = fails(capfd, model, place)
    assert error.startswith(f"mbv3dist: error: {place}: ") and "another place" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--split", "nope"], "no split 'nope'.* train"), (["--int8", "/nowhere"], "/nowhere")],
)
def test_what_cannot_be_quantised_on_is_found_before_the_work(
    words, message, model, detection_data, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: pytest.fail("too late"))
    error = fails(capfd, model, tmp_path / "m.onnx", "--int8", detection_data, *words)
    assert re.search(message, error)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_model_is_not_written(tmp_path, fast):
    other = lively_model("ssdlite_mobilenetv3_small", seed=1)
    with pytest.raises(ValueError, match="not written: its class_logits differ"):
        export_onnx(other, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_fewer_than_one_picture_is_refused_from_python_too(tmp_path):
    with pytest.raises(ValueError, match="at least 1 picture"):
        export_model(detector(), tmp_path / "m.onnx", int8="DATA", num_pictures=0)


def test_a_wrong_postprocess_is_not_written(tmp_path, monkeypatch):
    wrong = type(detector_graph())()
    wrong.CopyFrom(detector_graph())
    (nms,) = (node for node in wrong.graph.node if node.op_type == "NonMaxSuppression")
    nms.input[3] = nms.input[4]  # the score threshold in the place of the IoU's
    monkeypatch.setattr(onnx_file, "make_onnx", lambda loaded, raw: wrong)
    with pytest.raises(ValueError, match="have no counterpart"):
        export_onnx(detector(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_finite_is_refused(tmp_path, fast):
    loaded = lively_model("ssdlite_mobilenetv3_small")
    next(loaded.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="no finite numbers"):
        export_onnx(loaded, tmp_path / "model.onnx")


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_any_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match=r"text\.onnx: onnxruntime cannot read it"):
        load_any_model(tmp_path / "text.onnx")
    other = type(detector_graph())()
    other.CopyFrom(detector_graph())
    del other.metadata_props[:]
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    with pytest.raises(ValueError, match="mbv3dist did not write it"):
        load_any_model(tmp_path / "other.onnx")


def test_counterparts_are_found_and_missed():
    def found(boxes, scores, labels):
        return Detections(
            torch.tensor([boxes]), torch.tensor([scores]), torch.tensor([labels]), torch.tensor([2])
        )

    boxes = [[0.0, 0.0, 5.0, 5.0], [1.0, 1.0, 9.0, 9.0]]
    first = found(boxes, [0.9, 0.5], [0, 1])
    swapped = found(boxes[::-1], [0.50005, 0.9], [1, 0])
    agreement = compare_detections(first, swapped)
    assert (agreement.detections, agreement.unmatched, agreement.boxes_px) == (4, 0, 0.0)
    assert agreement.scores == pytest.approx(5e-5, rel=1e-2)
    assert compare_detections(first, found(boxes, [0.9, 0.5], [0, 0])).unmatched == 2
    assert compare_detections(first, found(boxes, [0.9, 0.6], [0, 1])).unmatched == 2
    assert compare_detections(first, first) == Agreement(4, 0, 0.0, 0.0)
