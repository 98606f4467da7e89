"""A bounded pipeline of threads that fills batch buffers ahead of the consumer.

One planner thread takes requests (which samples make the next batch) and waits for a free buffer;
worker threads draw chunks of samples into it; the consumer takes finished work in order. There are
no processes, nothing is pickled, and the buffers are a ring, so memory is bounded. What fills a
place in a buffer depends on the request alone, so threads decide about time only, never content.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mbv3dist.data.plan import StepPlan

JOIN_TIMEOUT_S = 10.0


@dataclass
class Buffer:
    """A slot of the ring: uint8 [capacity, H, W, 3], and the copies that still read from it."""

    image: torch.Tensor
    fences: list[torch.cuda.Event] = field(default_factory=list)

    def wait(self) -> None:
        """Wait until no copy to a GPU reads from the buffer any more."""
        for fence in self.fences:
            fence.synchronize()
        self.fences = []


@dataclass
class Work:
    """A batch in the making."""

    number: int
    request: StepPlan
    buffer: Buffer
    pending: int  # chunks still to be drawn
    errors: dict[int, BaseException] = field(default_factory=dict)  # by place in the batch
    done: threading.Event = field(default_factory=threading.Event)


class Pipeline:
    """Draws requests in order with `num_threads` threads, at most `prefetch` batches ahead.

    Args:
        requests: (number, what to read), in order; evaluated in the planner thread.
        draw: Called with (work, places) in any thread and order: fills those places of the batch
            and returns what went wrong, by place.
        prepare: Called with each new work before its first place is drawn (planner thread).
        buffers: The ring.
        num_threads: Worker threads.
    """

    def __init__(
        self,
        requests: Iterator[tuple[int, StepPlan]],
        *,
        prepare: Callable[[Work], None],
        draw: Callable[[Work, range], dict[int, BaseException]],
        buffers: list[Buffer],
        num_threads: int,
    ):
        self.wait_s = 0.0
        self._requests = requests
        self._prepare = prepare
        self._draw = draw
        self._num_threads = num_threads
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._free: queue.SimpleQueue[Buffer | None] = queue.SimpleQueue()
        self._tasks: queue.SimpleQueue[tuple[Work, int, int] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Work | BaseException | None] = queue.SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        # Daemons: a consumer that dies without closing must not keep the process alive.
        self._threads = [threading.Thread(target=self._plan, name="mbv3dist-plan", daemon=True)]
        self._threads += [
            threading.Thread(target=self._work, name=f"mbv3dist-decode-{n}", daemon=True)
            for n in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> Work | None:
        """Return the next finished work, or None at the end; sets `wait_s`.

        Raises:
            The error of the work's first bad sample, or of the planner.
        """
        started = time.perf_counter()
        work = self._ready.get()
        if isinstance(work, Work):
            work.done.wait()
        self.wait_s = time.perf_counter() - started
        if isinstance(work, BaseException):
            raise work
        if work is None or self._closed.is_set():
            return None
        if work.errors:
            # The first in the batch's order, whichever thread was fastest.
            raise work.errors[min(work.errors)]
        return work

    def give_back(self, work: Work) -> None:
        """Let the buffer of a consumed work be filled again."""
        self._free.put(work.buffer)

    def close(self) -> None:
        """Stop and join the threads; each finishes at most the chunk it is at."""
        self._closed.set()
        self._free.put(None)
        # The planner first: with its last task in the queue before the workers' end marks, every
        # work gets done, and nobody who waits for one is left waiting.
        self._threads[0].join(JOIN_TIMEOUT_S)
        for _ in range(self._num_threads):
            self._tasks.put(None)
        for thread in self._threads[1:]:
            thread.join(JOIN_TIMEOUT_S)

    def _plan(self) -> None:
        last: BaseException | None = None
        try:
            for number, request in self._requests:
                buffer = self._free.get()
                if buffer is None or self._closed.is_set():
                    break
                buffer.wait()
                count = len(request.index)
                chunk = max(1, count // (2 * self._num_threads))
                starts = range(0, count, chunk)
                work = Work(number, request, buffer, pending=len(starts))
                self._prepare(work)
                self._ready.put(work)
                for start in starts:
                    self._tasks.put((work, start, min(start + chunk, count)))
        except BaseException as error:
            last = error
        self._ready.put(last)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            work, start, stop = task
            errors: dict[int, BaseException] = {}
            if not self._closed.is_set():
                try:
                    errors = self._draw(work, range(start, stop))
                except BaseException as error:
                    errors = {start: error}
            for place, wrong in errors.items():
                wrong.add_note(f"while drawing sample {int(work.request.index[place])}")
            with self._lock:
                work.errors.update(errors)
                work.pending -= 1
                if work.pending == 0:
                    work.done.set()
