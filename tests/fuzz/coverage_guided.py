"""Lets atheris (libFuzzer) search the parsers in pure Python, guided by the code that inputs reach.

pip install atheris, then
python -m tests.fuzz.coverage_guided --runs 200000 --seconds 60 --json FILE

Each target runs in a process of its own, because libFuzzer ends its process. An input that is
neither accepted nor refused as `sandbox.error_problem` says stops the target and is kept. Besides
executions, the share of the parser's lines that the inputs reached is reported.
"""

from __future__ import annotations

import argparse
import dis
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from . import harness
from .mutate import mutate
from .sandbox import Finding, error_problem
from .seeds import FLAGS, RECIPES, URLS, Case, Seeds, write_files
from .targets import TARGETS

# Target -> (kind of its mutator, modules whose code guides and is measured, functions of these
# that inputs do not lead to: they write, or serve others)
GUIDED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "xml": ("xml", ("mbv3dist.convert.voc_xml",), ("half_open",)),
    "idx": ("idx", ("mbv3dist.data.idx",), ("read_idx", "__len__")),
    "target": ("json", ("mbv3dist.data.target",), ()),
    "split": ("json", ("mbv3dist.data.manifest",), ("write_manifest", "read_manifest")),
    "url": ("lines", ("mbv3dist.data.urls",), ("default_cache_dir",)),
    "recipe": ("yaml", ("mbv3dist.recipe",), ("config_help", "walk", "_parse_overrides", "_merge")),
    "flags": ("lines", ("mbv3dist.recipe",), ("config_help", "walk")),
    "spec": ("json", ("mbv3dist.models.description",), ("check_size",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="tests.fuzz.coverage_guided")
    parser.add_argument("--targets", nargs="+", default=list(GUIDED), choices=list(GUIDED))
    parser.add_argument("--runs", type=int, default=20_000, help="executions per target, at most")
    parser.add_argument("--seconds", type=int, default=30, help="per target, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"), metavar="DIR")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        name, folder = args.worker
        _search(name, Path(folder), args.runs, args.seconds, args.seed)
        return 0
    started = time.perf_counter()
    found = {name: _run_target(name, args) for name in args.targets}
    result = {
        "what": "coverage-guided fuzzing (atheris) of the parsers in pure Python",
        "executions": sum(item["executions"] for item in found.values()),
        "findings": sum(bool(item["finding"]) for item in found.values()),
        "targets": found,
        "seed": args.seed,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("atheris", "mbv3dist", "pyyaml")},
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 1 if result["findings"] else 0


def _run_target(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Search one target in a process of its own, then measure what its inputs reach."""
    args.findings.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mbv3dist-fuzz-") as folder:
        words = [sys.executable, "-m", f"{__package__}.coverage_guided", "--worker", name, folder]
        words += ["--runs", str(args.runs), "--seconds", str(args.seconds)]
        root = Path(__file__).resolve().parents[len(str(__package__).split("."))]
        done = subprocess.run(
            [*words, "--seed", str(args.seed)],
            cwd=root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        finding = Path(folder) / "finding.json"
        problem = ""
        if finding.is_file():
            kept = args.findings / f"guided-{name}-{args.seed}.json"
            kept.write_bytes(finding.read_bytes())
            problem = json.loads(kept.read_text())["problem"]
        progress = re.findall(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+)", done.stderr)
        if not progress or (done.returncode and not problem):
            raise RuntimeError(f"atheris ended with {done.returncode}: {done.stderr[-2000:]}")
        seconds = re.search(r"in (\d+) second", done.stderr)
        corpus = [path.read_bytes() for path in sorted((Path(folder) / "corpus").iterdir())]
    number = re.search(r"Done (\d+) runs", done.stderr)
    return {
        "executions": int(number[1] if number else progress[-1][0]),
        "seconds": int(seconds[1]) if seconds else None,
        "edges": int(progress[-1][1]),
        "features": int(progress[-1][2]),
        "corpus": len(corpus),
        "lines": _measure(name, corpus),
        "finding": problem,
    }


# In the process of a target


def _prepare(name: str, folder: Path) -> tuple[Callable[[bytes], Case], list[bytes]]:
    """Return what makes an input of bytes, and the valid bytes to start from."""
    seeds = _seeds(folder)
    files = seeds.datasets["detection"] if name in ("idx", "split") else {}
    if name == "split":
        rest = {"train/keep": b""}
        return (
            lambda data: Case("split", {"train.json": data, **rest}, {}),
            [files["train.json"]],
        )
    if name in ("recipe", "flags"):
        if name == "recipe":
            return (
                lambda data: Case("recipe", {"recipe.yaml": data}, {}),
                [text.encode() for text in RECIPES],
            )
        recipe = {"recipe.yaml": RECIPES[0].encode()}
        return (lambda data: Case("flags", recipe, {"flags": _words(data)}), list(FLAGS))
    if name == "target":
        return _target_case, [*TARGETS, b"7"]
    valid = {
        "xml": lambda: seeds.annotations,
        "idx": lambda: [body for key, body in files.items() if key.endswith(".idx")],
        "url": lambda: list(URLS),
        "spec": lambda: [model["model.json"] for model in seeds.models],
    }[name]()
    return (lambda data: Case(name, {"input": data}, {}), valid)


def _target_case(data: bytes) -> Case:
    task = "detection" if data[:1] in (b"{", b"[") else "classification"
    return Case("target", {"input": data}, {"task": task})


def _words(data: bytes) -> list[str]:
    return data.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")


def _seeds(folder: Path) -> Seeds:
    (folder / "seeds").mkdir(parents=True, exist_ok=True)
    return Seeds(folder / "seeds")


def _search(name: str, folder: Path, runs: int, seconds: int, seed: int) -> None:
    """Search until the limits or the first finding; never returns."""
    import atheris  # type: ignore[import-untyped]

    kind, modules, _ = GUIDED[name]
    with atheris.instrument_imports(include=list(modules)):
        for module in modules:
            importlib.import_module(module)
    make, valid = _prepare(name, folder)
    box, world = harness.make_box(folder / "box"), _seeds(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(valid):
        (corpus / f"seed-{number}").write_bytes(data)

    def test_one(data: bytes) -> None:
        case = make(data)
        problem = _judge(case, box, world)
        if problem:
            kept = {**harness.dump_case(case), "problem": problem}
            (folder / "finding.json").write_text(json.dumps(kept))
            raise AssertionError(problem)

    def change(data: bytes, limit: int, number: int) -> bytes:
        rng = Random(number)
        if rng.random() < 0.5:
            mutated: bytes = atheris.Mutate(data, limit)
            return mutated
        return mutate(rng, kind, [data, *valid])[:limit]

    words = [sys.argv[0], str(corpus), f"-runs={runs}", f"-max_total_time={seconds}"]
    words += [f"-seed={seed}", "-max_len=20000", "-timeout=20", f"-artifact_prefix={folder}/"]
    atheris.Setup(words, test_one, custom_mutator=change)
    atheris.Fuzz()


def _judge(case: Case, box: Path, seeds: Seeds) -> str:
    """Run an input without watching files, which takes longer than these parsers do."""
    target = harness.find_target(case.target)
    if target.on_disk:
        write_files(box / "in", case.files)
    try:
        target.run(case, box, seeds)
    except Finding as error:
        return str(error)
    except Exception as error:
        return error_problem(error)
    return ""


# Lines


def _measure(name: str, corpus: Iterable[bytes]) -> dict[str, str]:
    """Return for each module how many of the lines that a parser has were reached."""
    _, modules, apart = GUIDED[name]
    wanted: dict[str, set[int]] = {}
    for module in modules:
        file = str(importlib.import_module(module).__file__)
        source = Path(file).read_text(encoding="utf-8")
        wanted[file] = set(_lines(compile(source, file, "exec"), apart, top=True))
    reached: dict[str, set[int]] = {file: set() for file in wanted}

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        lines = reached.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return trace

    with tempfile.TemporaryDirectory(prefix="mbv3dist-fuzz-") as folder:
        make, _ = _prepare(name, Path(folder))
        box, world = harness.make_box(Path(folder) / "box"), _seeds(Path(folder))
        for data in corpus:
            case = make(data)
            sys.settrace(trace)
            try:
                _judge(case, box, world)
            finally:
                sys.settrace(None)
    return {
        os.path.basename(file): f"{len(lines & reached[file])} of {len(lines)}"
        for file, lines in wanted.items()
    }


def _lines(code: CodeType, apart: Sequence[str], *, top: bool = False) -> Iterable[int]:
    """Yield the lines of all functions in a module's code, but not of those set apart."""
    if code.co_name in apart:
        return
    if not top and code.co_name not in _CLASS_BODIES:
        first = code.co_firstlineno
        yield from {line for _, line in dis.findlinestarts(code) if line and line != first}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant, apart)


_CLASS_BODIES = (
    *("Target", "Table", "Annotation", "VocObject", "AnnotationError", "_BoundedBuilder", "_Text"),
    *("_StrictLoader", "ShardIndex", "DamagedShardError"),
)

if __name__ == "__main__":
    sys.exit(main())
