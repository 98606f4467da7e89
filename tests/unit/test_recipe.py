"""The strict reading of recipes and flags."""

from pathlib import Path

import pytest

from mbv3dist.config import TrainConfig
from mbv3dist.recipe import config_help, config_to_dict, load_config

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("data: {path: somewhere, view: {name: ssd}}\noptim: {lr: 1e-3}\nepochs: 3\n")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_under_its_own_name(path):
    assert load_config(path).name == path.stem


def test_yaml_then_flags(recipe):
    config = load_config(recipe, ["--optim.lr=2e-4", "--name", "007", "--eval.batch_size", "5"])
    assert config.optim.lr == 2e-4
    assert config.name == "007"  # a string keeps its letters
    assert config.eval.batch_size == 5
    assert config.epochs == 3


def test_lists_none_and_booleans(recipe):
    flags = ["--model.anchor_scales", "0.1", "0.2", "--data.lanes", "null", "--compile", "true"]
    config = load_config(recipe, [*flags, "--mixed_precision", "no"])
    assert config.model.anchor_scales == (0.1, 0.2)
    assert config.data.lanes is None
    assert config.compile is True
    assert config.mixed_precision == "no"  # YAML reads a bare `no` as false


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--optim.lrr", "3"], ["optim.lrr", "did you mean optim.lr"]),
        (["--optim.lr", "fast"], ["optim.lr", "fast", "float"]),
        (["--epochs", "1.5"], ["epochs", "1.5", "int"]),
        (["--epochs"], ["--epochs", "missing"]),
        (["epochs"], ["epochs", "flag"]),
        (["--optim.name", "sdg"], ["optim.name", "sgd|adam"]),
        (["--data.view.name", "random_crop"], ["data.view.name", "ssd"]),
        (["--epochs", "0"], ["epochs", "at least 1"]),
        (["--optim.warmup_epochs", "3"], ["warmup_epochs", "below", "--optim.warmup_epochs 0"]),
        (["--data.view", "3"], ["data.view", "section"]),
        (["--compile", "1"], ["compile", "bool"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(recipe, flags, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config(recipe, flags)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("- 1\n", "mapping"),
        ("a: [1\n", "valid"),
        ("epochs: 1\nepochs: 2\n", "twice"),
        ("data: !!python/object/apply:os.system ['true']\n", "valid"),
        ("epoch: 3\n", "did you mean epochs"),
    ],
)
def test_a_broken_recipe_is_refused(tmp_path, text, word):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=word):
        load_config(path)


def test_written_configuration_reads_back(recipe, tmp_path):
    import yaml

    config = load_config(recipe, ["--optim.milestones", "1", "2"])
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    assert load_config(path) == config


def test_help_lists_every_key():
    text = config_help()
    for key in ("--optim.base_lr", "--data.view.padding", "--epochs", "--tracking.wandb"):
        assert key in text
    assert len(TrainConfig.__dataclass_fields__) > 10
