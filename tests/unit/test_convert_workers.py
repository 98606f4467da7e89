"""Calls that several processes share with the one that asks."""

import os
import signal
import time

import pytest

from mbv3dist.convert.workers import Workers


def square(number):
    time.sleep(0.002)
    return number * number, os.getpid()


def fail(number):
    if number == 3:
        raise ValueError("three")
    return number


def die_elsewhere(parent):
    if os.getpid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)


@pytest.mark.parametrize(("count", "num_calls"), [(1, 5), (2, 0), (2, 1), (3, 400)])
def test_every_call_is_done_once(count, num_calls):
    with Workers(count) as workers:
        workers.warm_up()
        calls = ((number,) for number in range(num_calls))
        found = list(workers.run_all(square, calls, num_calls))
    assert sorted((number, value) for number, (value, _) in found) == [
        (number, number * number) for number in range(num_calls)
    ]
    processes = {process for _, (_, process) in found}
    assert len(processes) <= count and (not found or os.getpid() in processes)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_call_raises_is_raised(count):
    with Workers(count) as workers, pytest.raises(ValueError, match="three"):
        list(workers.run_all(fail, ((number,) for number in range(100)), 100))


def test_what_the_calls_raise_is_raised():
    def calls():
        yield from ((number,) for number in range(10))
        raise ValueError("no more")

    with Workers(2) as workers, pytest.raises(ValueError, match="no more"):
        list(workers.run_all(square, calls(), 20))


def test_a_dead_worker_is_said():
    parent = os.getpid()
    with Workers(2) as workers, pytest.raises(OSError, match=r"worker process .* died"):
        list(workers.run_all(die_elsewhere, ((parent,) for _ in range(1000)), 1000))
