"""The classification task: what the loop needs to train MobileNetV3."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mbv3dist.config import TrainConfig
from mbv3dist.data.batch import Batch


@dataclass(frozen=True)
class ClassificationTask:
    """Targets and loss of a classifier."""

    label_smoothing: float

    metric: ClassVar[str] = "top1"

    @classmethod
    def from_config(cls, config: TrainConfig) -> "ClassificationTask":
        """The task as the recipe has it."""
        return cls(config.optim.label_smoothing)

    def targets(self, batch: Batch) -> Tensor:
        """The samples' weights, float32 [B]: 0 for those beyond the end of the run."""
        return batch.weight

    def normalizer(self, targets: Tensor) -> Tensor:
        """What the loss is divided by once summed over all ranks: the total weight."""
        return targets.sum()

    def losses(self, outputs: Tensor, batch: Batch, targets: Tensor) -> dict[str, Tensor]:
        """Sum of the cross-entropy over this micro-batch, 0-d."""
        assert batch.label is not None
        loss = F.cross_entropy(
            outputs.float(), batch.label, reduction="none", label_smoothing=self.label_smoothing
        )
        return {"loss_cross_entropy": torch.sum(loss * targets)}
