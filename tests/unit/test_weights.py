"""Weights of torchvision and timm load, give the same outputs, and go back unchanged."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from mbv3dist.models.mobilenetv3 import create_classifier
from mbv3dist.models.ssdlite import SSDLite
from mbv3dist.models.weights import (
    load_backbone_weights,
    load_state,
    read_state,
    to_torchvision,
    torchvision_keys,
    transfer,
)


def randomize(model: torch.nn.Module, *, seed: int = 1) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return model


def assert_equal_states(mine: dict, theirs: dict) -> None:
    assert list(mine) == list(theirs) or set(mine) == set(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("variant", ["small", "large"])
@pytest.mark.parametrize("reduced_tail", [False, True])
def test_torchvision_classifier(variant: str, reduced_tail: bool, tmp_path: Path) -> None:
    build = getattr(torchvision.models, f"mobilenet_v3_{variant}")
    theirs = randomize(build(num_classes=6, reduced_tail=reduced_tail)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")

    ours = create_classifier(variant, num_classes=6, reduced_tail=reduced_tail)
    load_state(ours, read_state(tmp_path / "theirs.pth"), source="theirs.pth")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.eval().forward_features(images), theirs.features(images))
    # The head is a 1x1 convolution here and a linear layer there: another order of sums.
    expected = theirs(images)
    assert (ours(images) - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert_equal_states(to_torchvision(ours), theirs.state_dict())


def test_torchvision_detector_goes_in_and_out_unchanged(tmp_path: Path) -> None:
    theirs = randomize(
        ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    )
    # torchvision's training script saves the weights under "model", beside other things.
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "checkpoint.pth")
    ours = SSDLite("large", num_classes=3)
    load_state(ours, read_state(tmp_path / "checkpoint.pth"), source="checkpoint")
    assert_equal_states(to_torchvision(ours), theirs.state_dict())
    assert len(set(torchvision_keys(ours).values())) == len(ours.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm_classifier(suffix: str, tmp_path: Path) -> None:
    theirs = randomize(timm.create_model("mobilenetv3_small_100", num_classes=6)).eval()
    path = tmp_path / f"theirs.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(theirs.state_dict(), path)
    ours = create_classifier("small", num_classes=6, bn_eps=1e-5).eval()
    assert load_backbone_weights(ours, path) == []
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("library", ["torchvision", "timm", "detector", "torchvision detector"])
def test_backbone_of_a_detector(library: str, tmp_path: Path) -> None:
    full = "detector" not in library
    classifier = randomize(create_classifier("large", num_classes=9, reduced_tail=not full))
    if library == "timm":
        state = classifier.state_dict()
    elif library == "torchvision":
        state = to_torchvision(classifier)
    else:
        source = SSDLite("large", num_classes=7, input_size=64)
        transfer(source, classifier.state_dict())
        state = source.state_dict() if library == "detector" else to_torchvision(source)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "weights.safetensors")

    model = SSDLite("large", num_classes=2, input_size=64, reduced_tail=not full)
    heads_before = {k: v.clone() for k, v in model.state_dict().items() if "heads" in k}
    left = load_backbone_weights(model, tmp_path / "weights.safetensors")
    assert {name.split(".")[0] for name in left} == {"extras", "class_heads", "box_heads"}
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name])
    for name, value in heads_before.items():
        assert torch.equal(value, model.state_dict()[name])


def test_classifier_with_other_classes(tmp_path: Path) -> None:
    source = randomize(create_classifier("small", num_classes=9))
    torch.save(to_torchvision(source), tmp_path / "nine.pth")
    model = create_classifier("small", num_classes=4)
    left = load_backbone_weights(model, tmp_path / "nine.pth")
    assert left == ["classifier.weight", "classifier.bias"]
    assert torch.equal(model.conv_head.weight, source.conv_head.weight)


def test_transfer_to_other_classes_remakes_the_last_layers_only() -> None:
    source = randomize(SSDLite("small", num_classes=5, input_size=64))
    model = SSDLite("small", num_classes=3, input_size=96)
    remade = transfer(model, source.state_dict())
    assert remade == [
        f"class_heads.{k}.1.{entry}" for k in range(6) for entry in ("weight", "bias")
    ]
    for name, value in model.state_dict().items():
        assert name in remade or torch.equal(value, source.state_dict()[name])
    assert transfer(SSDLite("small", num_classes=5, input_size=64), source.state_dict()) == []


def test_transfer_between_tasks() -> None:
    classifier = randomize(create_classifier("small", num_classes=5, reduced_tail=True))
    detector = SSDLite("small", num_classes=3, input_size=64)
    remade = transfer(detector, classifier.state_dict())
    assert {name.split(".")[0] for name in remade} == {"extras", "class_heads", "box_heads"}
    assert torch.equal(detector.backbone.conv_stem.weight, classifier.conv_stem.weight)
    back = create_classifier("small", num_classes=2, reduced_tail=True)
    remade = transfer(back, detector.state_dict())
    assert {name.split(".")[0] for name in remade} == {"conv_head", "classifier"}
    assert torch.equal(back.blocks[4][0].conv_dw.weight, classifier.blocks[4][0].conv_dw.weight)


def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path) -> None:
    model = create_classifier("small", num_classes=2)
    state = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pth")
    assert list(read_state(tmp_path / "wrapped.pth")) == list(model.state_dict())


class Payload:
    """Something that only a full unpickling would load."""


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"state_dict": Payload()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    names = ["absent.pth", *(path.name for path in tmp_path.iterdir())]
    assert len(names) == 7
    for name in names:
        with pytest.raises(ValueError, match=name) as caught:
            read_state(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model = create_classifier("small", num_classes=3)
    good = model.state_dict()
    lacking = {k: v for k, v in good.items() if not k.startswith("blocks.2")}
    with pytest.raises(ValueError, match=r"missing entries: blocks\.2\.0\.conv_pw\.weight.* more"):
        load_state(model, lacking, source="file")
    with pytest.raises(ValueError, match="unexpected entries: stranger"):
        load_state(model, {**good, "stranger": torch.zeros(1)}, source="file")
    with pytest.raises(ValueError, match=r"conv_stem\.weight \(16, 3, 5, 5\) instead of"):
        load_state(model, {**good, "conv_stem.weight": torch.zeros(16, 3, 5, 5)}, source="file")
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        load_state(create_classifier("small", num_classes=4), good, source="file")
    with pytest.raises(ValueError, match="no MobileNetV3 known"):
        load_state(model, {"fc.weight": torch.zeros(1)}, source="file")
    torch.save(create_classifier("large", num_classes=3).state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match=r"large\.pth: weights do not fit"):
        load_backbone_weights(
            SSDLite("small", num_classes=3, input_size=64), tmp_path / "large.pth"
        )


def test_old_checkpoints_without_batch_counters_load() -> None:
    model = create_classifier("small", num_classes=3)
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    load_state(create_classifier("small", num_classes=3), state, source="old")
