"""What the benchmarks share: interleaved rounds, medians with their spread, and the report.

A figure is a median over rounds. Rounds are interleaved (A B C, A B C, ...), so that whatever
else the machine does meets every system alike, and two systems are compared by ratios of figures
of the same run, with a bootstrap interval over its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
from machine import ROOT, commit, machine  # noqa: E402

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
RESAMPLES = 4000
ANSWER_LIMIT_S = 300.0
END_LIMIT_S = 10.0
TRIES = 5  # of a run that others disturb


def interleave(
    runs: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    failed: dict[str, str] | None = None,
    errors: tuple[type[Exception], ...] = (),
    quiet: float = 1.0,
    others: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Call every run once a round and return its figures in the order of the rounds.

    Args:
        runs: Name -> what measures one figure.
        rounds: How often.
        failed: Takes name -> reason of what raised one of `errors`; such a run is left out of
            the rounds that follow and of the result. None: errors are raised.
        errors: What counts as a failure of the system measured.
        quiet: A run during which other processes took more than this share of the machine's cores
            is done again, at most `TRIES` times; the one with the smallest share counts.
        others: Takes name -> that share in each round.
    """
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in list(figures):
            try:
                figure, share = quietest(runs[name], quiet=quiet)
            except errors as error:
                if failed is None:
                    raise
                failed[name] = str(error)
                del figures[name]
                continue
            figures[name].append(figure)
            if others is not None:
                others.setdefault(name, []).append(round(share, 3))
    return figures


def quietest(run: Callable[[], float], *, quiet: float) -> tuple[float, float]:
    """Return a run's figure, and the share of the cores that other processes took meanwhile."""
    found: list[tuple[float, float]] = []
    while not found or (found[-1][1] > quiet and len(found) < TRIES):
        started, before = time.perf_counter(), _others_cpu_s()
        figure = run()
        took = time.perf_counter() - started
        share = (_others_cpu_s() - before) / (took * (os.cpu_count() or 1))
        found.append((figure, min(max(0.0, share), 1.0)))  # the clock ticks in 10 ms
    return min(found, key=lambda item: item[1])


def _others_cpu_s() -> float:
    """Return the CPU seconds so far of all that is not this process or one that it started.

    What a hypervisor gave to others counts too. 0 where there is no Linux to tell.
    """
    machine_stat = Path("/proc/stat")
    if not machine_stat.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, irq, soft, steal = map(
        int, machine_stat.read_text().split(maxsplit=9)[1:9]
    )
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(map(int, fields[11:15]))  # its own, and of children that have ended
    own, found = 0, [os.getpid()]
    while found:
        pid = found.pop()
        own += ticks.get(pid, 0)
        found += [child for child, parent in parents.items() if parent == pid]
    return (user + nice + system + irq + soft + steal - own) / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float], *, digits: int = 1) -> dict[str, Any]:
    """Return median, 10th and 90th percentile, and all figures in their order."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return {
        "median": round(float(middle), digits),
        "p10": round(float(low), digits),
        "p90": round(float(high), digits),
        "rounds": [round(float(value), digits) for value in values],
    }


def ratio(ours: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return the ratio of the medians of figures of the same rounds, with a 95 % interval.

    The interval is a bootstrap over rounds: both systems lose and repeat the same rounds.
    """
    assert len(ours) == len(base) and len(ours) > 0
    first, second = np.asarray(ours, dtype=float), np.asarray(base, dtype=float)
    picks = np.random.default_rng(0).integers(len(first), size=(RESAMPLES, len(first)))
    ratios = np.median(first[picks], axis=1) / np.median(second[picks], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return {
        "ratio": round(float(np.median(first) / np.median(second)), 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


def per_second(amount: float, action: Callable[[], object]) -> float:
    """Return how much a second an action achieves that does `amount` of something."""
    started = time.perf_counter()
    action()
    return amount / (time.perf_counter() - started)


def disturbance(shares: Sequence[Sequence[float]]) -> str:
    """Return in words how much of the machine other processes took while it was measured."""
    every = [share for row in shares for share in row]
    return (
        f"Other processes took {100 * float(np.median(every)):.0f} % of the cores in the median "
        f"run, {100 * max(every):.0f} % in the worst."
    )


class Child:
    """A process of a system measured: one JSON object a line goes in, one comes out.

    Each has its own interpreter, lives as long as the benchmark, and waits while others run.
    """

    def __init__(self, python: Path, module: str, *words: str, work: Path):
        """Start `python -m module words`; its messages go to a file in `work`."""
        work.mkdir(parents=True, exist_ok=True)
        self.log = work / f"{'-'.join((module.rpartition('.')[2], *words))}.log"
        paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(work),
            # Nothing of this needs a network; these two would ask.
            "LITDATA_DISABLE_VERSION_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # A pipe of their own: anything may be printed to standard output.
        answers, writing_end = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module, *words],
                cwd=HERE,
                env={**environment, "ANSWERS_FD": str(writing_end)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing_end,),
            )
        os.close(writing_end)

    def ask(self, job: Mapping[str, Any], *, limit_s: float = ANSWER_LIMIT_S) -> dict[str, Any]:
        """Send a job and return its answer.

        Raises:
            RuntimeError: When the process died, said that it failed, or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError(f"it ended: {self._last_words()}") from None
        line = self._line(limit_s)
        if not line:
            raise RuntimeError(f"it ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _line(self, limit_s: float) -> bytes:
        """Return one line of its output: it is written at once, so its start is waited for."""
        ready, _, _ = select.select([self._answers], [], [], limit_s)
        if not ready:
            self.close()
            raise RuntimeError(f"no answer within {limit_s:g} s")
        return self._answers.readline()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a message"

    def close(self) -> None:
        """End the process: it ends by itself when its input ends, else it is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended before it took everything
            self._process.stdin.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def missing_modules(python: Path, modules: Iterable[str]) -> set[str]:
    """Return which modules an interpreter does not have, without importing them."""
    names = sorted(set(modules))
    if python != Path(sys.executable) and not python.is_file():
        return set(names)
    code = """
import importlib.util, json, sys

def is_missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # of the package that it is in
        return True

print(json.dumps([name for name in sys.argv[1:] if is_missing(name)]))
"""
    output = subprocess.check_output([str(python), "-c", code, *names], text=True)
    return set(json.loads(output))


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a command line with what every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="a short run on pictures it makes")
    result.add_argument("--json", type=Path, metavar="FILE", help="save the report")
    result.add_argument("--markdown", type=Path, metavar="FILE", help="save the tables")
    result.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    result.add_argument(
        "--quiet",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="measure again what others took more than this share of the cores from; default 1",
    )
    result.add_argument(
        "--work", type=Path, metavar="DIR", help="keep prepared data here (default: thrown away)"
    )
    result.add_argument(
        "--peers-python",
        type=Path,
        default=PEERS_PYTHON,
        metavar="PATH",
        help="interpreter that has the peers (default: .venv-peers, made by `make bench-peers`)",
    )
    return result


def header(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the head of a report: what ran, on what, from which commit.

    Of absolute paths only the last part stands in it: where a folder lies says nothing to others.
    """
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return {
        "benchmark": name,
        "command": " ".join(["python", f"benchmarks/{name}.py", *shown]),
        "machine": machine(),
        "commit": commit(),
    }


def merged(report: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a saved report with the sections of this one added to it.

    So a long benchmark can be run in parts. Each section says itself when and how it was run.

    Raises:
        ValueError: When the file holds another benchmark's report.
    """
    if not path.is_file():
        return report
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if saved.get("benchmark") != report["benchmark"]:
        raise ValueError(f"{path} is no report of {report['benchmark']}; choose another --json")
    sections = {**saved["sections"], **report["sections"]}
    return {**report, "sections": sections}


def finish(report: dict[str, Any], text: str, args: argparse.Namespace) -> None:
    """Save what was asked for, print the tables to standard error and the report as one line."""
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(text, file=sys.stderr)
    print(json.dumps(report))


def run(
    name: str,
    words: Sequence[str] | None,
    *,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    report_text: Callable[[dict[str, Any]], str],
) -> int:
    """Do what a benchmark's command line asks for; return the exit code.

    Args:
        name: The script's, without `.py`.
        words: The command line; None: this process's.
        parse: Reads it.
        measure: Makes the report.
        report_text: Tells it in tables.
    """
    try:
        args = parse(sys.argv[1:] if words is None else words)
        report = measure(args)
        if getattr(args, "add", False) and args.json is not None:
            report = merged(report, args.json)
        finish(report, report_text(report), args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
