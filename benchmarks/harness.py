"""What the benchmarks share: interleaved rounds, medians with their spread, and the report.

A figure is a median over rounds. Rounds are interleaved (A B C, A B C, ...), so that whatever
else the machine does meets every system alike, and two systems are compared by ratios of figures
of the same run, with a bootstrap interval over its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))
from machine import ROOT, commit, machine  # noqa: E402
from options import output_file  # noqa: E402

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
RESAMPLES = 4000
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


def parser(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a command line with what every benchmark takes."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--quick", action="store_true", help="a short run on pictures it makes")
    result.add_argument("--json", type=output_file, metavar="FILE", help="save the report")
    result.add_argument("--markdown", type=output_file, metavar="FILE", help="save the tables")
    result.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    result.add_argument(
        "--quiet",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="measure again what others took more than this share of the cores from; default 1",
    )
    result.add_argument(
        "--wandb", metavar="PROJECT", help="log the figures to this project of Weights & Biases"
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
    """Print the tables to standard error and the report as one line; save what was asked for.

    Raises:
        RuntimeError: W&B was asked for and cannot start; the report has been saved before.
    """
    print(text, file=sys.stderr)
    print(json.dumps(report), flush=True)  # there even if the disk is full
    if args.markdown is not None:
        args.markdown.write_text(text, encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if getattr(args, "wandb", None):
        log_to_wandb(report, text, project=args.wandb)


def log_to_wandb(report: Mapping[str, Any], text: str, *, project: str) -> None:
    """Log a report as a run: its figures as the summary, the rest as the configuration.

    `WANDB_MODE=offline` needs no account.

    Raises:
        RuntimeError: It is not installed, or refuses.
    """
    try:
        import wandb
    except ImportError:
        raise RuntimeError("--wandb needs the package wandb: pip install wandb") from None
    figures = dict(flat_figures(report))
    about = {key: report[key] for key in ("command", "machine", "commit") if key in report}
    try:
        with wandb.init(
            project=project, name=report["benchmark"], job_type="benchmark", config=about
        ) as run:
            run.summary.update({**figures, "report": text})
    except wandb.Error as error:
        raise RuntimeError(f"--wandb: {str(error).splitlines()[0]}") from None


def flat_figures(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Return the numbers of a report, but not those of single rounds, by their place in it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key not in ("machine", "rounds"):
                yield from flat_figures(value, f"{path}/{key}" if path else str(key))
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield path, tree


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
