"""Makes an input from (seed, number), runs it in a sandbox and says what came of it."""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from .pipelines import PIPELINES, place_special
from .planted import PLANTED
from .sandbox import Finding, Target, error_problem, list_tree, watched
from .seeds import Case, Seeds, write_files
from .targets import PARSERS
from .targets_models import MODELS

TARGETS: dict[str, Target] = {**PARSERS, **MODELS, **PIPELINES}


@dataclass(frozen=True)
class Result:
    """What came of an input.

    Attributes:
        outcome: ``accepted``, ``refused`` or ``finding``.
        problem: What is wrong, for a finding.
        seconds: How long it took.
        warnings: Libraries' warnings.
    """

    outcome: str
    problem: str
    seconds: float
    warnings: tuple[str, ...]


def make_case(seed: int, number: int, seeds: Seeds, names: list[str]) -> Case:
    """Make input `number` of a run; the same for the same seed and targets."""
    rng = Random(f"{seed}:{number}")
    weights = [find_target(name).weight for name in names]
    name = rng.choices(names, weights)[0]
    return find_target(name).make(rng, seeds)


def find_target(name: str) -> Target:
    """Return a target by its name."""
    return TARGETS[name] if name in TARGETS else PLANTED[name]


def make_box(folder: Path) -> Path:
    """Make a sandbox: ``in`` for inputs, ``out`` for output, ``cwd`` to stand in, ``home``."""
    for name in ("in", "out", "cwd", "home"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def run_case(case: Case, box: Path, seeds: Seeds) -> Result:
    """Run an input in a sandbox and judge it."""
    target = find_target(case.target)
    if target.on_disk:
        write_files(box / "in", case.files)
        place_special(box / "in", case.options.get("special", []))
    before = _trees(box) if target.on_disk else None
    outcome, problem = "refused", ""
    old, os.environ["MBV3DIST_TRACEBACK"] = os.environ.get("MBV3DIST_TRACEBACK"), "1"
    folder = os.getcwd()
    os.chdir(box / "cwd")
    started = time.perf_counter()
    try:
        with watched(box) as watch:
            try:
                outcome = "accepted" if target.run(case, box, seeds) else "refused"
            except Finding as error:
                problem = str(error)
            except Exception as error:
                problem = error_problem(error)
            except SystemExit as error:
                problem = f"ends the process with {error.code}"
    finally:
        seconds = time.perf_counter() - started
        os.chdir(folder)
        if old is None:
            del os.environ["MBV3DIST_TRACEBACK"]
        else:
            os.environ["MBV3DIST_TRACEBACK"] = old
    problem = problem or "; ".join(watch.problems[:3])
    if before is not None and not problem and _trees(box) != before:
        problem = f"files outside the output were changed: {_changes(before, _trees(box))}"
    shutil.rmtree(box / "out")
    (box / "out").mkdir()
    outcome = "finding" if problem else outcome
    return Result(outcome, problem, seconds, tuple(watch.warnings[:5]))


def _trees(box: Path) -> dict[str, tuple[int, int]]:
    return {**list_tree(box / "in"), **list_tree(box / "cwd"), **list_tree(box / "home")}


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(sorted(names)[:5])


def limit_memory(headroom: int) -> None:
    """Let this process take that much more address space than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + headroom
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def dump_case(case: Case) -> dict[str, Any]:
    """Return an input as JSON can hold it."""
    files = {
        name: base64.b64encode(zlib.compress(data, 9)).decode("ascii")
        for name, data in case.files.items()
    }
    return {"target": case.target, "files": files, "options": case.options}


def load_case(value: dict[str, Any]) -> Case:
    """Return what `dump_case` was given."""
    files = {name: zlib.decompress(base64.b64decode(text)) for name, text in value["files"].items()}
    return Case(value["target"], files, value["options"])


def save_case(case: Case, path: Path) -> None:
    """Write an input to a file, for `python -m tests.fuzz.run --again FILE`."""
    path.write_text(json.dumps(dump_case(case)))
