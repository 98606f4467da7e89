"""The detection task: what the loop needs to train SSDLite."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mbv3dist.config import TrainConfig
from mbv3dist.data.batch import Batch
from mbv3dist.models.loss import Targets, match_batch, multibox_loss


@dataclass(frozen=True)
class DetectionTask:
    """Targets and loss of a detector.

    Attributes:
        anchors: float32 [A, 4], cxcywh in 0..1.
        size: canvas (height, width) in pixels.
        min_negatives: hard negatives of a picture without objects.
    """

    anchors: Tensor
    size: tuple[int, int]
    min_negatives: int

    metric: ClassVar[str] = "map"

    @classmethod
    def from_config(cls, config: TrainConfig, anchors: Tensor) -> "DetectionTask":
        """The task as the recipe has it."""
        size = (config.model.input_size, config.model.input_size)
        return cls(anchors, size, config.model.min_negatives)

    def targets(self, batch: Batch) -> Targets:
        """Matches anchors with boxes; needs no model, so it runs before the forward pass."""
        assert batch.boxes is not None and batch.labels is not None
        return match_batch(
            self.anchors, batch.boxes, batch.labels, size=self.size, weight=batch.weight
        )

    def normalizer(self, targets: Targets) -> Tensor:
        """What the loss is divided by once summed over all ranks: the number of positives."""
        return targets.num_positives

    def losses(
        self, outputs: tuple[Tensor, Tensor], batch: Batch, targets: Targets
    ) -> dict[str, Tensor]:
        """Sums of the loss parts over this micro-batch, each 0-d."""
        class_logits, box_deltas = outputs
        loss = multibox_loss(
            class_logits.float(),
            box_deltas.float(),
            targets,
            min_negatives=self.min_negatives,
        )
        return {
            "loss_regression": loss.regression_sum,
            "loss_classification": loss.classification_sum,
        }
