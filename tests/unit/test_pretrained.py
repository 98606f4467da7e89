"""`pretrained`: through timm's and torchvision's download code, on files that the test writes."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from mbv3dist.models.directory import create_model, new_spec
from mbv3dist.models.mobilenetv3 import create_classifier, pretrained_library
from mbv3dist.models.weights_torchvision import rename_classifier
from mbv3dist.recipe import load_config
from mbv3dist.training.build import build_model


def randomized(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's folder of downloaded files; what is in it is not downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("variant", ["small", "large"])
def test_torchvisions_weights(variant: str, torch_home: Path, detection_recipe: Path) -> None:
    theirs = randomized(getattr(torchvision.models, f"mobilenet_v3_{variant}")())
    weights = torchvision.models.get_model_weights(f"mobilenet_v3_{variant}").DEFAULT
    torch.save(theirs.state_dict(), torch_home / weights.url.rpartition("/")[2])

    ours = create_model(f"mobilenetv3_{variant}", ["a"] * 1000, pretrained="torchvision").eval()
    assert ours.bn1.eps == 1e-3
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        assert (ours(images) - expected).abs().max() <= 2e-6 * expected.abs().max()
        detector = create_model(
            f"ssdlite_mobilenetv3_{variant}", ["a", "b"], input_size=64, pretrained="torchvision"
        ).eval()
        assert torch.equal(detector.backbone(images)[1], theirs.features(images))
        recipe = load_config(
            str(detection_recipe),
            [
                *("--model.architecture", f"ssdlite_mobilenetv3_{variant}", "--model.width", "1"),
                *("--model.pretrained", "true", "--model.pretrained_from", "torchvision"),
            ],
        )
        spec, model = build_model(recipe, ("blue", "green", "red"))
        assert (spec.bn_eps, spec.preprocess.mean) == (1e-3, (0.485, 0.456, 0.406))
        assert torch.equal(model.eval().backbone(images)[1], theirs.features(images))
    # Another number of classes: the last layer alone is new.
    state = create_classifier(variant, num_classes=3, pretrained="torchvision").state_dict()
    loaded = rename_classifier(ours, theirs.state_dict())
    for name, value in state.items():
        assert name.startswith("classifier.") or torch.equal(value, loaded[name])


def test_timms_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant, name = "small", "mobilenetv3_small_100"
    theirs = randomized(timm.create_model(name))
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    asked = []

    def hf_hub_download(repo_id: str, filename: str, **options: object) -> str:
        asked.append((repo_id, filename))
        return str(path)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", hf_hub_download)
    ours = create_model(f"mobilenetv3_{variant}", ["a"] * 1000, pretrained=True).eval()
    assert [repo.rpartition("/")[2].partition(".")[0] for repo, _ in asked] == [name]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
        detector = create_model(
            f"ssdlite_mobilenetv3_{variant}", ["a"], input_size=64, pretrained="timm"
        ).eval()
        assert torch.equal(detector.backbone(images)[1], theirs.forward_features(images))


def test_the_description_follows_the_weights() -> None:
    timms = new_spec("ssdlite_mobilenetv3_large", ["a"], pretrained="timm")
    assert timms == new_spec("ssdlite_mobilenetv3_large", ["a"], pretrained=True)
    theirs = new_spec("ssdlite_mobilenetv3_large", ["a"], pretrained="torchvision")
    assert (timms.bn_eps, theirs.bn_eps) == (1e-5, 1e-3)
    assert theirs.preprocess.mean == (0.485, 0.456, 0.406)
    assert theirs.reduced_tail is False


def test_wrong_usage_is_one_line(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pretrained_library(value) for value in (True, False, "", "torchvision")] == [
        "timm",
        "",
        "",
        "torchvision",
    ]
    for options, message in (
        ({"pretrained": "keras"}, "'keras' is unknown; give one of timm, torchvision"),
        ({"pretrained": "torchvision", "width": 0.5}, "torchvision has no.*large at width 1.0"),
        ({"pretrained": "torchvision", "reduced_tail": True}, "reduced tail"),
    ):
        with pytest.raises(ValueError, match=message):
            create_classifier("small", num_classes=2, **options)

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="mobilenet_v3_small could not be fetched") as caught:
        create_classifier("small", num_classes=2, pretrained="torchvision")
    assert "\n" not in str(caught.value)
    assert "no route to host" in str(caught.value)


def test_a_damaged_download_is_one_line(torch_home: Path) -> None:
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    (torch_home / weights.url.rpartition("/")[2]).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        create_classifier("small", num_classes=2, pretrained="torchvision")
    assert "\n" not in str(caught.value)
