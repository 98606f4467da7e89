"""A trace of one action: a file for a browser's trace viewer, and what took the time in a table.

    rows = tracing.traced(step, Path("trace.json.gz"), device=torch.device("cuda"))

On a GPU the table is of its kernels, copies and fills; elsewhere of torch's operations on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from options import output_file
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

SUFFIXES = (".json", ".json.gz")
TOP = 15
NAME_LENGTH = 90  # of a kernel in a table: templates' names are longer than a page is wide


@dataclass(frozen=True)
class Row:
    """What one kernel or operation took in a trace.

    Attributes:
        name: As the profiler has it.
        calls: How often it ran.
        ms: Milliseconds of its own, on the device, or on the CPU where there is none.
        share: Of all rows' time.
    """

    name: str
    calls: int
    ms: float
    share: float


def add_option(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark's command line `--trace FILE`."""
    parser.add_argument(
        "--trace",
        type=trace_path,
        metavar="FILE",
        help="save a trace of one step of ours (.json or .json.gz), and list its kernels",
    )


def trace_path(word: str) -> Path:
    """A path that a trace can be written to.

    Raises:
        argparse.ArgumentTypeError: The name has another ending, or cannot be written.
    """
    if not word.endswith(SUFFIXES):
        raise argparse.ArgumentTypeError(f"{word}: its name must end in {' or '.join(SUFFIXES)}")
    return output_file(word)


def named(path: Path, part: str) -> Path:
    """The path with a part's name before its ending: trace.json.gz -> trace-PART.json.gz."""
    ending = next(suffix for suffix in reversed(SUFFIXES) if path.name.endswith(suffix))
    words = "-".join(part.split())
    return path.with_name(f"{path.name.removesuffix(ending)}-{words}{ending}")


def traced(action: Callable[[], object], path: Path, *, device: torch.device) -> list[Row]:
    """Run an action once under torch's profiler and save the trace.

    Args:
        action: What is traced; run it before, so that nothing is compiled in the trace.
        path: Of the trace, a Chrome trace; its folder is made.
        device: Where the action's work is done.

    Returns:
        What took the time, the longest first.

    Raises:
        ValueError: The path has another ending.
        OSError: It cannot be written.
    """
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a trace's name must end in {' or '.join(SUFFIXES)}")
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")  # the profiler itself would not say why it cannot be written
    if on_gpu:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as found:
        action()
        if on_gpu:
            torch.cuda.synchronize(device)
    found.export_chrome_trace(str(path))
    return rows_of(found.key_averages(), on_gpu=on_gpu)


def rows_of(averages: Iterable[Any], *, on_gpu: bool) -> list[Row]:
    """What the profiler's averages say: of the device's own events, or of operations.

    On a GPU an operation's entry holds the time of the kernels that it launched, which have
    entries too: only the latter count.
    """
    times = []
    for entry in averages:
        if on_gpu != (entry.device_type == DeviceType.CUDA):
            continue
        took_us = entry.self_device_time_total if on_gpu else entry.self_cpu_time_total
        if took_us > 0:
            times.append((entry.key, entry.count, took_us / 1e3))
    total = sum(took for _, _, took in times)
    times.sort(key=lambda item: -item[2])
    return [Row(name, calls, round(took, 4), took / total) for name, calls, took in times]


def kernel_table(rows: Sequence[Row], top: int = TOP) -> list[str]:
    """The lines of a Markdown table of what took most; the rest in one line."""
    shown = [(short(row.name), str(row.calls), row.ms, row.share) for row in rows[:top]]
    rest = rows[top:]
    if rest:
        calls = str(sum(row.calls for row in rest))
        name = f"{len(rest)} others"
        shown.append((name, calls, sum(row.ms for row in rest), sum(row.share for row in rest)))
    return harness.table(
        ("kernel", "calls", "ms", "share"),
        [(name, calls, f"{ms:.3f}", f"{100 * share:.1f} %") for name, calls, ms, share in shown],
    )


def short(name: str) -> str:
    """A kernel's name in a table's cell."""
    name = name.replace("|", "/").replace("\n", " ")
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 3] + "..."


def as_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows for a report in JSON."""
    return [{**asdict(row), "share": round(row.share, 4)} for row in rows]


def from_dicts(entries: Iterable[dict[str, Any]]) -> list[Row]:
    """Rows of a report in JSON."""
    return [Row(**entry) for entry in entries]
