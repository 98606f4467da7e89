"""The device's wait for data, by its own clock: events in the stream of a real GPU."""

import time

import pytest
import torch

from mbv3dist.training.meter import Meter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

STEPS = 12


def work_cycles(seconds: float) -> int:
    """GPU cycles that keep the device busy for so long, found by trying.

    An idle card's clock is a fifth of a busy one's, so it is tried until two tries agree.
    """
    cycles, before = 100_000_000, 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(50):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        took = start.elapsed_time(end)
        if abs(took - before) < 0.02 * took:
            break
        before = took
    return int(cycles * 1000 * seconds / took)


def measure(*, pause_s: float, work_s: float) -> dict[str, float]:
    """A record of steps whose batches take the host and whose work takes the device so long."""
    device = torch.device("cuda")
    cycles = work_cycles(work_s)
    loss = torch.ones((), device=device)
    batch = torch.zeros(16, 3, 64, 64, dtype=torch.uint8, pin_memory=True)
    batch.to(device, non_blocking=True)
    torch.cuda.synchronize()
    meter = Meter(device)
    try:
        torch.cuda.set_sync_debug_mode("error")  # a step must not wait for the device
        for _ in range(STEPS):
            meter.ask()
            time.sleep(pause_s)
            batch.to(device, non_blocking=True)
            meter.begin()
            torch.cuda._sleep(cycles)
            meter.add({"loss": loss}, loss)
            meter.step(len(batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return meter.read()


def test_host_waits_while_the_device_works():
    values = measure(pause_s=0.01, work_s=0.03)
    assert values["data_wait"] > 0.2
    # The first batch is waited for: a third of a step of twelve.
    assert values["device_wait"] < 0.06
    assert values["data_wait_ms"] == pytest.approx(10, rel=0.3)


def test_device_waits_for_a_slow_loader():
    values = measure(pause_s=0.03, work_s=0.01)
    assert values["data_wait"] > 0.6
    # It works 10 ms of every 30 while the host waits for the next batch.
    assert values["device_wait"] == pytest.approx(2 / 3, abs=0.12)
    assert values["device_wait"] < values["data_wait"] - 0.1


def test_first_record_forgotten_with_a_restart():
    meter = Meter(torch.device("cuda"))
    loss = torch.ones((), device="cuda")
    meter.ask()
    time.sleep(0.3)
    meter.begin()
    meter.restart_clock()  # as after a validation; events of the step may still be under way
    torch.cuda._sleep(work_cycles(0.05))
    meter.ask()
    meter.begin()
    meter.add({"loss": loss}, loss)
    meter.step(4)
    assert meter.read()["device_wait"] < 0.1
