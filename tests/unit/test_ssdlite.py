"""SSDLite: bit-equal to torchvision's with its weights; free sizes, widths and classes."""

from unittest import mock

import pytest
import torch
import torchvision
from torchvision.models.detection import ssdlite as torchvision_ssdlite

from mbv3dist.models import mobilenetv3
from mbv3dist.models.anchors import AnchorConfig
from mbv3dist.models.mobilenetv3 import create_classifier
from mbv3dist.models.ssdlite import SSDLite, feature_sizes, module_groups, parameter_groups
from mbv3dist.models.weights import load_state


def torchvision_detector(num_classes: int, *, reduced_tail: bool) -> torch.nn.Module:
    """Torchvision's detector with random weights; num_classes without background."""

    def backbone(**arguments: object) -> torch.nn.Module:
        arguments["reduced_tail"] = reduced_tail
        return torchvision.models.mobilenet_v3_large(**arguments)

    with mock.patch.object(torchvision_ssdlite, "mobilenet_v3_large", backbone):
        return torchvision_ssdlite.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=num_classes + 1
        )


@pytest.mark.parametrize("reduced_tail", [True, False])
def test_raw_outputs_equal_torchvisions(reduced_tail: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision_detector(20, reduced_tail=reduced_tail)
    ours = SSDLite("large", num_classes=20, reduced_tail=reduced_tail)
    load_state(ours, theirs.state_dict(), source="torchvision")
    images = torch.randn(2, 3, 320, 320)
    for training in (True, False):  # training first, so that running statistics are compared too
        theirs.train(training)
        class_logits, box_deltas = ours.train(training)(images)
        expected = theirs.head(list(theirs.backbone(images).values()))
        torch.testing.assert_close(class_logits, expected["cls_logits"], rtol=0, atol=0)
        torch.testing.assert_close(box_deltas, expected["bbox_regression"], rtol=0, atol=0)


def test_parameters_of_the_published_model() -> None:
    model = SSDLite("large", num_classes=90)
    assert sum(p.numel() for p in model.parameters()) == 3_440_060
    assert model.anchors.shape == (3234, 4)
    assert "anchors" not in model.state_dict()


def test_initial_weights_of_extras_and_heads_are_torchvisions() -> None:
    torch.manual_seed(0)
    model = SSDLite("small", num_classes=3)
    parts = (model.extras, model.class_heads, model.box_heads)
    layers = [layer for part in parts for layer in part.modules()]
    convolutions = [layer for layer in layers if isinstance(layer, torch.nn.Conv2d)]
    weights = torch.cat([m.weight.flatten() for m in convolutions])
    assert weights.std().item() == pytest.approx(0.03, rel=0.01)
    assert all(m.bias is None or m.bias.abs().max() == 0 for m in convolutions)


@pytest.mark.parametrize(
    ("size", "maps"),
    [(320, (20, 10, 5, 3, 2, 1)), (300, (19, 10, 5, 3, 2, 1)), (96, (6, 3, 2, 1, 1, 1))],
)
def test_map_sizes_follow_the_input(size: int, maps: tuple[int, ...]) -> None:
    assert [rows for rows, _ in feature_sizes((size, size))] == list(maps)
    model = SSDLite("small", num_classes=4, input_size=size).eval()
    class_logits, box_deltas = model(torch.randn(2, 3, size, size))
    num_anchors = 6 * sum(side * side for side in maps)
    assert class_logits.shape == (2, num_anchors, 5)
    assert box_deltas.shape == model.anchors[None].expand(2, -1, -1).shape


def test_every_map_size_is_what_the_layers_give() -> None:
    model = SSDLite("small", num_classes=2, input_size=101, width=0.35).eval()
    features = list(model.backbone(torch.randn(1, 3, 101, 101)))
    for block in model.extras:
        features.append(block(features[-1]))
    assert [tuple(f.shape[2:]) for f in features] == feature_sizes((101, 101))


def test_width_scales_the_extras() -> None:
    model = SSDLite("small", num_classes=2, input_size=64, width=0.5)
    assert [block[-1][0].out_channels for block in model.extras] == [256, 128, 128, 64]


def test_anchors_of_another_configuration() -> None:
    config = AnchorConfig(ratios=(2.0,))
    model = SSDLite("small", num_classes=2, input_size=64, anchor_config=config).eval()
    class_logits, _ = model(torch.randn(1, 3, 64, 64))
    assert (
        class_logits.shape[1]
        == len(model.anchors)
        == 4 * sum(a * b for a, b in [(4, 4), (2, 2)]) + 16
    )
    with pytest.raises(ValueError, match=r"anchors\.scales"):
        SSDLite("small", num_classes=2, anchor_config=AnchorConfig(scales=(0.1, 0.5)))


def test_groups_hold_every_parameter_once() -> None:
    detector = SSDLite("small", num_classes=2, input_size=64)
    classifier = create_classifier("small", num_classes=2)
    for model, names in ((detector, ["base", "extras", "heads"]), (classifier, ["base", "heads"])):
        groups = parameter_groups(model)
        assert list(groups) == names == list(module_groups(model))
        together = [id(p) for parameters in groups.values() for p in parameters]
        assert sorted(together) == sorted(id(p) for p in model.parameters())
    heads = {id(p) for p in parameter_groups(classifier)["heads"]}
    assert id(classifier.conv_head.weight) in heads
    assert id(classifier.classifier.weight) in heads


def test_memory_format_does_not_change_the_order_of_outputs() -> None:
    model = SSDLite("small", num_classes=2, input_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    got = model(images.to(memory_format=torch.channels_last))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_pretrained_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = create_classifier("small", num_classes=1000)
    monkeypatch.setattr(mobilenetv3.timm, "create_model", lambda name, pretrained: weights)
    model = SSDLite("small", num_classes=2, input_size=64, reduced_tail=False, pretrained=True)
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, weights.state_dict()[name], rtol=0, atol=0)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
    with pytest.raises(ValueError, match="reduced tail"):
        SSDLite("small", num_classes=2, reduced_tail=True, pretrained=True)


def test_exports_with_a_dynamic_batch() -> None:
    model = SSDLite("small", num_classes=2, input_size=64).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes={"images": {0: batch}}
    )
    images = torch.randn(5, 3, 64, 64)
    for mine, theirs in zip(program.module()(images), model(images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_too_small_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        SSDLite("small", num_classes=2, input_size=16)
