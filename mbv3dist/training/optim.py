"""Optimiser with parameter groups, and the learning rate as a function of epochs done.

The schedule has no state: the rate of a step follows from its position in the run, so that a
resumed run, on any number of ranks, continues on the same curve.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mbv3dist.config import OptimConfig

GROUP_RATES = {"base": "base_lr", "extras": "extras_lr", "heads": "heads_lr"}


def build_optimizer(
    groups: dict[str, list[nn.Parameter]], config: OptimConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Makes the optimiser; freezes the groups whose learning rate is 0.

    Args:
        groups: parameters by part of the model, from `models.parameter_groups`.
        config: names, rates, decay.
        fused: use torch's fused kernels where the optimiser has them.

    Returns:
        An optimiser whose groups carry `name` and `peak_lr`.

    Raises:
        ValueError: every group is frozen.
    """
    entries = []
    for name, parameters in groups.items():
        rate = getattr(config, GROUP_RATES[name])
        rate = config.lr if rate is None else rate
        if rate == 0:
            for parameter in parameters:
                parameter.requires_grad_(False)
            continue
        for suffix, members in _split_by_decay(parameters, config).items():
            if members:
                decay = config.weight_decay if suffix == "" else 0.0
                entries.append(
                    {
                        "params": members,
                        "name": name + suffix,
                        "peak_lr": rate,
                        "lr": rate,
                        "weight_decay": decay,
                    }
                )
    if not entries:
        raise ValueError(
            "every learning rate is 0, nothing would train; set --optim.base_lr, --optim.heads_lr"
        )
    if config.name == "sgd":
        return torch.optim.SGD(
            entries, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused
        )
    if config.name == "adam":
        return torch.optim.Adam(entries, lr=config.lr, fused=fused)
    if config.name == "adamw":
        return torch.optim.AdamW(entries, lr=config.lr, fused=fused)
    from timm.optim import RMSpropTF

    optimizer: torch.optim.Optimizer = RMSpropTF(
        entries, lr=config.lr, alpha=0.9, eps=1e-3, momentum=config.momentum
    )
    return optimizer


def _split_by_decay(
    parameters: Iterable[nn.Parameter], config: OptimConfig
) -> dict[str, list[nn.Parameter]]:
    """Norm weights and biases are vectors; they go without decay unless asked for."""
    split: dict[str, list[nn.Parameter]] = {"": [], "_no_decay": []}
    for parameter in parameters:
        is_vector = parameter.ndim <= 1 and not config.decay_norm_and_bias
        split["_no_decay" if is_vector else ""].append(parameter)
    return split


def lr_factor(epoch: float, config: OptimConfig, *, epochs: int) -> float:
    """Learning rate at `epoch` epochs done, as a share of the peak.

    Args:
        epoch: samples seen / samples of the split, with fractions.
        config: kind of schedule.
        epochs: length of the run.
    """
    if epoch < config.warmup_epochs:
        return max(epoch / config.warmup_epochs, 1e-3)
    if config.schedule == "cosine":
        span = max(epochs - config.warmup_epochs, 1e-9)
        share = min((epoch - config.warmup_epochs) / span, 1.0)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * share)) / 2
    if config.schedule == "multistep":
        return float(config.gamma ** sum(epoch >= milestone for milestone in config.milestones))
    if config.schedule == "step":
        return float(config.gamma ** math.floor(epoch / config.step_epochs))
    if config.schedule == "exponential":
        return float(config.gamma ** (epoch / config.step_epochs))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's rate to its peak times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def train_mode(model: nn.Module, *, freeze_bn: bool = False) -> None:
    """Training mode, but BatchNorm of frozen groups, or all of it, keeps its statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            weight = module.weight
            if freeze_bn or (weight is not None and not weight.requires_grad):
                module.eval()
