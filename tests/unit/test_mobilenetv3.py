"""MobileNetV3: equal to timm's, with the taps, tails and widths that the detectors need."""

import pytest
import timm
import torch
from timm.models.mobilenetv3 import MobileNetV3

from mbv3dist.models import mobilenetv3
from mbv3dist.models.mobilenetv3 import Backbone, create_classifier


def randomize(model: torch.nn.Module) -> None:
    """Give every entry, running statistics too, a value that an error would show in."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("variant", ["small", "large"])
@pytest.mark.parametrize("training", [False, True])
def test_equals_timm(variant: str, training: bool) -> None:
    theirs = timm.create_model(f"mobilenetv3_{variant}_100", num_classes=7, bn_eps=1e-3)
    randomize(theirs)
    ours = create_classifier(variant, num_classes=7, dropout=0.0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        ours.train(training)(images), theirs.train(training)(images), rtol=0, atol=0
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    ("variant", "width", "name"),
    [("small", 0.5, "mobilenetv3_small_050"), ("small", 0.75, "mobilenetv3_small_075")],
)
def test_width_is_timms(variant: str, width: float, name: str) -> None:
    theirs = timm.create_model(name).state_dict()
    ours = create_classifier(variant, num_classes=1000, width=width).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_batch_norm_and_dropout_settings() -> None:
    model = create_classifier("small", num_classes=3, dropout=0.3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    assert model.drop_rate == 0.3
    norms = [m for m in Backbone("small").modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


@pytest.mark.parametrize(
    ("variant", "reduced", "channels", "features"),
    [
        ("small", False, (288, 576), 1024),
        ("small", True, (288, 288), 512),
        ("large", False, (672, 960), 1280),
        ("large", True, (672, 480), 640),
    ],
)
def test_tails(variant: str, reduced: bool, channels: tuple[int, int], features: int) -> None:
    classifier = create_classifier(variant, num_classes=3, reduced_tail=reduced)
    assert (classifier.num_features, classifier.head_hidden_size) == (channels[1], features)
    backbone = Backbone(variant, reduced_tail=reduced).eval()
    c4, c5 = backbone(torch.randn(1, 3, 96, 64))
    assert backbone.out_channels == channels
    assert c4.shape == (1, channels[0], 6, 4)
    assert c5.shape == (1, channels[1], 3, 2)


@pytest.mark.parametrize(("variant", "tapped"), [("small", "4.0"), ("large", "5.0")])
def test_backbone_taps_the_expansion_of_the_right_bottleneck(variant: str, tapped: str) -> None:
    classifier = create_classifier(variant, num_classes=3).eval()
    randomize(classifier)
    seen = {}
    classifier.get_submodule(f"blocks.{tapped}.bn1").register_forward_hook(
        lambda module, args, output: seen.update(c4=output.clone())
    )
    images = torch.randn(2, 3, 64, 64)
    features = classifier.forward_features(images)
    stages = [len(stage) for stage in classifier.blocks[: int(tapped[0])]]
    assert sum(stages) == {"small": 8, "large": 12}[variant]  # bottlenecks before the tapped one

    backbone = Backbone(variant).eval()
    backbone.load_state_dict(
        {k: v for k, v in classifier.state_dict().items() if k in backbone.state_dict()}
    )
    c4, c5 = backbone(images)
    torch.testing.assert_close(c4, seen["c4"], rtol=0, atol=0)
    torch.testing.assert_close(c5, features, rtol=0, atol=0)


def test_pretrained_goes_through_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    weights = create_classifier("small", num_classes=1000, bn_eps=1e-5)
    randomize(weights)

    def create_model(name: str, *, pretrained: bool) -> MobileNetV3:
        asked.append((name, pretrained))
        return weights

    monkeypatch.setattr(mobilenetv3.timm, "create_model", create_model)
    model = create_classifier("small", num_classes=5, pretrained=True)
    assert asked == [("mobilenetv3_small_100", True)]
    assert model.bn1.eps == 1e-5  # the eps those weights were trained with
    assert model.classifier.weight.shape == (5, 1024)
    for name, value in model.state_dict().items():
        if not name.startswith("classifier."):
            torch.testing.assert_close(value, weights.state_dict()[name], rtol=0, atol=0)


def test_pretrained_without_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, *, pretrained: bool) -> MobileNetV3:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(mobilenetv3.timm, "create_model", create_model)
    with pytest.raises(ValueError, match="mobilenetv3_large_100 could not be fetched") as caught:
        create_classifier("large", num_classes=5, pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "medium"}, "'medium' is unknown"),
        ({"width": 0}, "width"),
        ({"num_classes": 0}, "at least 1"),
        ({"pretrained": True, "reduced_tail": True}, "no ImageNet weights"),
        ({"pretrained": True, "width": 1.5}, "no ImageNet weights"),
    ],
)
def test_wrong_usage(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_classifier(**{"variant": "large", "num_classes": 3, **arguments})
