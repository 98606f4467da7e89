"""The 300 px variant, widths, tails, and the recipes that train them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models._efficientnet_builder import round_channels
from torchvision.models.detection import ssdlite as torchvision_ssdlite

from mbv3dist.data.draws import COLOR, Draws
from mbv3dist.data.views import draw_color
from mbv3dist.models.anchors import AnchorConfig, make_anchors, recipe_anchors
from mbv3dist.models.directory import load_model, new_spec, save_model
from mbv3dist.models.ssdlite import SSDLite, feature_sizes, module_groups, parameter_groups
from mbv3dist.ops.boxes import BOX_WEIGHTS, decode_boxes
from mbv3dist.recipe import load_config
from mbv3dist.training.build import build_model
from mbv3dist.training.optim import build_optimizer, lr_factor, train_mode

CONFIGS = Path(__file__).parents[2] / "configs"
VOC = sorted(CONFIGS.glob("voc0712_*.yaml"))
SEEDS = sorted(CONFIGS.glob("voc0712_*_300.yaml"))
PRIORS = (  # cells, pixels between centres, smallest and largest side in pixels
    (19, 16, 60, 105),
    (10, 32, 105, 150),
    (5, 64, 150, 195),
    (3, 100, 195, 240),
    (2, 150, 240, 285),
    (1, 300, 285, 330),
)


def documented_priors() -> torch.Tensor:
    """The documented specification in Python's doubles: float32 [3000, 4], cxcywh, clamped."""
    rows = []
    for cells, step, smallest, largest in PRIORS:
        scale = 300 / step
        for i in range(cells):
            for j in range(cells):
                x, y = (j + 0.5) / scale, (i + 0.5) / scale
                side = smallest / 300
                rows.append((x, y, side, side))
                between = math.sqrt(largest * smallest) / 300
                rows.append((x, y, between, between))
                for ratio in (2, 3):
                    root = math.sqrt(ratio)
                    rows.append((x, y, side * root, side / root))
                    rows.append((x, y, side / root, side * root))
    return torch.tensor(rows, dtype=torch.float32).clamp(0, 1)


@pytest.mark.parametrize("path", SEEDS, ids=lambda path: path.stem)
def test_300_px_priors_are_the_documented_ones(path):
    model = load_config(path).model
    config = recipe_anchors(model)
    assert feature_sizes((300, 300)) == [(prior[0],) * 2 for prior in PRIORS]
    anchors = make_anchors(config, feature_sizes((300, 300)), size=(300, 300))
    expected = documented_priors()
    assert anchors.shape == (3000, 4)
    # The same real numbers, rounded to float32 in another place: at most the last bit differs.
    assert (anchors - expected).abs().max() <= 2.0**-24
    assert (anchors == expected).float().mean() > 0.99
    assert (anchors.amin(), anchors.amax()) == (expected.amin(), 1.0)
    # Variances 0.1 and 0.2 are these weights: centre = delta * 0.1 * side, side = exp(0.2 * delta).
    assert BOX_WEIGHTS == (1 / 0.1, 1 / 0.1, 1 / 0.2, 1 / 0.2)
    prior = torch.tensor([[50.0, 50.0, 110.0, 90.0]])
    moved = decode_boxes(torch.tensor([[1.0, -2.0, 0.5, 1.0]]), prior)[0]
    width, height = 60 * math.exp(0.2 * 0.5), 40 * math.exp(0.2)
    x, y = 80 + 0.1 * 60, 70 - 0.2 * 40
    expected_box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    assert moved.tolist() == pytest.approx(expected_box, rel=1e-6)
    thresholds = (model.score_threshold, model.nms_threshold, model.topk_candidates)
    assert thresholds == (0.01, 0.45, 200)


def test_the_300_px_model_is_saved_with_its_priors(tmp_path):
    anchors = recipe_anchors(load_config(SEEDS[0]).model)
    spec = new_spec("ssdlite_mobilenetv3_small", ("a", "b"), input_size=300, anchors=anchors)
    model = SSDLite("small", num_classes=2, input_size=300, anchor_config=anchors)
    save_model(model, spec, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.spec.anchors == anchors
    assert torch.equal(loaded.model.anchors, model.anchors)
    # Another number of priors than the maps have cells for is refused.
    with pytest.raises(ValueError, match=r"6 positive numbers"):
        AnchorConfig(steps=(16.0, 32.0))


@pytest.mark.parametrize("path", VOC, ids=lambda path: path.stem)
def test_recipes_make_the_model_they_name(path):
    config = load_config(path, ["--model.pretrained", "false"])
    spec, model = build_model(config, tuple("abcdefghijklmnopqrst"))
    size = config.model.input_size
    model.eval()
    with torch.no_grad():
        logits, deltas = model(torch.zeros(1, 3, size, size))
    count = {300: 3000, 320: 3234}[size]
    assert logits.shape == (1, count, 21)
    assert deltas.shape == (1, count, 4)
    assert not spec.reduced_tail  # ImageNet weights have the full tail
    head = path.read_text().partition("epochs:")[0]
    for word in ("Data:", "Run:", "Hardware:", "Score:", "not run here", path.stem):
        assert word in head
    view = config.data.view
    changes = [draw_color(view, Draws(0, epoch=0, sample=n, purpose=COLOR)) for n in range(500)]
    brightness, contrast, saturation, hue, _, order = zip(*changes, strict=True)
    # +-32 levels at middle gray; hue +-18 degrees; contrast and saturation 0.5 to 1.5.
    assert 31 < (max(brightness) - 1) * 127.5 <= 32
    assert max(hue) * 360 == pytest.approx(18, abs=0.5)
    for factors in (contrast, saturation):
        assert 0.5 <= min(factors) < 0.52 < 1.48 < max(factors) <= 1.5
    assert set(order) == set(range(6))


def test_groups_freezing_and_steps_of_the_recipes():
    config = load_config(CONFIGS / "voc0712_ssdlite_large_300.yaml")
    model = SSDLite("large", num_classes=2, input_size=64, width=0.5)
    optimizer = build_optimizer(parameter_groups(model), config.optim)
    rates = {group["name"].partition("_")[0]: group["peak_lr"] for group in optimizer.param_groups}
    assert rates == {"base": 0.001, "extras": 0.01, "heads": 0.01}
    factors = [lr_factor(epoch, config.optim, epochs=120) for epoch in (0, 79.9, 80, 99.9, 100)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = load_config(CONFIGS / "voc0712_ssdlite_small_300.yaml").optim
    assert lr_factor(100, cosine, epochs=200) == pytest.approx(0.5)

    def trained(**rates: float) -> set[str]:
        model = SSDLite("small", num_classes=2, input_size=64, width=0.5)
        build_optimizer(parameter_groups(model), replace(config.optim, **rates))
        train_mode(model)
        for name, modules in module_groups(model).items():
            for module in modules:
                is_frozen = not next(module.parameters()).requires_grad
                norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
                assert all(norm.training != is_frozen for norm in norms), name
        return {
            name
            for name, parameters in parameter_groups(model).items()
            if any(parameter.requires_grad for parameter in parameters)
        }

    assert trained(base_lr=0.0) == {"extras", "heads"}
    assert trained(base_lr=0.0, extras_lr=0.0) == {"heads"}


@pytest.mark.parametrize("size", [300, 320])
@pytest.mark.parametrize("variant", ["small", "large"])
@pytest.mark.parametrize("reduced_tail", [True, False])
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_every_width_and_tail_on_both_sizes(size, variant, reduced_tail, width):
    config = recipe_anchors(load_config(SEEDS[0]).model) if size == 300 else None
    model = SSDLite(
        variant,
        num_classes=3,
        input_size=size,
        width=width,
        reduced_tail=reduced_tail,
        anchor_config=config,
    ).eval()
    with torch.no_grad():
        logits, deltas = model(torch.zeros(1, 3, size, size))
    assert logits.shape == (1, 3000 if size == 300 else 3234, 4)
    assert deltas.shape == (*logits.shape[:2], 4)
    if width == 1.0:
        # Other widths are timm's, which has weights for them; torchvision rounds elsewhere.
        build = getattr(torchvision.models, f"mobilenet_v3_{variant}")
        theirs = build(reduced_tail=reduced_tail).features
        c4 = theirs[{"small": 9, "large": 13}[variant]].block[0][0].out_channels
        assert model.backbone.out_channels == (c4, theirs[-1][0].out_channels)
        numbers = [sum(p.numel() for p in part.parameters()) for part in (model.backbone, theirs)]
        assert numbers[0] == numbers[1]
    else:
        full = timm.create_model(f"mobilenetv3_{variant}_100").num_features
        expected = round_channels(full // (2 if reduced_tail else 1), width)
        assert model.backbone.out_channels[1] == expected


@pytest.mark.parametrize("reduced_tail", [True, False])
def test_parameters_are_torchvisions(monkeypatch, reduced_tail):
    real = torchvision.models.mobilenet_v3_large

    def backbone(**arguments):
        return real(**{**arguments, "reduced_tail": reduced_tail})

    monkeypatch.setattr(torchvision_ssdlite, "mobilenet_v3_large", backbone)
    theirs = torchvision_ssdlite.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=21
    )
    for size in (300, 320):  # the canvas changes no weight
        ours = SSDLite("large", num_classes=20, reduced_tail=reduced_tail, input_size=size)
        numbers = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
        assert numbers[0] == numbers[1]
