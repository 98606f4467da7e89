"""Runs independent calls on several processes, of which the calling one is one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    # Number of a call, its result, and what was raised instead; None where a feeder ends.
    Done = SimpleQueue[tuple[int, Any, BaseException | None] | None]


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Processes that are started when they are first needed and then stay for further calls.

    The calling process does calls too: it would only wait otherwise, and it has begun when the
    others are still starting.

    Args:
        count: How many, with the calling one; None for one per core.
    """

    def __init__(self, count: int | None) -> None:
        self._num_others = (count or num_cores()) - 1
        self._pool: ProcessPoolExecutor | None = None

    def run_all(
        self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], num_calls: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield (number of the call, result) as they are done.

        Args:
            function: A function of a module, so that other processes find it.
            calls: Its arguments, one tuple for each call; taken one by one, as they are needed.
            num_calls: How many there are.

        Raises:
            OSError: if a worker process died.
        """
        source = _Shared(calls)
        done: Done = SimpleQueue()
        num_feeders = min(self._num_others, num_calls - 1)
        for _ in range(num_feeders):
            arguments = self._started(), function, source, done
            threading.Thread(target=_feed, args=arguments, daemon=True).start()
        try:
            for number, call in source:
                yield number, function(*call)
                while not done.empty():
                    num_feeders -= yield from _result(done)
            while num_feeders > 0:
                num_feeders -= yield from _result(done)
        finally:
            source.close()

    def warm_up(self) -> None:
        """Start the processes now: they load what they need while the caller goes on."""
        for _ in range(self._num_others):
            self._started().submit(_import_all)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            from concurrent.futures import ProcessPoolExecutor
            from multiprocessing import get_context

            # Started afresh instead of forked: the caller may have threads, or CUDA, running.
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._num_others, context, initializer=_follow_parent)
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


class _Shared:
    """Numbered calls that several threads take from, until they are used up or it is closed."""

    def __init__(self, calls: Iterable[tuple[Any, ...]]) -> None:
        self._calls = enumerate(calls)
        self._lock = threading.Lock()
        self._is_closed = False

    def __iter__(self) -> _Shared:
        return self

    def __next__(self) -> tuple[int, tuple[Any, ...]]:
        with self._lock:
            if self._is_closed:
                raise StopIteration
            return next(self._calls)

    def close(self) -> None:
        """Give no more calls out."""
        with self._lock:
            self._is_closed = True


def _feed(
    pool: ProcessPoolExecutor, function: Callable[..., Any], source: _Shared, done: Done
) -> None:
    """Keep one process busy: hand a call over, wait for its result, note it, until none is left."""
    number = -1
    try:
        for number, call in source:
            done.put((number, pool.submit(function, *call).result(), None))
    except BaseException as error:  # whoever waits for the result raises it
        done.put((number, None, error))
    else:
        done.put(None)


def _result(done: Done) -> Generator[tuple[int, Any], None, bool]:
    """Wait for what a feeder notes, and yield it; return whether the feeder has ended instead."""
    from concurrent.futures.process import BrokenProcessPool

    item = done.get()
    if item is None:
        return True
    number, result, error = item
    if isinstance(error, BrokenProcessPool):
        raise OSError(
            "a worker process of the conversion died (out of memory, killed, or called from a "
            "script without `if __name__ == '__main__':`); start it again to go on, with fewer "
            "--workers"
        ) from error
    if error is not None:
        raise error
    yield number, result
    return False


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
