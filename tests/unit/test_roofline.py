"""Byte floors: the models' figures, what each rule adds, and shares of a bandwidth."""

import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import roofline

from mbv3dist.models.mobilenetv3 import create_classifier

CPU = torch.device("cpu")
# Of MobileNetV3 at 224 px: GFLOP forward, MB of inference, A, B, C in 16 bits.
PUBLISHED = {
    "large": (0.433, 17.8, 53.5, 124, 162),
    "small": (0.113, 5.9, 17.7, 40.3, 53),
}


@pytest.fixture(scope="module")
def traffic():
    return {
        variant: roofline.count_traffic(create_classifier(variant, num_classes=1000), size=224)
        for variant in PUBLISHED
    }


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_models_floors(traffic, variant):
    flop, *expected = PUBLISHED[variant]
    found = traffic[variant]
    assert found.flop / 1e9 == pytest.approx(flop, rel=2e-3)
    assert found.flop_train == 3 * found.flop
    in_bytes = found.bytes_per_image("bf16")
    names = ("inference", "A", "B", "C")
    assert [in_bytes[name] / 1e6 for name in names] == pytest.approx(expected, rel=4e-3)
    assert found.bytes_per_image("fp16") == in_bytes
    assert found.bytes_per_image("no") == {name: 2 * value for name, value in in_bytes.items()}


def test_other_libraries_models_move_the_same(traffic):
    for other in (
        timm.create_model("mobilenetv3_small_100"),
        torchvision.models.mobilenet_v3_small(),
    ):
        assert roofline.count_traffic(other, size=224) == traffic["small"]


@given(
    channels=st.integers(1, 4),
    width=st.integers(1, 5),
    stride=st.integers(1, 2),
    has_act=st.booleans(),
)
def test_each_rule_by_hand(channels, width, stride, has_act):
    """One convolution of 3x3 with its norm: all elements can be counted on paper."""
    size = 8
    layers = [
        nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.Hardswish() if has_act else nn.Identity(),
        nn.Conv2d(width, channels, 1),
    ]
    found = roofline.count_traffic(nn.Sequential(*layers), size=size)
    positions = (size // stride) ** 2
    first, last = width * positions, channels * positions
    assert found.convolutions == 3 * size**2 + first + first + last
    assert found.batch_norms == first
    assert found.activations == (first if has_act else 0)
    assert found.flop == 2 * positions * (3 * 9 * width + width * channels)
    floors = found.bytes_per_image("bf16")
    assert floors["A"] == 3 * floors["inference"]
    assert floors["B"] - floors["A"] == 16 * first
    assert floors["C"] - floors["B"] == (10 * first if has_act else 0)


def test_counting_leaves_a_model_as_it_was():
    model = create_classifier("small", num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    roofline.count_traffic(model, size=64)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_share_is_of_the_rate_that_the_floor_allows(traffic):
    large = traffic["large"]
    limit = 3350e9 / large.bytes_per_image("bf16")["B"]
    assert limit == pytest.approx(26.9e3, rel=0.01)  # images/s on an H100
    shares = roofline.fractions(limit / 2, large, amp="bf16", gb_per_s=3350, training=True)
    assert shares["B"] == 0.5
    assert shares["A"] < 0.5 < shares["C"]
    inference = roofline.fractions(188e3, large, amp="bf16", gb_per_s=3350, training=False)
    assert inference == {"inference": pytest.approx(1.0, rel=0.01)}
    in_plot = roofline.point(
        large, images_per_s=limit / 2, amp="bf16", gb_per_s=3350, training=True, system="x"
    )
    assert in_plot["fraction"] == 0.5
    assert in_plot["limit_images_per_s"] == pytest.approx(limit, rel=1e-3)
    assert in_plot["system"] == "x"


def test_this_machines_rates():
    found = roofline.measure_device(CPU, amps=("no",), quick=True)
    for kind in ("copy", "triad"):
        rates = found["bandwidth"][kind]
        assert 0.1 < rates["median_gb_s"] <= rates["best_gb_s"] < 2000
    assert found["matmul_tflop_s"]["fp32"] > 1e-4
