"""The damaged samples of a whole run: what all ranks met, agreed on and listed in damaged.tsv."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mbv3dist.data.drawing import ErrorBudget
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import Split
from mbv3dist.training.processes import AgreedError


class DamageLedger:
    """Brings the ranks' damaged samples together, so that the budget is that of the run.

    A rank stops at once when it alone exceeds the budget. The ranks' sum is looked at before
    anything is saved, so no checkpoint and no model ever comes of a run that lost more.
    """

    def __init__(self, budget: ErrorBudget, split: Split, run_dir: Path, *, group: Any = None):
        """Say where the list goes.

        Args:
            budget: of this rank's loader.
            split: what is read.
            run_dir: folder of the run.
            group: process group of CPU collectives; None for a single process.
        """
        self._budget = budget
        self._split = split
        self._path = run_dir / "damaged.tsv"
        self._group = group
        self._said = set(budget.damaged)  # before the run was resumed

    def agree(self) -> list[str]:
        """Merges what all ranks met; returns what is new, on every rank.

        Every rank must call this at the same step. Costs nothing without a budget.

        Raises:
            AgreedError: on every rank, if all ranks together exceed the budget.
        """
        if self._budget.limit == 0:
            return []
        damaged = dict(self._budget.damaged)  # threads go on adding to it
        if self._group is not None:
            count = torch.tensor([len(damaged)])
            dist.all_reduce(count, op=dist.ReduceOp.MAX, group=self._group)
            if count.item() > 0:
                parts: list[Any] = [None] * dist.get_world_size()
                dist.all_gather_object(parts, damaged, group=self._group)
                damaged = {index: text for part in parts for index, text in part.items()}
                self._budget.merge(damaged)
        new = [text for index, text in damaged.items() if index not in self._said]
        self._said |= damaged.keys()
        if new and (self._group is None or dist.get_rank() == 0):
            lines = [f"{self._split.key(i)}\t{text}\n" for i, text in sorted(damaged.items())]
            self._path.write_text("".join(lines), encoding="utf-8")
        try:
            self._budget.check(damaged)  # the same on every rank
        except DamagedShardError as error:
            raise AgreedError(str(error)) from None
        return new
