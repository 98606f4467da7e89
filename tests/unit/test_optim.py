"""Parameter groups and schedules."""

import itertools

import pytest
import torch
from torch import nn

from mbv3dist.config import OptimConfig
from mbv3dist.training.optim import build_optimizer, lr_factor, set_lr, train_mode


def groups() -> tuple[nn.Module, dict[str, list[nn.Parameter]]]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    parts = {"base": [*model[0].parameters(), *model[1].parameters()]}
    return model, {**parts, "heads": list(model[2].parameters())}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsproptf"])
def test_each_group_has_its_rate_and_vectors_have_no_decay(name):
    config = OptimConfig(name=name, lr=0.1, base_lr=0.01, weight_decay=1e-3)
    model, parts = groups()
    optimizer = build_optimizer(parts, config)
    set_lr(optimizer, 0.5)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rates == {
        "base": (0.005, 1e-3),
        "base_no_decay": (0.005, 0.0),
        "heads": (0.05, 1e-3),
        "heads_no_decay": (0.05, 0.0),
    }
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(moved) >= 5  # the convolution's bias before a BatchNorm has no gradient


def test_a_skipped_first_step_leaves_momentum_clean_without_fusion():
    """fp16's scaler skips a step that overflowed; torch's fused SGD then keeps garbage."""
    _, parts = groups()
    optimizer = build_optimizer(parts, OptimConfig(lr=0.1), fused=False)
    assert not any(group["fused"] for group in optimizer.param_groups)
    fused = build_optimizer(groups()[1], OptimConfig(lr=0.1))
    assert all(group["fused"] for group in fused.param_groups)


def test_freeze_bn_keeps_statistics_only():
    model, _ = groups()
    train_mode(model, freeze_bn=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model[1].weight.grad is not None


def test_rate_zero_freezes_weights_and_statistics():
    model, parts = groups()
    optimizer = build_optimizer(parts, OptimConfig(base_lr=0.0))
    train_mode(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"2.weight", "2.bias"}


def test_everything_frozen_is_refused():
    with pytest.raises(ValueError, match="base_lr"):
        build_optimizer(groups()[1], OptimConfig(base_lr=0.0, heads_lr=0.0))


def test_cosine_with_warmup():
    config = OptimConfig(warmup_epochs=2.0, min_lr_ratio=0.1)
    values = [lr_factor(e / 4, config, epochs=10) for e in range(41)]
    assert values[4] == pytest.approx(0.5)
    assert max(values) == values[8] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(values[8:]))


def test_multistep_step_and_exponential():
    multi = OptimConfig(schedule="multistep", milestones=(2.0, 4.0), gamma=0.1)
    assert [lr_factor(e, multi, epochs=5) for e in (0, 1.99, 2, 4)] == pytest.approx(
        [1, 1, 0.1, 0.01]
    )
    step = OptimConfig(schedule="step", step_epochs=5.0, gamma=0.92)
    assert lr_factor(199, step, epochs=200) == pytest.approx(0.92**39)
    exponential = OptimConfig(schedule="exponential", step_epochs=2.0, gamma=0.5)
    assert lr_factor(1, exponential, epochs=9) == pytest.approx(0.5**0.5)
    assert lr_factor(1, OptimConfig(schedule="constant"), epochs=9) == 1.0
