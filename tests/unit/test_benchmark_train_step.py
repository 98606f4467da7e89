"""The benchmark of training steps: what it counts, and its quick form."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import train_step  # noqa: E402
from train_step_systems import Clock, Setting, count_ops, draw_boxes  # noqa: E402


def test_operations_that_wait_are_named():
    x = torch.arange(6.0)

    def waits():
        (x > 2).any().item()
        x[x > 2]
        x.clone()[x > 2] = x[:3]
        torch.nonzero(x)

    found = count_ops(waits)["waiting_ops"]
    assert sum(found.values()) == 4, found
    assert any("index.Tensor with a mask" in name for name in found)
    assert any("index_put" in name for name in found)

    def never_waits():
        x[torch.tensor([1, 2])]
        x.masked_fill(x > 2, 0.0)
        torch.where(x > 2, x, 0.0).sum()

    quiet = count_ops(never_waits)
    assert quiet["waits"] == 0
    assert quiet["ops"] >= 5


def test_boxes_lie_on_the_canvas_and_some_pictures_have_none():
    boxes, labels = draw_boxes(64, 320, 20)
    real = labels >= 0
    assert not real.any(1).all()
    assert boxes[real].min() >= 0 and boxes[real].max() <= 320
    assert (boxes[real][:, 2:] > boxes[real][:, :2]).all()
    assert (boxes[~real] == 0).all()


def test_stages_add_up():
    clock = Clock(torch.device("cpu"))
    for name in ("forward", "loss", "forward"):
        clock(name)
    stages = clock.stages()
    assert list(stages) == ["forward", "loss"]
    assert all(took >= 0 for took in stages.values())


def test_titles_say_what_was_measured():
    setting = Setting(torch.device("cpu"), channels_last=True, compile=True)
    assert train_step.settings_of(train_step.parse(["--compile"]))[-1] == setting
    with pytest.raises(ValueError, match="needs a GPU"):
        train_step.parse(["--cuda-graphs", "--device", "cpu"])
    with pytest.raises(ValueError, match="choose of detectors"):
        train_step.parse(["--parts", "all"])


def test_quick_run_compares_systems_that_do_the_same_work(capsys, tmp_path):
    words = ["--quick", "--rounds", "1", "--parts", "detectors,counts", "--channels-last"]
    words += ["--device", "cpu", "--markdown", str(tmp_path / "out.md")]
    assert train_step.main(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    detectors, counts = report["sections"]["detectors"], report["sections"]["counts"]
    assert list(detectors["systems"]) == ["ours channels_last", "torchvision channels_last"]
    ours, theirs = detectors["first_losses"].values()
    assert ours == pytest.approx(theirs, rel=1e-4)
    for row in detectors["systems"].values():
        assert list(row["ms"]) == ["input", "forward", "loss", "backward", "optimizer"]
    for what in ("loss", "step"):
        ours, theirs = (counts["systems"][name][what] for name in ("ours", "torchvision"))
        assert ours["waits"] == 0 < theirs["waits"]
        assert ours["ops"] < theirs["ops"]
    assert "| ours, channels_last |" in (tmp_path / "out.md").read_text()
