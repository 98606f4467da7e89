"""What a training step does, counted: dispatched operations, and waits of the host for a device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that make the host wait for a device, by name; indexing only with a mask of booleans.
WAITING = (
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "equal",
    "masked_select",
    "unique",
    "bincount",
    "repeat_interleave.Tensor",
)
INDEXING = ("aten.index.Tensor", "aten.index_put_.default", "aten.index_put.default")


class CountOps(TorchDispatchMode):
    """Counts dispatched operations, and those that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_ops = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        name = str(func)
        self.num_ops += 1
        short = name.removeprefix("aten.")
        if any(short.startswith(word) for word in WAITING):
            self.waits[name] += 1
        elif name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            self.waits[f"{name} with a mask"] += 1
        return func(*args, **(kwargs or {}))


def count_ops(action: Callable[[], object]) -> dict[str, Any]:
    """Return how many operations an action dispatches, and which of them wait."""
    with CountOps() as counter:
        action()
    waits = dict(sorted(counter.waits.items()))
    return {"ops": counter.num_ops, "waits": sum(waits.values()), "waiting_ops": waits}


def count_syncs(action: Callable[[], object]) -> int:
    """Return how often torch says that an action synchronised with the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(item.message) for item in caught)
