"""The benchmark of post-process: its outputs are what it says, its quick form answers."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import nms
import nms_outputs

from mbv3dist.ops.nms import postprocess

CPU = torch.device("cpu")


@pytest.mark.parametrize("columns", nms.COLUMNS)
def test_dense_is_dense_and_sparse_is_sparse(columns):
    shares = {}
    for kind in nms.KINDS:
        scores, _ = nms_outputs.make_outputs(kind, 2, columns, CPU).scores_and_boxes()
        shares[kind] = (scores[..., 1:] > 0.001).float().mean().item()
    assert shares["dense"] > 0.95
    assert shares["sparse"] < 0.03


@pytest.mark.parametrize("kind", nms.KINDS)
def test_the_peer_with_one_call_finds_as_many(kind):
    """Between thousands of classes it rounds otherwise, so a box may differ, hardly two."""
    outputs = nms_outputs.make_outputs(kind, 2, 21, CPU)
    raw = (outputs.logits, outputs.deltas, outputs.anchors)
    found = nms_outputs.one_call(outputs)
    ours = postprocess(*raw, size=nms_outputs.SIZE, **nms_outputs.OPTIONS)
    assert found.count.tolist() == ours.count.tolist()
    assert (found.labels == ours.labels).float().mean() > 0.98


def test_the_quick_form_answers(tmp_path, capsys):
    report, text = tmp_path / "report.json", tmp_path / "report.md"
    words = ["--quick", "--rounds", "1", "--devices", "cpu", "--batch", "1"]
    assert nms.main([*words, "--json", str(report), "--markdown", str(text)]) == 0
    saved = json.loads(report.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == saved
    assert [(c["columns"], c["kind"]) for c in saved["cases"]] == [
        (columns, kind) for columns in nms.COLUMNS for kind in nms.KINDS
    ]
    for case in saved["cases"]:
        assert case["pictures_that_differ"] == 0
        assert case["detections_per_picture"] > 20
        assert min(row["median"] for row in case["ms"].values()) > 0
        assert case["ours_is"]["torchvision"]["ratio"] > 1
    assert text.read_text().count("| cpu, 1 pictures") == 4


def test_wrong_words_are_one_line(capsys):
    assert nms.main(["--devices", "tpu"]) == 2
    assert capsys.readouterr().err.startswith("nms: --devices tpu: there is none here")
