"""What the hardware allows: bytes that must move, and how fast this device moves them.

MobileNetV3 is bound by memory, not by arithmetic, so what a step can reach is bandwidth over bytes
per picture. Both are found here: bandwidth by copying on the device itself, bytes by running the
model once and adding up the feature maps that its layers read and write.

Of one picture let c be the elements that convolutions and linear layers read and write, n those
that come out of batch norms, a those out of activations that are layers of their own kind (ReLU,
hard-swish, ReLU6, the gates of squeeze-excite). Then, in elements of the precision's size:

- inference, batch norms folded: c. Each layer reads its input once and writes its output once.
- A, training with ideal fusion: 3 c. The forward pass is one c; the gradient of a layer's input
  reads the output's gradient and writes the input's, the gradient of its weights reads the input
  and the output's gradient again: each is a c too. Batch norm and activation cost nothing.
- B, A and batch norms as passes of their own: + 8 n. Forward: one read for the statistics, one
  read and one write to normalise. Backward: two reads for the sums (input and gradient), two
  reads and one write for the gradient.
- C, B and activations as passes of their own, as eager mode has them: + 5 a. A read and a write
  forward; two reads and a write backward.

Weights, gradients of weights and the optimiser (some tens of MB a step, whatever the batch),
the products and sums of squeeze-excite and of shortcuts are left out: it is a floor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ELEMENT_BYTES = {"no": 4, "bf16": 2, "fp16": 2}
DTYPE_NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
TORCH_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOORS = ("A", "B", "C")
JUDGED_BY = "B"  # the floor that a training step's fraction is of
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid)
# timm's own classes of the same functions
ACTIVATION_NAMES = ("HardSwish", "HardSwishMe", "Hardswish", "HardSigmoid", "Hardsigmoid", "ReLU6")
GPU_BUFFER_BYTES = 1 << 30
CPU_BUFFER_BYTES = 1 << 27
HOLD_UP_CYCLES = 20_000_000
REPEATS = 10


@dataclass(frozen=True)
class Traffic:
    """What one picture makes a model move and compute.

    Attributes:
        convolutions: Elements that convolutions and linear layers read and write.
        batch_norms: Elements that come out of batch norms.
        activations: Elements that come out of activations.
        flop: Floating-point operations of a forward pass; a multiplication with its sum is two.
        input_size: Side of the picture in pixels.
    """

    convolutions: int
    batch_norms: int
    activations: int
    flop: int
    input_size: int

    @property
    def flop_train(self) -> int:
        """Of a training step: the gradients of inputs and of weights cost a forward pass each."""
        return 3 * self.flop

    def bytes_per_image(self, amp: str) -> dict[str, int]:
        """Return the floors in bytes, by name, at a precision ("no", "bf16", "fp16")."""
        size = ELEMENT_BYTES[amp]
        ideal = 3 * self.convolutions
        separate = ideal + 8 * self.batch_norms
        return {
            "A": size * ideal,
            "B": size * separate,
            "C": size * (separate + 5 * self.activations),
            "inference": size * self.convolutions,
        }


def count_traffic(model: nn.Module, *, size: int) -> Traffic:
    """Run a model once on one picture and count.

    Args:
        model: A network that takes float [1, 3, size, size], in float32 on a CPU, not compiled.
        size: Side of the picture in pixels.
    """
    counted = {"convolutions": 0, "batch_norms": 0, "activations": 0, "flop": 0}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            counted["convolutions"] += inputs[0].numel() + output.numel()
            positions = output.shape[-2] * output.shape[-1] if output.ndim == 4 else 1
            counted["flop"] += 2 * module.weight.numel() * positions
        elif isinstance(module, nn.BatchNorm2d):
            counted["batch_norms"] += output.numel()
        elif is_activation(module):
            counted["activations"] += output.numel()

    handles = [module.register_forward_hook(note) for module in model.modules()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return Traffic(**counted, input_size=size)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is one of the activations of MobileNetV3, torch's or timm's."""
    return isinstance(module, ACTIVATIONS) or type(module).__name__ in ACTIVATION_NAMES


def fractions(
    images_per_s: float, traffic: Traffic, *, amp: str, gb_per_s: float, training: bool
) -> dict[str, float]:
    """Return which share of each byte floor's rate is reached."""
    found = traffic.bytes_per_image(amp)
    names = FLOORS if training else ("inference",)
    return {name: round(images_per_s * found[name] / (gb_per_s * 1e9), 4) for name in names}


def measure_device(device: torch.device, *, amps: tuple[str, ...], quick: bool) -> dict[str, Any]:
    """Return the bandwidth of copies and of a triad, and the rate of a matrix product."""
    num_bytes = GPU_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
    num_bytes //= 8 if quick else 1
    repeats = 5 if quick else REPEATS
    count = num_bytes // 4
    first, second, third = (
        torch.full((count,), value, dtype=torch.float32, device=device) for value in (1.0, 2.0, 3.0)
    )
    copy = timed_s(lambda: second.copy_(first), device, repeats=repeats)
    triad = timed_s(lambda: torch.add(first, second, alpha=3, out=third), device, repeats=repeats)
    return {
        "bandwidth": {
            "copy": _rates(copy, 2 * num_bytes),
            "triad": _rates(triad, 3 * num_bytes),
            "buffer_bytes": num_bytes,
        },
        "matmul_tflop_s": {
            DTYPE_NAMES[amp]: _matmul_tflop_s(device, amp, quick=quick) for amp in amps
        },
    }


def _rates(seconds: list[float], num_bytes: int) -> dict[str, float]:
    return {
        "best_gb_s": round(num_bytes / min(seconds) / 1e9, 1),
        "median_gb_s": round(num_bytes / float(np.median(seconds)) / 1e9, 1),
    }


def _matmul_tflop_s(device: torch.device, amp: str, *, quick: bool) -> float:
    side = 8192 if device.type == "cuda" and not quick else 512
    # Random: constants draw less power, so that clocks stay higher than they do at work.
    left = torch.randn(side, side, device=device).to(TORCH_DTYPES[amp])
    took = timed_s(lambda: left @ left, device, repeats=5)
    return round(2 * side**3 / min(took) / 1e12, 3)


def timed_s(action: Callable[[], object], device: torch.device, *, repeats: int) -> list[float]:
    """Return the seconds of each of some calls; on a GPU between events, read at the end.

    There the device is held up first, so that all calls are queued before the first begins: short
    ones would else be timed by how fast Python sends them.
    """
    for _ in range(3):
        action()
    if device.type != "cuda":
        found = []
        for _ in range(repeats):
            started = time.perf_counter()
            action()
            found.append(time.perf_counter() - started)
        return found
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    hold_up()
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def hold_up() -> None:
    """Keep the GPU busy for some ten milliseconds (twice that at a low clock)."""
    torch.cuda._sleep(HOLD_UP_CYCLES)


def floor_entry(traffic: Traffic) -> dict[str, Any]:
    """A model's floors, for the report."""
    return {
        "input_size": traffic.input_size,
        "flop_forward": traffic.flop,
        "flop_train": traffic.flop_train,
        "elements": {
            "convolutions": traffic.convolutions,
            "batch_norms": traffic.batch_norms,
            "activations": traffic.activations,
        },
        "bytes": {DTYPE_NAMES[amp]: traffic.bytes_per_image(amp) for amp in ("no", "bf16", "fp16")},
    }


def point(
    traffic: Traffic,
    *,
    images_per_s: float,
    amp: str,
    gb_per_s: float,
    training: bool,
    **words: Any,
) -> dict[str, Any]:
    """One system in the roofline's plot; `words` say which."""
    num_bytes = traffic.bytes_per_image(amp)[JUDGED_BY if training else "inference"]
    limit = gb_per_s * 1e9 / num_bytes
    return {
        **words,
        "what": "training" if training else "inference",
        "dtype": DTYPE_NAMES[amp],
        "images_per_s": round(images_per_s, 1),
        "bytes_per_image": num_bytes,
        "flop_per_image": traffic.flop_train if training else traffic.flop,
        "limit_images_per_s": round(limit, 1),
        "fraction": round(images_per_s / limit, 4),
    }
