"""Runs independent calls on several processes, a bounded number of them in flight."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

_CALLS_PER_WORKER = 3  # in flight: keeps workers busy and little waiting in memory


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Processes that are started when they are first needed and then stay for further calls.

    Args:
        count: How many; None for one per core. With one, calls run in this process.
    """

    def __init__(self, count: int | None) -> None:
        self._count = count or num_cores()
        self._pool: ProcessPoolExecutor | None = None

    def run_all(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], num_calls: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the call, result) in order.

        Args:
            function: A function of a module, so that other processes find it.
            calls: Its arguments, one tuple for each call; taken one by one, as they are needed.
            num_calls: How many there are.

        Raises:
            OSError: if a worker process died.
        """
        if min(self._count, num_calls) <= 1:
            for number, arguments in enumerate(calls):
                yield number, function(*arguments)
            return
        from concurrent.futures.process import BrokenProcessPool

        waiting: deque[tuple[int, Future[Any]]] = deque()
        pool = self._started()
        try:
            for number, arguments in enumerate(calls):
                waiting.append((number, pool.submit(function, *arguments)))
                if len(waiting) >= self._count * _CALLS_PER_WORKER:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process of the conversion died (out of memory, killed, or called from a "
                "script without `if __name__ == '__main__':`); start it again to go on, with fewer "
                "--workers"
            ) from error

    def warm_up(self) -> None:
        """Start the processes now: they load what they need while the caller goes on."""
        if self._count > 1:
            for _ in range(self._count):
                self._started().submit(_import_all)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            # Started afresh instead of forked: the caller may have threads, or CUDA, running.
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._count, context, initializer=_follow_parent)
        return self._pool

    def close(self) -> None:
        """End the processes; calls that have not begun are given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _import_all() -> None:
    import mbv3dist.convert.writer  # noqa: F401  (with it come all others, and NumPy)


def _follow_parent() -> None:
    """Make this worker end when the process that started it is killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
