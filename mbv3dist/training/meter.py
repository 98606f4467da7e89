"""What a run measures about itself: losses, images per second, and the wait for data.

A batch is waited for by the host, which asks the loader for it, and by the device. They differ on a
GPU: the host runs ahead, so while it waits the device may have work left. The device's own wait is
taken from its timeline. An event goes into the stream when the loader is asked for the next batch
and another one when that batch, its copy included, is ready for use; between the two the device
has no training to do. Nothing waits for events: they are read once they have happened.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mbv3dist.training.processes import is_distributed


class Event(Protocol):
    """A mark in the stream of work of a device; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Puts the mark behind all work given to the device so far."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds of the device's time from this mark to a later one; both have happened."""


class DataWait:
    """How long steps wait for their batches: `ask` before each, `begin` when it is there.

    Args:
        make_event: makes the device's events; None where the device is the host itself.
        clock: the host's seconds.
    """

    def __init__(
        self,
        make_event: Callable[[], Event] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make_event = make_event
        self._clock = clock
        self._pending: deque[tuple[Event, Event]] = deque()
        self._unused: list[Event] = []
        self._asked_event: Event | None = None
        self._asked_at: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured so far."""
        self.steps, self.host_s, self.host_max_s, self._device_s = 0, 0.0, 0.0, 0.0
        self._pending.clear()

    def ask(self) -> None:
        """The next batch is asked for; all work before it has been given to the device."""
        self._asked_at = self._clock()
        if self._make_event is not None:
            self._asked_event = self._mark()

    def begin(self) -> None:
        """The batch is there, and its copy to the device is under way."""
        assert self._asked_at is not None, "begin() without ask()"
        waited = self._clock() - self._asked_at
        self._asked_at = None
        self.steps += 1
        self.host_s += waited
        self.host_max_s = max(self.host_max_s, waited)
        if self._asked_event is not None:
            self._pending.append((self._asked_event, self._mark()))
            self._collect()

    def device_s(self) -> float:
        """Seconds the device waited; call it when the device has done what it was given."""
        if self._make_event is None:
            return self.host_s
        self._collect()
        assert not self._pending, "the device has not done its work yet"
        return self._device_s

    def _mark(self) -> Event:
        assert self._make_event is not None
        event = self._unused.pop() if self._unused else self._make_event()
        event.record()
        return event

    def _collect(self) -> None:
        """Reads the events that have happened, so that few are ever in use."""
        while self._pending and self._pending[0][1].query():
            asked, begun = self._pending.popleft()
            self._device_s += asked.elapsed_time(begun) / 1000
            self._unused += (asked, begun)


class Meter:
    """Sums of losses on the device, and the clocks; read only when a record is written."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        is_cuda = device.type == "cuda"
        self._wait = DataWait(partial(torch.cuda.Event, enable_timing=True) if is_cuda else None)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out what happened so far (a validation, say) from the rates."""
        self._start, self._images = time.perf_counter(), 0
        self._wait.restart()

    def ask(self) -> None:
        """The next batch is asked for."""
        self._wait.ask()

    def begin(self) -> None:
        """The batch is there, on its way to the device."""
        self._wait.begin()

    def add(self, losses: dict[str, Tensor], normalizer: Tensor) -> None:
        """Adds the loss sums of a micro-batch; `normalizer` is the step's, over all ranks."""
        for name, value in losses.items():
            part = value.detach() / normalizer.clamp(min=1)
            self._sums[name] = self._sums.get(name, 0) + part

    def step(self, num_images: int) -> None:
        """Counts a step and its images over all ranks."""
        self._steps += 1
        self._images += num_images

    def read(self) -> dict[str, float]:
        """Means since the last reading, over all ranks. Waits for the device.

        Returns:
            The losses, per step; `images_per_s` over all ranks; and the wait for data. `data_wait`
            is the share of the time that the host waited, `device_wait` that of the device, both
            0 to 1: the mean over ranks, and with `_max` that of the rank that waited longest,
            which all others wait for in turn. `data_wait_ms` is the host's wait in a step, the
            mean, and with `_max` the longest one of any step and rank.
        """
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        elapsed = now - self._start
        wait = self._wait
        waits = [
            wait.host_s / elapsed,
            wait.device_s() / elapsed,
            1000 * wait.host_s / max(wait.steps, 1),
            1000 * wait.host_max_s,
        ]
        names = list(self._sums)
        sums = torch.stack([self._sums[name].double() for name in names])
        mine = torch.cat([sums, torch.tensor(waits, dtype=torch.float64, device=sums.device)])
        ranks = _gather(mine).cpu()
        means = (ranks[:, : len(names)].sum(dim=0) / self._steps).tolist()
        mean = ranks[:, len(names) :].mean(dim=0).tolist()
        longest = ranks[:, len(names) :].max(dim=0).values.tolist()
        values = {"loss": sum(means), **dict(zip(names, means, strict=True))}
        values["images_per_s"] = round(self._images / elapsed, 2)
        for place, name in enumerate(("data_wait", "device_wait")):
            values[name] = round(mean[place], 4)
            values[f"{name}_max"] = round(longest[place], 4)
        values["data_wait_ms"] = round(mean[2], 3)
        values["data_wait_ms_max"] = round(longest[3], 3)
        self._sums, self._steps = {}, 0
        self.restart_clock()
        self._start = now  # what the ranks waited for each other belongs to the next record
        return values


def _gather(values: Tensor) -> Tensor:
    """The values of all ranks: float64 [P, n] of [n]."""
    if not is_distributed():
        return values[None]
    gathered = values.new_empty(dist.get_world_size() * len(values))
    dist.all_gather_into_tensor(gathered, values)
    return gathered.view(-1, len(values))
