"""A killed run that is resumed ends with the same bits as one that was never interrupted."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import kill_when, run_mbv3dist


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest()


def records(run: Path) -> list[dict]:
    """What stands in metrics.jsonl, without the figures that depend on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(x).items() if k != "images_per_s" and "_wait" not in k}
        for x in lines
    ]


def check_killed_equals_uninterrupted(recipe: Path, out: Path, *, processes: int) -> None:
    whole = run_mbv3dist("train", recipe, "--out", out, "--name", "whole", processes=processes)
    assert whole.returncode == 0, whole.stderr
    words = ["train", recipe, "--out", out, "--name", "killed", "--resume", "auto"]
    # Step 3 of the run lies in the middle of an epoch.
    killed = out / "killed"
    kill_when(words, killed / "checkpoints" / "step-00000003", processes=processes)
    assert not (killed / "last").exists()
    again = run_mbv3dist(*words, processes=processes)
    assert again.returncode == 0, again.stderr
    assert weights_hash(killed) == weights_hash(out / "whole")
    assert records(killed) == records(out / "whole")
    steps = [r["step"] for r in records(killed) if r["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2, 3])
def test_detector(detection_recipe, tmp_path, processes):
    check_killed_equals_uninterrupted(detection_recipe, tmp_path / "runs", processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2, 3])
def test_classifier(classification_recipe, tmp_path, processes):
    check_killed_equals_uninterrupted(classification_recipe, tmp_path / "runs", processes=processes)
