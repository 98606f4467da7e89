"""The benchmark of training steps on a GPU: our loss never waits, a whole step is a CUDA graph."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.filterwarnings("default")  # Inductor's own
@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_steps_and_counts(amp, capsys):
    words = ["--quick", "--rounds", "2", "--steps", "2", "--batch", "4", "--amp", amp]
    words += ["--parts", "detectors,counts", "--compile", "--cuda-graphs"]
    assert train_step.main(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    detectors, counts = report["sections"]["detectors"], report["sections"]["counts"]
    assert not detectors["failed"]
    assert "ours graph" in detectors["systems"]
    assert counts["systems"]["ours"]["loss"]["syncs_seen"] == 0
    assert counts["systems"]["ours"]["step"]["syncs_seen"] == 0
    assert counts["systems"]["torchvision"]["step"]["syncs_seen"] > 0
