"""Classification scores: top-1, top-5 and accuracy per class, counted in int64.

Shapes:
    logits: float [B, C]; label: int64 [B], from 0
    counts: int64 [C, 3], per class: samples, right at rank 1, right within the first k
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def label_rank(logits: Tensor, label: Tensor) -> Tensor:
    """How many classes a sample's scores place before its label; 0 is a top-1 hit.

    Among equal logits the class with the smaller number comes first, as in `argmax`. A sample
    with a NaN among its logits gets rank C, so that a diverged model never counts as right.

    Args:
        logits: float [B, C].
        label: int64 [B].

    Returns:
        int64 [B], in [0, C].
    """
    num_classes = logits.shape[1]
    own = logits.gather(1, label[:, None])
    number = torch.arange(num_classes, device=logits.device)
    before = (logits > own) | ((logits == own) & (number < label[:, None]))
    return torch.where(logits.isnan().any(dim=1), num_classes, before.sum(dim=1))


class TopK:
    """Counts right answers over batches, without waiting for the device in between.

    Several processes each fill one for their own samples, exchange `payload()` and `merge()`.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        """Start empty.

        Args:
            classes: Class names in label order.
        """
        self.classes = tuple(classes)
        # With fewer than five classes "top 5" looks at all of them and is 1 by definition.
        self._k = min(5, len(self.classes))
        self._batches: list[tuple[Tensor, Tensor]] = []  # (rank, label) on the device, int64 [B]
        self._counts = np.zeros((len(self.classes), 3), dtype=np.int64)

    def update(self, logits: Tensor, label: Tensor, weight: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            logits: float [B, C], on any device.
            label: int64 [B], on the same device; may be overwritten after the call.
            weight: float [B]; samples of weight 0 are not counted. None counts all.
        """
        assert logits.shape[1] == len(self.classes), "one logit per class"
        rank = label_rank(logits.detach(), label)
        if weight is not None:
            counted = weight > 0
            rank, label = rank[counted], label[counted]
        self._batches.append((rank, label.clone()))

    def payload(self) -> NDArray[np.int64]:
        """Everything counted so far, int64 [C, 3], to send to another process."""
        if self._batches:
            rank = torch.cat([batch[0] for batch in self._batches]).cpu().numpy()
            label = torch.cat([batch[1] for batch in self._batches]).cpu().numpy()
            self._batches.clear()
            for column, counted in enumerate((rank >= 0, rank < 1, rank < self._k)):
                self._counts[:, column] += np.bincount(label[counted], minlength=len(self.classes))
        return self._counts.copy()

    def merge(self, payloads: Sequence[NDArray[np.int64]]) -> None:
        """Add what others counted.

        Args:
            payloads: Each one the `payload()` of another counter.
        """
        for payload in payloads:
            self._counts += payload

    @property
    def num_samples(self) -> int:
        """Samples counted so far."""
        return int(self.payload()[:, 0].sum())

    def result(self) -> dict[str, Any]:
        """The scores of everything added, ready for JSON.

        Returns:
            {samples, top1, top5, per_class: {NAME: {samples, top1}}}; shares in [0, 1], None
            where there is no sample. A sample whose logits are NaN counts as wrong.
        """
        counts = self.payload()
        samples, right1, right5 = counts.sum(axis=0).tolist()
        return {
            "samples": samples,
            "top1": right1 / samples if samples else None,
            "top5": right5 / samples if samples else None,
            "per_class": {
                name: {"samples": row[0], "top1": row[1] / row[0] if row[0] else None}
                for name, row in zip(self.classes, counts.tolist(), strict=True)
            },
        }
