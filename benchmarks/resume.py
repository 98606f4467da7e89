"""How long does it take to go on in the middle of a run, and what does it read and keep?

    python benchmarks/resume.py [--quick] [--json FILE] [--markdown FILE]

Resuming is `Plan(...).step(s)` with nothing computed before: the epoch's shard order and the
present block of each of the rank's lanes. Measured on sizes alone, no data: warm (this process,
a new plan each time) and cold (a new process each time), at several places of the run. Then what a
resumed `Loader` really reads, on a small data set with a counting store; and how long reading the
list of shards takes, as SPLIT.json and as SPLIT.manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from machine import commit, in_new_process, machine, peak_mb, versions
from options import output_file
from resume_data import measure_manifest, measure_reads, open_process

from mbv3dist.data.plan import Plan

EPOCHS = 90
# Epochs into the run: of the first epoch 1 %, 50 % and 99 %, and far on.
POINTS = {"1 %": 0.01, "50 %": 0.5, "99 %": 0.99, "epoch 90, 50 %": 89.5}
LIMITS = {"1.28 M samples, warm_ms": 5.0, "1 billion, warm_ms": 100.0, "1 billion, MB": 200.0}


@dataclass(frozen=True)
class Case:
    """A data set, a batch and a number of ranks."""

    samples: int
    shard_samples: int
    global_batch: int
    ranks: int

    def plan(self) -> Plan:
        """Return the plan, with nothing computed."""
        return Plan(shard_sizes(self), global_batch_size=self.global_batch, epochs=EPOCHS)

    def step(self, plan: Plan, point: str) -> int:
        """Return the step at a point of the run."""
        return int(POINTS[point] * self.samples) // plan.global_batch_size


def shard_sizes(case: Case) -> np.ndarray:
    """Return equal shards; the last has the rest."""
    sizes = np.full(-(-case.samples // case.shard_samples), case.shard_samples, dtype=np.int64)
    sizes[-1] = case.samples - case.shard_samples * (len(sizes) - 1)
    return sizes


def all_cases(*, quick: bool) -> list[Case]:
    """Return the cases: 1.28 M on P = 1, 8, 64, a billion on P = 1, 8, 10,000."""
    if quick:
        return [Case(1_281_167, 1000, 256, 8), Case(10**9, 10_000, 320_000, 10_000)]
    million = [Case(1_281_167, 1000, 256, ranks) for ranks in (1, 8, 64)]
    billion = [
        Case(10**9, shard_samples, batch, ranks)
        for shard_samples in (1000, 2300, 10_000)
        for batch, ranks in ((256, 1), (2048, 8), (320_000, 10_000))
    ]
    return million + billion


def measure_warm(cases: Sequence[Case], *, quick: bool) -> list[dict[str, Any]]:
    """Return times of a first step by case and point, interleaved; milliseconds.

    Of processor time too: it says more where others use the machine.
    """
    times: dict[tuple[Case, str], list[float]] = {(c, p): [] for c in cases for p in POINTS}
    cpu_times: dict[tuple[Case, str], list[float]] = {key: [] for key in times}
    make: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(4 if quick else 16):
        for case in cases:
            sizes = shard_sizes(case)
            # The small ones are quick: many turns, for a sharp median.
            for _ in range(1 if quick or case.samples >= 10**8 else 12):
                for point in POINTS:
                    started = time.perf_counter()
                    plan = Plan(sizes, global_batch_size=case.global_batch, epochs=EPOCHS)
                    made = time.perf_counter()
                    step = case.step(plan, point)
                    before, cpu_before = time.perf_counter(), time.thread_time()
                    plan.step(step, rank=case.ranks // 2, world_size=case.ranks)
                    after, cpu_after = time.perf_counter(), time.thread_time()
                    if turn:  # the first turn warms up
                        times[case, point].append((after - before) * 1e3)
                        cpu_times[case, point].append((cpu_after - cpu_before) * 1e3)
                        make[case].append((made - started) * 1e3)
    return [
        {
            **asdict(case),
            "shards": -(-case.samples // case.shard_samples),
            "lanes": case.plan().lanes,
            "point": point,
            "step": case.step(case.plan(), point),
            "warm_ms": spread(values),
            "cpu_ms": spread(cpu_times[case, point]),
            "make_plan_ms": spread(make[case])["median"],
        }
        for (case, point), values in times.items()
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return how values are spread."""
    low, middle, high = np.percentile(values, (0, 50, 90))
    return {
        "min": round(float(low), 3),
        "median": round(float(middle), 3),
        "p90": round(float(high), 3),
        "repetitions": len(values),
    }


def cold_process(case: Case, *, traced: bool) -> dict[str, float]:
    """In a new process: time from nothing to the first step, and memory; see `measure_cold`."""
    import tracemalloc

    import numpy.random  # noqa: F401  NumPy imports it when it is first asked for

    plan = case.plan()
    step = case.step(plan, "50 %")
    before = peak_mb()
    if traced:
        tracemalloc.start()
    started = time.perf_counter()
    plan.step(step, rank=case.ranks // 2, world_size=case.ranks)
    seconds = time.perf_counter() - started
    if traced:
        return {"step_peak_mb": tracemalloc.get_traced_memory()[1] / 1e6}
    return {"step_ms": seconds * 1e3, "process_mb": peak_mb(), "before_step_mb": before}


def measure_cold(cases: Sequence[Case], *, quick: bool) -> list[dict[str, Any]]:
    """Return figures of new processes, by case, at 50 % of the first epoch.

    `step_ms` is the step; `start_ms` all of the process: interpreter, NumPy, sizes, plan and step;
    `process_mb` the most it ever had resident; `step_peak_mb` the most that the step allocated.
    """
    results = []
    for case in cases:
        runs = []
        for _ in range(1 if quick else 5):
            started = time.perf_counter()
            figures = in_new_process(__file__, "cold", {**asdict(case), "traced": False})
            runs.append({**figures, "start_ms": (time.perf_counter() - started) * 1e3})
        traced = in_new_process(__file__, "cold", {**asdict(case), "traced": True})
        figures = {key: round(float(np.median([run[key] for run in runs])), 2) for key in runs[0]}
        results.append(
            {**asdict(case), **figures, "step_peak_mb": round(traced["step_peak_mb"], 2)}
        )
    return results


def measure_interpreter(*, quick: bool) -> dict[str, float]:
    """Return how long an empty interpreter takes, and one that imports NumPy and the plan."""
    codes = {"interpreter_ms": "pass", "imports_ms": "import numpy.random, mbv3dist.data.plan"}
    result = {}
    for name, code in codes.items():
        times = []
        for _ in range(2 if quick else 7):
            started = time.perf_counter()
            subprocess.check_call([sys.executable, "-c", code])
            times.append((time.perf_counter() - started) * 1e3)
        result[name] = round(float(np.median(times)), 1)
    return result


def verdict(report: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that have a target: the worst of all points and numbers of ranks."""
    small = [row for row in report["warm"] if row["samples"] < 10**8]
    large = [row for row in report["warm"] if row["samples"] >= 10**8]
    memory = [row for row in report["cold"] if row["samples"] >= 10**8]
    return {
        "1.28 M samples, warm_ms": max(row["warm_ms"]["median"] for row in small),
        "1.28 M samples, cpu_ms": max(row["cpu_ms"]["median"] for row in small),
        "1 billion, warm_ms": max(row["warm_ms"]["median"] for row in large),
        "1 billion, cpu_ms": max(row["cpu_ms"]["median"] for row in large),
        "1 billion, MB": max(row["process_mb"] for row in memory),
        "bytes_again": sum(row["bytes_again"] for row in report["reads"]),
    }


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    host = report["machine"]
    lines = [
        "# Resuming in the middle of a run",
        "",
        f"`{report['command']}`, {report['seconds']:.0f} s, commit {report['commit']}. Machine: "
        f"{host['cpu']}, {host['cores']} cores, load {host['load_1min']} at the start and "
        f"{report['load_at_end']} at the end (1 minute), {host['system']}, Python "
        f"{host['python']}, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + f". A run of {EPOCHS} epochs, default lanes and blocks; a rank in the middle.",
        "",
        "Targets: "
        + ", ".join(f"{name} at most {limit:g}" for name, limit in LIMITS.items())
        + ". Worst of all rows: "
        + ", ".join(f"{name} {value:g}" for name, value in report["verdict"].items())
        + ".",
        "",
        "## Warm: the first step of a new plan, in milliseconds",
        "",
        "Minimum / median / 90 %, and in brackets the median of processor time, which says more "
        "where others use the machine.",
        "",
        "| samples | in a shard | G | P | " + " | ".join(POINTS) + " |",
        "| ---: " * (4 + len(POINTS)) + "|",
    ]
    rows: dict[tuple[int, ...], list[str]] = {}
    for row in report["warm"]:
        key = tuple(row[name] for name in ("samples", "shard_samples", "global_batch", "ranks"))
        times = row["warm_ms"]
        cell = " / ".join(f"{times[name]:.2f}" for name in ("min", "median", "p90"))
        cell += f" ({row['cpu_ms']['median']:.2f})"
        rows.setdefault(key, []).append(cell)
    lines += [
        "| " + " | ".join([*(f"{n:,}" for n in key), *cells]) + " |" for key, cells in rows.items()
    ]
    start = report["interpreter"]
    lines += [
        "",
        "## Cold: a new process at 50 % (medians)",
        "",
        f"An interpreter that does nothing takes {start['interpreter_ms']} ms, one that imports "
        f"NumPy and the plan {start['imports_ms']} ms; `start` has that in it.",
        "",
        "| samples | in a shard | G | P | step, ms | start, ms | process, MB | before the step, MB "
        "| allocated by the step at most, MB |",
        "| ---: " * 9 + "|",
    ]
    for row in report["cold"]:
        whole = ("samples", "shard_samples", "global_batch", "ranks")
        cells = [f"{row[key]:,}" for key in whole]
        figures = ("step_ms", "start_ms", "process_mb", "before_step_mb", "step_peak_mb")
        cells += [f"{row[key]:.1f}" for key in figures]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## What a resumed loader reads", ""]
    for row in report["reads"]:
        lines.append(
            f"- {row['point']:.0%}, step {row['step']}: {row['bytes_this_step']} bytes of this "
            f"step's samples, {row['bytes_ahead']} of the next steps', {row['bytes_again']} of "
            f"steps before; {row['shards_opened']} of {row['shards']} shards opened, "
            f"{row['shards_not_needed']} of them without need."
        )
    lines += [
        "",
        "## Opening a split of many shards (new processes, medians)",
        "",
        "| shards | SPLIT.json | parsed | memory | SPLIT.manifest | opened | memory |",
        "| ---: " * 7 + "|",
    ]
    lines += [
        f"| {row['shards']:,} "
        f"| {row['json_mb']} MB | {row['json_ms']} ms | {row['json_mb_used']} MB"
        f" | {row['manifest_mb']} MB | {row['manifest_ms']} ms | {row['manifest_mb_used']} MB |"
        for row in report["manifest"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, few repetitions")
    parser.add_argument("--json", type=output_file, help="write the results to this file")
    parser.add_argument("--markdown", type=output_file, help="write them as a document")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        arguments = json.loads(args.part[1])
        if args.part[0] == "open":
            print(json.dumps(open_process(**arguments)))
        else:
            traced = arguments.pop("traced")
            print(json.dumps(cold_process(Case(**arguments), traced=traced)))
        return
    started = time.perf_counter()
    cases = all_cases(quick=args.quick)
    report: dict[str, Any] = {
        "command": "python benchmarks/resume.py" + (" --quick" if args.quick else ""),
        "commit": commit(),
        "machine": machine(),
        "versions": versions("mbv3dist", "numpy"),
        "warm": measure_warm(cases, quick=args.quick),
        "interpreter": measure_interpreter(quick=args.quick),
        "cold": measure_cold(cases, quick=args.quick),
        "reads": measure_reads(quick=args.quick),
        "manifest": measure_manifest(__file__, quick=args.quick),
    }
    report["load_at_end"] = machine()["load_1min"]
    report["seconds"] = round(time.perf_counter() - started, 1)
    report["verdict"] = verdict(report)
    if args.markdown:
        args.markdown.write_text(report_text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
