"""`data.decode: auto`: measure for a second or two what decodes fastest here, and choose.

    cpu     threads decode and resize; the batch is copied to the device
    hybrid  threads decode; the crops are copied packed, the device resizes
    gpu     compressed bytes are copied; the device decodes and resizes

Rates are of one rank, measured while the others of the node measure too, as they will run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mbv3dist.messages import one_line

Decode = Literal["cpu", "hybrid", "gpu"]

# How much faster something must be to be worth it. Work on the device takes time from training,
# and the GPU's pixels are not quite the CPU's.
GAIN: dict[Decode, float] = {"cpu": 1.0, "hybrid": 1.1, "gpu": 1.25}

SECONDS_EACH = 0.5


@dataclass(frozen=True)
class DecodeChoice:
    """What decodes, and a line for the log that says why."""

    decode: Decode
    reason: str


def choose_decode(
    device_type: str,
    ways: Mapping[Decode, Callable[[], Callable[[], int]]],
    *,
    seconds_each: float = SECONDS_EACH,
    clock: Callable[[], float] = time.perf_counter,
) -> DecodeChoice:
    """Measure each way that works here, and choose one.

    Args:
        device_type: "cuda", or anything else, where there is nothing to measure.
        ways: what to measure, "cpu" among them. Calling one makes it ready and returns a function
            that takes a batch of real samples all the way to normalised pixels on the device,
            waits for it and returns the number of pictures. A way other than "cpu" that fails, in
            a library or a driver, does not work here; the reason says why.
        seconds_each: for how long each is measured, after a first batch that does not count.
        clock: seconds.
    """
    if device_type != "cuda":
        return DecodeChoice("cpu", f"decode: cpu, since the device is {device_type}")
    rates: dict[Decode, float] = {}
    problems: dict[Decode, str] = {}
    for name, make_ready in ways.items():
        try:
            rates[name] = measure_rate(make_ready(), seconds=seconds_each, clock=clock)
        except (ValueError, RuntimeError, OSError) as error:
            if name == "cpu":
                raise  # nothing is left to choose
            problems[name] = one_line(str(error))
    return decide(rates, problems)


def measure_rate(
    run: Callable[[], int], *, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return pictures per second of `run`, called for `seconds`, twice at least.

    The first call is for warming up (libraries, compiled kernels, memory) and does not count.
    """
    run()
    start = clock()
    count = run()
    while (elapsed := clock() - start) < seconds:
        count += run()
    return count / max(elapsed, 1e-9)


def decide(
    rates: Mapping[Decode, float], problems: Mapping[Decode, str] | None = None
) -> DecodeChoice:
    """Choose by rates (images/s): the fastest, where it is faster by enough to be worth it.

    Args:
        rates: of the ways that work, "cpu" among them.
        problems: why the others do not work.
    """
    # From the least to the most work on the device: each must beat what is chosen so far.
    chosen: Decode = "cpu"
    for name in ("hybrid", "gpu"):
        gain = GAIN[name] / GAIN[chosen]
        if name in rates and rates[name] >= gain * rates[chosen]:
            chosen = name
    measured = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    reason = f"decode: {chosen}, measured images/s per process: {measured}"
    for name, problem in (problems or {}).items():
        reason += f"; {name} not possible ({problem})"
    return DecodeChoice(chosen, reason)
