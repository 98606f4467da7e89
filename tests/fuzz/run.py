"""Runs mutated inputs in worker processes: a crash or a hang is a finding, not the end.

python -m tests.fuzz.run --inputs 20000 --seed 0 --json FILE
python -m tests.fuzz.run --again .cache/fuzz/finding-0-123.json

The last line of standard output is one JSON object. Every finding's input is kept in --findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from . import harness
from .sandbox import load_compiled_code
from .seeds import Seeds

LIMIT_S = 20.0  # for one input; a hang is run again alone, with twice that
_PACKAGES = ("mbv3dist", "numpy", "pillow", "pyyaml", "defusedxml", "torch", "safetensors")
_KINDS = {  # beginning of a problem -> what it is counted as
    "traceback": "tracebacks",
    "message of a library": "library_messages",
    "hang": "hangs",
    "crash": "crashes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--targets", nargs="+", default=list(harness.TARGETS), metavar="NAME")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for one input")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"), metavar="DIR")
    parser.add_argument("--again", type=Path, nargs="+", metavar="FILE", help="run kept inputs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        _work(json.loads(args.worker))
        return 0
    if args.again:
        return _run_again(args.again, args.limit_s)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mbv3dist-fuzz-", dir=_fast_folder()) as folder:
        lines = _run_workers(args, Path(folder))
    result = _summary(args, lines, time.perf_counter() - started)
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    for problem, count in result["findings_by_problem"].items():
        print(f"{count:6d}  {problem}", file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["findings"] else 0


def _fast_folder() -> str | None:
    """Return a folder in memory if there is one: sandboxes are made and cleared by thousands."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# In the worker


def _work(task: dict[str, Any]) -> None:
    """Run the inputs of a task one after the other, and write a line before and after each."""
    folder = Path(task["folder"])
    names: list[str] = task["targets"]
    cases = [harness.load_case(json.loads(Path(path).read_text())) for path in task["again"]]
    if not all(name.startswith("planted_") for name in names or [case.target for case in cases]):
        load_compiled_code()  # from the cache below the user's own home
    os.environ.update(HOME=str(folder / "box" / "home"), MPLCONFIGDIR=str(folder), COLUMNS="200")
    sys.dont_write_bytecode = True
    os.fsync = lambda handle: None  # type: ignore[assignment]  # power does not fail here
    box, seeds = harness.make_box(folder / "box"), Seeds(folder)
    _warm_up(names or [case.target for case in cases], seeds, box)
    for number, _ in task["lost"]:  # an earlier worker ended in it
        case = harness.make_case(task["seed"], number, seeds, names)
        harness.save_case(case, Path(task["findings"]) / f"finding-{task['seed']}-{number}.json")
    with open(folder / "lines", "ab", buffering=0) as file, open(folder / "stack", "w") as stack:
        for number in task["numbers"]:
            case = cases[number] if cases else harness.make_case(task["seed"], number, seeds, names)
            file.write(json.dumps({"start": number, "target": case.target}).encode() + b"\n")
            faulthandler.dump_traceback_later(task["limit_s"], exit=True, file=stack)
            harness.limit_memory(harness.find_target(case.target).headroom)
            result = harness.run_case(case, box, seeds)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            faulthandler.cancel_dump_traceback_later()
            if result.outcome == "finding" and not cases:
                name = f"finding-{task['seed']}-{number}.json"
                harness.save_case(case, Path(task["findings"]) / name)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            line = {"end": number, "target": case.target, "peak_mib": peak, **asdict(result)}
            file.write(json.dumps(line).encode() + b"\n")


def _warm_up(names: Sequence[str], seeds: Seeds, box: Path) -> None:
    """Run each target once, so that modules are imported before anybody watches."""
    from random import Random

    from .pipelines import load_batches

    if any(harness.find_target(name).is_pipeline for name in names):
        assert seeds.datasets
        for task in seeds.datasets:
            load_batches(seeds.folder / f"data-{task}", "train")
    for name in dict.fromkeys(names):
        if not name.startswith("planted"):
            for number in range(2):
                harness.run_case(harness.find_target(name).make(Random(number), seeds), box, seeds)


# In the process that starts workers


def _run_workers(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run all inputs on several workers; start another where one ended early."""
    args.findings.mkdir(parents=True, exist_ok=True)
    todo = [list(range(job, args.inputs, args.jobs)) for job in range(args.jobs)]
    lost: list[list[tuple[int, str]]] = [[] for _ in todo]
    running: dict[int, subprocess.Popen[bytes]] = {}
    lines: list[dict[str, Any]] = []
    while any(todo) or any(lost) or running:
        for job, numbers in enumerate(todo):
            if job not in running and (numbers or lost[job]):
                task = {
                    "seed": args.seed,
                    "targets": args.targets,
                    "numbers": numbers,
                    "lost": lost[job],
                    "again": [],
                    "limit_s": args.limit_s,
                    "findings": str(args.findings),
                    "folder": str(folder / str(job)),
                }
                lost[job] = []
                running[job] = _start(task)
        time.sleep(0.05)
        for job, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            found, culprit = _read_lines(folder / str(job), process.returncode)
            lines += found
            done = {line["end"] for line in found}
            todo[job] = [number for number in todo[job] if number not in done]
            if culprit is not None:
                todo[job].remove(culprit["end"])
                lost[job] = [(culprit["end"], culprit["problem"])]
                lines.append(culprit)
            elif todo[job]:
                output = (folder / str(job) / "output").read_text(errors="replace")
                raise RuntimeError(f"a worker ended with {process.returncode}: {output[-3000:]}")
    return _confirm_hangs(args, lines)


def _start(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "CUDA_VISIBLE_DEVICES": "",
    }
    words = [sys.executable, "-m", f"{__package__}.run", "--worker", json.dumps(task)]
    root = Path(__file__).resolve().parents[len(str(__package__).split("."))]
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(
            words, env=environment, cwd=root, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _read_lines(folder: Path, code: int) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the results of a worker, and that of the input it ended in, if it did."""
    path = folder / "lines"
    if not path.is_file():
        output = (folder / "output").read_text(errors="replace")
        raise RuntimeError(f"a worker did not start ({code}): {output[-3000:]}")
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    path.unlink()
    found = [line for line in lines if "end" in line]
    if not lines or "end" in lines[-1]:
        return found, None
    stack = (folder / "stack").read_text(errors="replace")
    kind = "hang" if "Timeout" in stack else f"crash: the process ended with {code}"
    place = re.findall(r'File "[^"]*/mbv3dist/([^"]+)", line (\d+)', stack)
    where = f" ({place[0][0]}:{place[0][1]})" if place else ""
    culprit = {
        "end": lines[-1]["start"],
        "target": lines[-1]["target"],
        "outcome": "finding",
        "problem": kind + where,
        "seconds": 0.0,
        "warnings": [],
        "peak_mib": 0,
    }
    return found, culprit


def _confirm_hangs(args: argparse.Namespace, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run what took too long again, alone: on a busy machine it may just have been slow."""
    for line in lines:
        if line["problem"].startswith("hang"):
            path = args.findings / f"finding-{args.seed}-{line['end']}.json"
            again = _again([path], 2 * args.limit_s)[0]
            if not again["problem"].startswith("hang"):
                line.update(again)
                if line["outcome"] != "finding":
                    path.unlink()
    return lines


def _again(paths: Sequence[Path], limit_s: float) -> list[dict[str, Any]]:
    """Run kept inputs, each in a worker of its own."""
    found = []
    for path in paths:
        with tempfile.TemporaryDirectory(prefix="mbv3dist-fuzz-", dir=_fast_folder()) as folder:
            task = {
                "seed": 0,
                "targets": [],
                "numbers": [0],
                "lost": [],
                "again": [str(path.resolve())],
                "limit_s": limit_s,
                "findings": folder,
                "folder": folder,
            }
            process = _start(task)
            lines, culprit = _read_lines(Path(folder), process.wait())
            found += lines or [culprit or {}]
    return found


def _run_again(paths: Sequence[Path], limit_s: float) -> int:
    worst = 0
    for path, line in zip(paths, _again(paths, limit_s), strict=True):
        print(f"{path.name}: {line['target']}: {line['outcome']} {line['problem']}")
        worst = max(worst, line["outcome"] == "finding")
    return int(worst)


def _summary(
    args: argparse.Namespace, lines: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    targets: dict[str, Counter[str]] = defaultdict(Counter)
    slowest: dict[str, float] = defaultdict(float)
    problems: Counter[str] = Counter()
    kinds = Counter(dict.fromkeys(_KINDS.values(), 0))
    warned: Counter[str] = Counter()
    for line in lines:
        target = line["target"]
        targets[target]["inputs"] += 1
        targets[target][line["outcome"]] += 1
        slowest[target] = max(slowest[target], line["seconds"])
        warned.update(_signature(text) for text in line["warnings"])
        if line["outcome"] == "finding":
            problems[f"{target}: {_signature(line['problem'])}"] += 1
            start = next((key for key in _KINDS if line["problem"].startswith(key)), "")
            outside = "outside the output" in line["problem"]
            kinds[_KINDS.get(start) or ("outside" if outside else "others")] += 1
    whole = [name for name in targets if harness.find_target(name).is_pipeline]
    return {
        "what": "mutated inputs through convert, verify, the reader, the loader and all parsers",
        "seed": args.seed,
        "inputs": len(lines),
        "inputs_through_commands": sum(targets[name]["inputs"] for name in whole),
        "inputs_to_parsers": sum(t["inputs"] for n, t in targets.items() if n not in whole),
        "findings": sum(problems.values()),
        **{kind: kinds[kind] for kind in (*_KINDS.values(), "outside", "others")},
        "targets": {
            name: {**dict(targets[name]), "slowest_s": round(slowest[name], 3)}
            for name in sorted(targets)
        },
        "findings_by_problem": dict(problems.most_common()),
        "warnings_of_libraries": dict(warned.most_common(20)),
        "peak_mib": max((line["peak_mib"] for line in lines), default=0),
        "seconds": round(seconds, 1),
        "jobs": args.jobs,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }


def _signature(text: str) -> str:
    """Return a problem without what differs from input to input."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", text)
    text = re.sub(r"(?<![\w.:])[-+]?\d[\d.,e+-]*", "N", text)
    return text[:160]


if __name__ == "__main__":
    sys.exit(main())
