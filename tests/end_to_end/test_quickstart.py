"""The quickstart in small: every part of it runs, only the training is too short to learn much."""

import json

import pytest
from PIL import Image

from mbv3dist.data.index import open_split
from mbv3dist.recipe import load_config
from mbv3dist.tools.quickstart import RECIPE, quickstart

SMALL = {"num_train": 40, "num_val": 10, "num_test": 20}
FLAGS = ["--epochs", "1", "--optim.warmup_epochs", "0", "--eval.every_epochs", "1"]
FLAGS += ["--model.input_size", "64", "--num_cpu_threads", "1"]


def test_the_recipe_is_sound():
    config = load_config(RECIPE)
    assert config.task == "detection" and config.name == "quickstart"
    assert config.data.global_batch_size % 4 == 0, "1, 2 and 4 processes"


def test_refusals(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds something that is not a quickstart's"):
        quickstart(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    with pytest.raises(ValueError, match="--processes 3: must divide the batch of 16"):
        quickstart(tmp_path / "new", processes=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_twice_in_a_row(tmp_path, capfd):
    out = tmp_path / "runs" / "quickstart"
    for attempt in range(2):
        summary = quickstart(out, **SMALL, flags=FLAGS)
        printed = capfd.readouterr().out
        assert ("removing the earlier quickstart" in printed) == (attempt == 1)
        assert "Type next:" in printed and "[6/6]" in printed
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["untrained_map_50"] < 0.02
    assert 0 <= summary["map"] <= summary["map_50"] <= 1
    assert 0 < summary["train_seconds"] < summary["total_seconds"]
    assert set(summary["per_class"]) == {"car", "fish", "house", "star", "tree"}
    assert len(summary["pictures"]) >= 8
    for path in [*summary["pictures"], *(out / name for name in ("pictures.png", "metrics.png"))]:
        with Image.open(path) as picture:
            picture.load()
    sizes = {name: len(open_split(out / "data", name)) for name in ("train", "val", "test")}
    assert sizes == {"train": 40, "val": 10, "test": 20}
    answers = json.loads((out / "pictures" / "predictions.json").read_text())
    assert len(answers["pictures"]) == len(summary["pictures"])
    assert {path.name for path in out.iterdir()} == {
        ".quickstart",
        "voc",
        "data",
        "training",
        "pictures",
        "pictures.png",
        "classes.png",
        "metrics.png",
        "summary.json",
    }


@pytest.mark.slow
def test_a_failed_training_is_one_clear_error(tmp_path):
    # The mistake is found by the training, not by the recipe's check.
    flags = [*FLAGS, "--data.train_split", "nothing"]
    with pytest.raises(ValueError, match="the training ended with exit code 1"):
        quickstart(tmp_path / "out", **SMALL, flags=flags)
