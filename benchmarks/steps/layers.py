"""Which layers are far from what memory allows: each one alone, forward and backward.

The layers of a classifier of ours are run one by one on inputs of their shapes, as eager mode runs
them, and their times stand beside the time that their bytes take at this device's copy bandwidth
(the rules of roofline.py: they add up to floor C). What a kind of layer would give back at the
floor says where a kernel of our own could pay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np
import roofline
import torch
from torch import Tensor, nn

from steps.systems import Setting, make_classifier

REPEATS = 10
SETS = 3  # of inputs, used in turns: a layer's own may fit into the cache
# Forward and backward; of input and output (convolutions), or of the output (the others).
PASSES = {"convolution": (1, 2), "batch norm": (3, 5), "activation": (2, 3)}


@dataclass
class Layer:
    """A layer of a shape, and how often the model has it.

    Attributes:
        module: To run alone.
        kind: As tables name it.
        rule: Of `PASSES`.
        shape: Of its input without the batch.
        elements: Of one picture, that a pass moves.
        count: Layers of the model that are the same.
    """

    module: nn.Module
    kind: str
    rule: str
    shape: tuple[int, ...]
    elements: int
    count: int = 1


def layers_of(model: nn.Module, *, size: int) -> list[Layer]:
    """The model's convolutions, batch norms and activations; same ones once, with their number."""
    found: dict[str, Layer] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shape = tuple(inputs[0].shape[1:])
        if isinstance(module, nn.Conv2d):
            rule, elements = "convolution", inputs[0].numel() + output.numel()
            kind = conv_kind(module, shape)
        elif isinstance(module, nn.BatchNorm2d):
            rule, elements, kind = "batch norm", output.numel(), "batch norm"
            module = nn.BatchNorm2d(shape[0], module.eps, module.momentum)  # timm's is activated
        elif roofline.is_activation(module):
            rule, elements, kind = "activation", output.numel(), type(module).__name__
            module = type(module)()  # timm's may work in place, on what backward needs
        else:
            return
        layer = found.setdefault(
            f"{module} {shape}", Layer(module, kind, rule, shape, elements, count=0)
        )
        layer.count += 1

    handles = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    return list(found.values())


def conv_kind(conv: nn.Conv2d, shape: tuple[int, ...]) -> str:
    """A convolution's name in tables."""
    side = conv.kernel_size[0]
    if conv.groups > 1:
        return f"depthwise {side}x{side}"
    if side > 1:
        return "first convolution"
    return "pointwise" if shape[-1] > 1 else "pointwise at 1x1 (gates, head)"


def time_layer(
    layer: Layer, setting: Setting, *, batch: int, repeats: int = REPEATS
) -> tuple[float, float]:
    """Return the milliseconds of a layer's forward and of its backward pass, both medians."""
    device, dtype = setting.device, roofline.TORCH_DTYPES[setting.amp]
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    module = layer.module.train().to(device)
    if layer.rule == "convolution":  # batch norms keep float32 weights, as autocast has it
        module = module.to(dtype).to(memory_format=layout)
    sets = []
    for _ in range(SETS if device.type == "cuda" else 1):
        images = torch.randn(batch, *layer.shape, device=device, dtype=dtype)
        images = images.contiguous(memory_format=layout).requires_grad_()
        sets.append((images, module(images)))
    gradient = torch.ones_like(sets[0][1])
    turns = itertools.cycle(sets)

    def backward() -> object:
        images, output = next(turns)
        # Nobody asks for the gradient of pictures.
        wanted = [*module.parameters(), *([images] if layer.shape[0] > 3 else [])]
        return torch.autograd.grad(output, wanted, gradient, retain_graph=True)

    def forward() -> object:
        return module(next(turns)[0])

    both: list[Callable[[], object]] = [forward, backward]
    forward_s, backward_s = (
        float(np.median(roofline.timed_s(run, device, repeats=repeats))) for run in both
    )
    return 1e3 * forward_s, 1e3 * backward_s


def measure_layers(
    setting: Setting, *, variant: str, batch: int, gb_per_s: float, repeats: int = REPEATS
) -> dict[str, Any]:
    """Time every layer of a classifier of ours; sum up by kind."""
    rows = []
    for layer in layers_of(make_classifier("ours", variant), size=224):
        took = time_layer(layer, setting, batch=batch, repeats=repeats)
        layer.module.to("meta")  # its memory goes
        num_bytes = layer.elements * batch * roofline.ELEMENT_BYTES[setting.amp]
        floors = [1e3 * passes * num_bytes / (gb_per_s * 1e9) for passes in PASSES[layer.rule]]
        rows.append(
            {
                "kind": layer.kind,
                "shape": list(layer.shape),
                "count": layer.count,
                "ms": [round(value, 4) for value in took],
                "floor_ms": [round(value, 4) for value in floors],
            }
        )
    return {
        "batch": batch,
        "setting": setting.kind,
        "variant": variant,
        "gb_per_s": gb_per_s,
        "layers": rows,
        "kinds": by_kind(rows),
    }


def by_kind(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums over the model: kind -> forward and backward ms, floors, and what the floor would save.

    The kind with the largest saving comes first.
    """
    sums: dict[str, dict[str, float]] = {}
    for row in rows:
        entry = sums.setdefault(
            row["kind"],
            {"layers": 0, "forward_ms": 0, "backward_ms": 0, "forward_floor": 0, "both_floor": 0},
        )
        count = row["count"]
        entry["layers"] += count
        entry["forward_ms"] += count * row["ms"][0]
        entry["backward_ms"] += count * row["ms"][1]
        entry["forward_floor"] += count * row["floor_ms"][0]
        entry["both_floor"] += count * sum(row["floor_ms"])
    total = sum(entry["forward_ms"] + entry["backward_ms"] for entry in sums.values())
    result = {}
    for kind, entry in sums.items():
        took = entry["forward_ms"] + entry["backward_ms"]
        result[kind] = {
            "layers": entry["layers"],
            "forward_ms": round(entry["forward_ms"], 3),
            "backward_ms": round(entry["backward_ms"], 3),
            "floor_ms": round(entry["both_floor"], 3),
            "share": round(took / total, 4),
            "of_floor_forward": round(entry["forward_floor"] / entry["forward_ms"], 4),
            "of_floor": round(entry["both_floor"] / took, 4),
            "saving_ms": round(took - entry["both_floor"], 3),
        }
    return dict(sorted(result.items(), key=lambda item: -item[1]["saving_ms"]))


def layers_table(part: dict[str, Any]) -> list[str]:
    """Kinds of layers, the largest saving first."""
    head = (
        *("layers", "number", "forward, ms", "backward, ms", "share", "floor, ms"),
        *("of the floor, forward", "both", "at the floor saves, ms"),
    )
    rows = [
        (
            kind,
            str(row["layers"]),
            f"{row['forward_ms']:.2f}",
            f"{row['backward_ms']:.2f}",
            f"{100 * row['share']:.0f} %",
            f"{row['floor_ms']:.2f}",
            f"{100 * row['of_floor_forward']:.0f} %",
            f"{100 * row['of_floor']:.0f} %",
            f"{row['saving_ms']:.2f}",
        )
        for kind, row in part["kinds"].items()
    ]
    return [
        f"Layers of {part['variant'].capitalize()}, {part['setting']}, one by one.",
        "",
        *harness.table(head, rows),
    ]
