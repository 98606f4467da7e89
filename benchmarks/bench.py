"""Run what this machine can of all benchmarks, shortened to some 20 minutes on two cores.

    python benchmarks/bench.py --out DIR            # `make bench`
    python benchmarks/bench.py --only nms,loader
    python benchmarks/bench.py --quick              # each as short as it gets: a smoke test

Each is a command of its own, whose report stands in DIR as NAME.json and NAME.md with the command
that made it; one that fails is told at the end, with the exit code 1, and the others go on. On a
machine with a GPU those come first that need one. Peers that are not installed (`make bench-peers`)
are left out, and each report says so. The figures of results/ come from the benchmarks' own
defaults, with more rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from machine import ROOT

TIME_LIMIT_S = 590.0  # of one benchmark
DEFAULT_OUT = ROOT / ".cache" / "bench"


@dataclass(frozen=True)
class Benchmark:
    """A command of the run.

    Attributes:
        name: Of the report.
        script: In this folder.
        words: Its words on two cores; None: it needs a GPU.
        gpu_words: Its words on a GPU; None: it has nothing to do there.
    """

    name: str
    script: str
    words: tuple[str, ...] | None
    gpu_words: tuple[str, ...] | None = None


BENCHMARKS = (
    Benchmark("train_step", "train_step", ("--rounds", "5"), ()),
    Benchmark("nms", "nms", ("--rounds", "5"), ("--devices", "cuda")),
    Benchmark(
        "end_to_end",
        "end_to_end",
        ("--rounds", "2", "--steps", "8", "--warm", "2"),
        ("--amp", "bf16"),
    ),
    Benchmark("gpu_pixels", "gpu_pixels", None, ()),
    Benchmark("scaling", "scaling", ("--rounds", "5"), ()),
    Benchmark(
        "loader",
        "loader",
        ("--rounds", "2", "--seconds", "0.5", "--samples", "640", "--sizes", "originals"),
    ),
    Benchmark(
        "decode",
        "decode",
        ("--rounds", "3", "--samples", "1024", "--pictures", "256", "--sizes", "originals"),
    ),
    Benchmark("convert", "convert", ("--rounds", "3", "--copy-mb", "200", "--resizes", "500")),
    Benchmark("streaming_guarantees", "streaming_guarantees", ("--quick",)),
    Benchmark("resume", "resume", ("--quick",)),
    Benchmark("parity", "parity", ("--quick",)),
    Benchmark("latency", "latency", ("--rounds", "5")),
)


def has_gpu() -> bool:
    """Whether torch finds a GPU; asked in a process of its own, which then lets go of it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def chosen(args: argparse.Namespace, *, gpu: bool) -> list[tuple[str, list[str]]]:
    """What to run, in order: name of the report and command.

    Raises:
        ValueError: For a name that is none.
    """
    names = args.only.split(",") if args.only else [item.name for item in BENCHMARKS]
    if unknown := sorted(set(names) - {item.name for item in BENCHMARKS}):
        every = ", ".join(item.name for item in BENCHMARKS)
        raise ValueError(f"no benchmark {unknown[0]!r}; --only takes {every}")
    on_gpu, on_cpu = [], []
    for item in BENCHMARKS:
        if item.name not in names:
            continue
        if gpu and item.gpu_words is not None:
            on_gpu.append(_command(item, item.gpu_words, args))
        elif item.words is not None:
            on_cpu.append(_command(item, item.words, args))
        elif args.only:
            raise ValueError(f"--only {item.name}: it needs a GPU, and torch finds none here")
    return [*on_gpu, *on_cpu]


def _command(
    item: Benchmark, words: Sequence[str], args: argparse.Namespace
) -> tuple[str, list[str]]:
    words = ["--quick"] if args.quick else list(words)
    saved = ["--json", f"{args.out / item.name}.json", "--markdown", f"{args.out / item.name}.md"]
    return item.name, [sys.executable, str(ROOT / f"benchmarks/{item.script}.py"), *words, *saved]


def run_one(name: str, command: Sequence[str], log: Path) -> str | None:
    """Run a benchmark; return why it has no report, if it has none."""
    print(f"bench: {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=file, cwd=ROOT, timeout=TIME_LIMIT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return f"took more than {TIME_LIMIT_S:.0f} s"
    print(f"bench: {name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["nothing said"]
        return f"exit code {code}: {lines[-1][:300]}"
    return None


def main(words: Sequence[str] | None = None) -> int:
    """Run them and tell what came out; return the exit code."""
    parser = argparse.ArgumentParser(description="All benchmarks, shortened.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="for reports")
    parser.add_argument("--only", metavar="NAMES", help="of these, with commas")
    parser.add_argument("--quick", action="store_true", help="each as short as it gets")
    args = parser.parse_args(sys.argv[1:] if words is None else words)
    args.out = args.out.resolve()
    try:
        commands = chosen(args, gpu=has_gpu())
        args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if not harness.PEERS_PYTHON.is_file():
        print("bench: without the peers of `make bench-peers`", file=sys.stderr)
    failed = {}
    for name, command in commands:
        for suffix in ("json", "md"):
            (args.out / f"{name}.{suffix}").unlink(missing_ok=True)
        reason = run_one(name, command, args.out / f"{name}.log")
        if reason is not None:
            failed[name] = reason
            print(f"bench: {name} failed: {reason}", file=sys.stderr)
    for name, _ in commands:
        if name not in failed:
            print((args.out / f"{name}.md").read_text(encoding="utf-8"))
    print(f"bench: {len(commands) - len(failed)} reports in {args.out}", file=sys.stderr)
    for name, reason in failed.items():
        print(f"bench: {name}: {reason}; see {args.out / name}.log", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
