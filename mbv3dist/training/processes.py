"""The processes of a run: are all there, do they agree, has one been asked to stop."""

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

T = TypeVar("T")


class AgreedError(ValueError):
    """A mistake that all ranks hear of and end with, in the same words; rank 0 says it."""


def check_launch(environ: dict[str, str] | None = None) -> None:
    """Refuses to run with fewer processes than the launcher was asked for.

    `accelerate launch --cpu --num_processes 2` starts one process, which shows as MASTER_ADDR
    without WORLD_SIZE (Accelerate's CPU launcher needs mpirun). Training would go on silently
    with half the batch or twice the time.

    Raises:
        ValueError: with the command that does start them.
    """
    env = os.environ if environ is None else environ
    if "MASTER_ADDR" in env and "WORLD_SIZE" not in env and "PMI_SIZE" not in env:
        if "OMPI_COMM_WORLD_SIZE" in env:
            return
        raise ValueError(
            "the launcher was asked for several processes but started one (accelerate launch "
            "--cpu does this); on CPUs use: torchrun --nproc-per-node 2 -m mbv3dist train RECIPE"
        )


def check_devices(num_gpus: int, environ: dict[str, str] | None = None) -> None:
    """Refuses GPU launches on a machine whose GPUs are fewer than the processes on it.

    Accelerate's multi-GPU launcher shows as ACCELERATE_MIXED_PRECISION without
    ACCELERATE_USE_CPU; without GPUs all its processes would train slowly on the CPU.

    Raises:
        ValueError: with what to start instead.
    """
    env = os.environ if environ is None else environ
    here = int(env.get("LOCAL_WORLD_SIZE", "1"))
    on_cpu = env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    for_gpus = "ACCELERATE_MIXED_PRECISION" in env and "ACCELERATE_USE_CPU" not in env
    if num_gpus == 0 and for_gpus and int(env.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"accelerate launch started {here} processes for GPUs, and this machine shows none; on "
            "CPUs use: torchrun --nproc-per-node 2 -m mbv3dist train RECIPE"
        )
    if 0 < num_gpus < here and not on_cpu:
        raise ValueError(
            f"{here} processes on this node and {num_gpus} GPU(s); start with --num_processes "
            f"{num_gpus} (accelerate) or --nproc-per-node {num_gpus} (torchrun)"
        )


def check_world_size(num_processes: int) -> None:
    """Refuses to go on if fewer processes found each other than the launcher started."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes != asked:
        raise ValueError(
            f"the launcher started {asked} processes, but {num_processes} train together; start "
            f"them with: torchrun --nproc-per-node {asked} -m mbv3dist train RECIPE"
        )


def local_rank() -> int:
    """Rank within this node, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def on_main_process(function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 and gives every rank its result, or its error.

    Without this, an error that only rank 0 can meet (a full disk, say) leaves the others waiting.

    Raises:
        AgreedError: `function` raised on rank 0, of several.
    """
    if not is_distributed():
        return function()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (ValueError, OSError) as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise AgreedError(box[1])
    result: T = box[0]
    return result


def start_sum(value: Tensor) -> Callable[[], Tensor]:
    """Starts to sum a tensor over all ranks, in place; returns what waits for the sum.

    On a GPU only the stream waits, not the host.
    """
    work = dist.all_reduce(value, async_op=True) if is_distributed() else None

    def wait() -> Tensor:
        if work is not None:
            work.wait()
        return value

    return wait


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def leave_group() -> None:
    """Ends the process group and Accelerate's state, so that another run can start."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for torch that no other step or rank has."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class StopRequest:
    """SIGTERM or SIGUSR1 asks for a checkpoint and a clean end; all ranks agree on the step.

    A context manager: at its end the signals go to their former handlers again. The agreement
    runs on a gloo group of its own, beside the steps: neither GPU nor host waits for it.
    """

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._handle) for number in self.signals}
        self.group: Any = dist.new_group(backend="gloo") if is_distributed() else None
        self._vote = torch.zeros(1)
        self._work: Any = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def heard(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call this once a step.

        Of several ranks it is what they knew at the step before: the votes are collected while a
        step runs, so the answer is there when the next one asks.
        """
        if self.group is None:
            return self.received
        heard = self._work is not None and self._counted()
        self._vote = torch.tensor([float(self.received)])
        self._work = dist.all_reduce(
            self._vote, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )
        return heard

    def _counted(self) -> bool:
        self._work.wait()
        return bool(self._vote.item())

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        if self._work is not None and error[0] is None:
            self._work.wait()  # all ranks have voted: leave nothing under way
        for number, handler in self._previous.items():
            signal.signal(number, handler)
