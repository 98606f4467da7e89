"""Tests and benchmarks of a GPU machine that is lent for minutes, without network.

    make gpu-bundle                                             # before, where there is a network
    python3 benchmarks/gpu_session.py install tests nms         # there: steps, in this order
    python3 benchmarks/gpu_session.py --list
    python3 benchmarks/gpu_session.py --rehearse                # anywhere: does each command run?

The machine has PyTorch, torchvision, Accelerate, timm, Numba and pytest, and may be taken away at
any time: each step is a command with a time limit that saves as it goes, and after each step all
that there is goes into one archive (`--pack FILE.tgz`). What a step prints goes to a log; its last
lines are shown. A step that fails does not take the next one with it. Needs the standard library
only, and no `make`. MBV3DIST_COMMIT=HASH says which commit a copy without git's folder is of.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / ".gpu" / "wheels"
SITE = ROOT / ".gpu" / "site"
RESULTS = ROOT / ".gpu" / "results"
GRACE_S = 20  # between asking a step to end and ending it
SHOWN_LINES = 30


@dataclass(frozen=True)
class Step:
    """A command of the session.

    Attributes:
        name: To ask for it, and of its log.
        limit_s: Seconds; then it is interrupted, and what it saved counts.
        words: Of the command line, after Python; RESULTS stands for the results' folder.
        rehearsal: The words on a machine without a GPU; None: nothing to rehearse.
    """

    name: str
    limit_s: int
    words: tuple[str, ...]
    rehearsal: tuple[str, ...] | None = None


def pytest_step(name: str, limit_s: int, marks: str) -> Step:
    """Return a step that runs tests; interrupted, pytest still tells what failed."""
    places = ("tests/gpu", "tests/unit/test_loader.py")
    words = ("-m", "pytest", *places, "-m", marks, "-v", "--tb=short", "--timeout=120")
    return Step(name, limit_s, words, (*words, "--collect-only", "-q"))


def benchmark_step(
    name: str, limit_s: int, script: str, words: str, *, rehearsal: str | None = None
) -> Step:
    """Return a step that runs a benchmark, whose report is RESULTS/SCRIPT.json."""
    command = (f"benchmarks/{script}.py", *words.split())
    saved = ("--json", f"RESULTS/{script}.json", "--markdown", f"RESULTS/{script}.md")
    quick = None
    if rehearsal is not None:
        quick = (f"benchmarks/{script}.py", "--quick", *rehearsal.split(), *saved)
    return Step(name, limit_s, (*command, *saved), quick)


def train_step(name: str, limit_s: int, parts: str, words: str) -> Step:
    """Return a step that adds sections to the report of training steps."""
    shared = f"--parts {parts} --add --rounds 5 --steps 10 --build-limit 90"
    shared += f" --trace RESULTS/trace-{name}.json.gz"
    quick = [part for part in parts.split(",") if part != "layers"] or ["counts"]
    return benchmark_step(
        name,
        limit_s,
        "train_step",
        f"{shared} {words}",
        rehearsal=f"--parts {','.join(quick)} --add --rounds 1",
    )


# Most wanted first: up to `detectors` it should be some 12 minutes, compilers being most of it.
STEPS = (
    Step("install", 60, ("benchmarks/gpu_session.py", "--install")),
    pytest_step("tests", 240, "gpu and not slow"),
    benchmark_step(
        "nms", 90, "nms", "--devices cuda --trace RESULTS/trace-nms.json.gz", rehearsal="--rounds 1"
    ),
    train_step(
        "large",
        360,
        "classifiers",
        "--variants large --classifier-batch 512 --amp bf16,fp16 --compile default --budget 180",
    ),
    train_step("detectors", 240, "detectors,counts", "--amp bf16 --compile default --budget 90"),
    benchmark_step(
        "end_to_end",
        240,
        "end_to_end",
        "--parts small,detector --amp bf16 --rounds 3 --steps 40 --warm 10",
        rehearsal="--rounds 1",
    ),
    train_step("layers", 60, "layers", "--classifier-batch 512 --amp bf16"),
    train_step(
        "small",
        240,
        "classifiers",
        "--variants small --classifier-batch 512 --amp bf16,fp16 --compile default --budget 60",
    ),
    train_step(
        "inference",
        240,
        "inference",
        "--classifier-batch 512 --amp bf16 --compile default --budget 60",
    ),
    benchmark_step("gpu_pixels", 120, "gpu_pixels", ""),
    pytest_step("tests_slow", 420, "gpu and slow"),
    train_step(
        "modes",
        420,
        "classifiers",
        "--classifier-batch 512 --amp bf16 --compile reduce-overhead,max-autotune-no-cudagraphs",
    ),
)


def environment() -> dict[str, str]:
    """Return the environment of steps: absolute paths, since benchmarks start processes."""
    paths = [str(SITE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def install() -> int:
    """Install the bundle's wheels beside what is there, once, and compile what Numba compiles."""
    if not SITE.is_dir():
        wheels = sorted(map(str, BUNDLE.glob("*.whl")))
        if not wheels:
            print(f"no wheels in {BUNDLE}: make gpu-bundle where there is a network")
            return 2
        options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(SITE))
        code = subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels])
        if code.returncode:
            return code.returncode
    probe = (
        "import sys, torch, torchvision, timm, accelerate, numba, numpy, triton\n"
        "print('Python', sys.version.split()[0])\n"
        "for m in (torch, torchvision, timm, accelerate, numba, numpy, triton):\n"
        "    print(m.__name__, m.__version__)\n"
        "print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')\n"
        "import mbv3dist.data.pixels, mbv3dist.training.run\n"
    )
    return subprocess.run([sys.executable, "-c", probe], env=environment()).returncode


def run_step(step: Step, words: Sequence[str], results: Path) -> str:
    """Run a step; return how it ended, in words."""
    log = results / f"{step.name}.log"
    command = [sys.executable, *(word.replace("RESULTS", str(results)) for word in words)]
    started = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own processes end with it
        )
        late = ""
        for sign in (signal.SIGINT, signal.SIGKILL):
            try:
                code = process.wait(GRACE_S if late else step.limit_s)
                break
            except subprocess.TimeoutExpired:
                late = f", after its {step.limit_s} s"
                os.killpg(process.pid, sign)
        else:
            code = process.wait()
    took = time.monotonic() - started
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1] != "{"]
    print("\n".join(line[:200] for line in lines[-SHOWN_LINES:]), flush=True)
    return f"exit code {code}{late}, {took:.0f} s"


def pack(results: Path, archive: Path) -> None:
    """Put all results into one archive, which replaces the last one whole."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(archive.name + ".part")
    with tarfile.open(unfinished, "w:gz") as file:
        file.add(results, arcname="results")
    unfinished.replace(archive)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For a step that there is not.
    """
    parser = argparse.ArgumentParser(description="Steps on a lent GPU machine.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="in this order; see --list")
    parser.add_argument("--list", action="store_true", help="name the steps and their time")
    parser.add_argument("--rehearse", action="store_true", help="each as small as it gets, on CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--pack", type=Path, metavar="FILE.tgz", help="all results, at each step")
    parser.add_argument("--install", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    known = {step.name: step for step in STEPS}
    if unknown := [name for name in args.steps if name not in known]:
        raise ValueError(f"no step {unknown[0]!r}; there are {', '.join(known)}")
    if not args.steps and not (args.list or args.install or args.rehearse):
        raise ValueError(f"name steps: {', '.join(known)}; or --rehearse")
    chosen = [known[name] for name in args.steps] or list(STEPS)
    args.steps = [step for step in chosen if not args.rehearse or step.rehearsal is not None]
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Do the steps; return 0 if all ended well, 1 if one did not."""
    try:
        args = parse(sys.argv[1:] if words is None else words)
    except ValueError as error:
        print(f"gpu_session: {error}", file=sys.stderr)
        return 2
    if args.install:
        return install()
    if args.list:
        for step in args.steps:
            print(f"{step.name:12} {step.limit_s:4} s  python {' '.join(step.words)}")
        return 0
    results = args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    ends = {}
    for step in args.steps:
        print(f"== {step.name}", flush=True)
        chosen = step.rehearsal if args.rehearse else step.words
        ends[step.name] = run_step(step, chosen or (), results)
        print(f"== {step.name}: {ends[step.name]}", flush=True)
        if args.pack is not None:
            pack(results, args.pack)
    print("\n".join(f"{name}: {end}" for name, end in ends.items()))
    return int(not all(end.startswith("exit code 0,") for end in ends.values()))


if __name__ == "__main__":
    sys.exit(main())
