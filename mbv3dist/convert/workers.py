"""Runs independent calls on several processes, a bounded number of them in flight."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_CALLS_PER_WORKER = 3  # in flight: keeps workers busy and little waiting in memory


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_all(
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    num_calls: int,
    *,
    workers: int | None,
) -> Iterator[tuple[int, Any]]:
    """Yield (number of the call, result) in order.

    Args:
        function: A function of a module, so that other processes find it.
        calls: Its arguments, one tuple for each call; taken one by one, as they are needed.
        num_calls: How many there are.
        workers: Processes; None for one per core. With one, calls run in this process.

    Raises:
        OSError: if a worker process died.
    """
    count = min(workers or num_cores(), num_calls)
    if count <= 1:
        for number, arguments in enumerate(calls):
            yield number, function(*arguments)
        return
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    waiting: deque[tuple[int, Future[Any]]] = deque()
    # Started afresh instead of forked: the caller may have threads, or CUDA, running.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        for number, arguments in enumerate(calls):
            waiting.append((number, pool.submit(function, *arguments)))
            if len(waiting) >= count * _CALLS_PER_WORKER:
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
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Make this worker end when the process that started it is killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
