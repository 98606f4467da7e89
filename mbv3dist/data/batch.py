"""The batch: what the loader hands to training and evaluation.

Shapes: B samples of this rank, canvas H x W, M boxes of the fullest picture in the batch (at
least 1), pictures without normalisation in uint8 until they are on the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mbv3dist.data.packed import Compressed, PackedCrops
from mbv3dist.data.target import Target


@dataclass
class Batch:
    """B samples. Classification has `label`, detection has `boxes`, `labels` and `difficult`.

    The pictures lie in a buffer of the loader, which is used again: a batch on the CPU is valid
    until the next one is asked for. Clone what has to live longer, or move it with `to`.
    """

    image: Tensor
    """uint8 [B, 3, H, W], RGB canvas pixels in channels_last memory order; [B, 3, 0, 0] as long as
    the device has not made them of `crops` or `compressed`."""
    index: Tensor
    """int64 [B], pack index."""
    epoch: Tensor
    """int64 [B], the epoch the sample is read in."""
    weight: Tensor
    """float32 [B], 1, or 0 for samples beyond the run's end."""
    size: Tensor
    """int32 [B, 2], height and width of the original picture."""
    view: Tensor
    """float32 [B, 8], source xyxy and canvas xyxy (views.vector_to_source maps boxes back)."""
    color: Tensor
    """float32 [B, 6], brightness, contrast and saturation factor, hue shift in turns, 1 where
    contrast comes last, number of the channels' order (see views.draw_color)."""
    label: Tensor | None = None
    """int64 [B], class."""
    boxes: Tensor | None = None
    """float32 [B, M, 4], canvas xyxy pixels; padding is 0."""
    labels: Tensor | None = None
    """int64 [B, M], class of each box; padding is -1."""
    difficult: Tensor | None = None
    """bool [B, M]."""
    crops: PackedCrops | None = field(default=None, repr=False, compare=False)
    """With `decode="hybrid"`: what the pictures are made of."""
    compressed: Compressed | None = field(default=None, repr=False, compare=False)
    """With `decode="gpu"`: what the pictures are made of."""
    targets: list[Target] = field(default_factory=list, repr=False, compare=False)
    """Evaluation only: what the data set says about each picture, in its own pixels."""
    fences: list[torch.cuda.Event] = field(default_factory=list, repr=False, compare=False)
    """Copies to a GPU that are under way; the loader waits for them before it reuses the buffer."""

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Return the batch on `device`; on a GPU the copies run beside the host's work.

        Pictures that the device is to make are not made by this: see training/to_device.py.
        """
        device = torch.device(device)
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._tensors().items()
        }
        if device.type == "cuda" and not self.image.is_cuda:
            fence = torch.cuda.Event()
            fence.record(torch.cuda.current_stream(device))
            self.fences.append(fence)
        # On the same device tensors are shared, so a later copy still has to be waited for.
        return Batch(**moved, targets=self.targets, fences=self.fences)

    def split(self, parts: int) -> list[Batch]:
        """Return `parts` micro-batches of B / parts neighbouring samples, without copying.

        Raises:
            ValueError: When B does not divide by `parts`.
        """
        if parts < 1 or len(self) % parts:
            raise ValueError(
                f"a batch of {len(self)} does not divide by {parts} accumulation steps; "
                "set --optim.accumulation_steps"
            )
        size = len(self) // parts
        tensors: dict[str, Any] = dict(self._tensors())
        return [
            Batch(
                **{name: value[at : at + size] for name, value in tensors.items()},
                fences=self.fences,
            )
            for at in range(0, len(self), size)
        ]

    def _tensors(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
