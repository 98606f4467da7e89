"""Targets for models and checkpoints: descriptions, weights, pickles, the state to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from .mutate import mutate
from .mutate_markup import edit_tree
from .sandbox import Target, check_text, require
from .seeds import Case, Seeds


def make_spec(rng: Random, seeds: Seeds) -> Case:
    """Mutate a `model.json`."""
    files = [model["model.json"] for model in seeds.models]
    return Case("spec", {"input": mutate(rng, "json", files)}, {})


def run_spec(case: Case, box: Path, seeds: Seeds) -> bool:
    """Parse a model's description; its values must be of the types that others rely on."""
    from mbv3dist.models.directory import spec_from_json

    check_fields(spec_from_json(case.files["input"], source="model.json"))
    return True


def check_fields(value: Any, where: str = "spec") -> None:
    """Report fields of a dataclass whose values are not of the type of their defaults."""
    numbers = ("width", "dropout", "bn_eps", "score", "nms")
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), f"{where}.{field.name}"
        if dataclasses.is_dataclass(item):
            check_fields(item, name)
        elif field.name in numbers:
            ok = isinstance(item, int | float) and not isinstance(item, bool)
            require(ok and abs(item) < 1e12, f"{name} is {item!r:.100}")
        elif field.type in ("int", "bool", "str"):
            ok = type(item).__name__ == field.type
            require(ok, f"{name} is {item!r:.100}")
        elif str(field.type).startswith("tuple"):
            kind: type | tuple[type, ...] = str if field.name == "classes" else (int, float)
            ok = isinstance(item, tuple) and all(isinstance(entry, kind) for entry in item)
            require(ok, f"{name} is {item!r:.100}")


def make_model(rng: Random, seeds: Seeds) -> Case:
    """Mutate a model directory."""
    files = dict(rng.choice(seeds.models))
    if rng.random() < 0.5:
        files["model.json"] = mutate(rng, "json", [files["model.json"]])
    else:
        weights = files["model.safetensors"]
        files["model.safetensors"] = mutate(rng, "safetensors", [weights])
    return Case("model", files, {})


def run_model(case: Case, box: Path, seeds: Seeds) -> bool:
    """Load a model directory."""
    from mbv3dist.models.directory import load_model

    check_fields(load_model(box / "in").spec)
    return True


def make_weights(rng: Random, seeds: Seeds) -> Case:
    """Mutate a file of weights."""
    if rng.random() < 0.3:
        data = mutate(rng, "safetensors", seeds.safetensors)
        return Case("weights", {"w.safetensors": data}, {})
    return Case("weights", {"w.pth": mutate(rng, "pth", seeds.pickles)}, {})


def run_weights(case: Case, box: Path, seeds: Seeds) -> bool:
    """Read a file of weights."""
    from torch import Tensor

    from mbv3dist.models.weights import read_state

    state = read_state(box / "in" / next(iter(case.files)))
    for name, value in state.items():
        require(isinstance(name, str) and isinstance(value, Tensor), f"{name!r:.100}")
    return True


def make_checkpoint(rng: Random, seeds: Seeds) -> Case:
    """Mutate a checkpoint; mostly its checksums are made right again."""
    files = dict(seeds.checkpoint)
    kind = rng.choice(("state", "state", "state", "optimizer", "optimizer", "weights"))
    if kind == "state":
        files["state.json"] = mutate(rng, "json", [files["state.json"]])
    else:
        name = "optimizer.pt" if kind == "optimizer" else rng.choice(("model", "ema"))
        name = name if name in files else f"{name}.safetensors"
        files[name] = mutate(rng, "pth" if kind == "optimizer" else "safetensors", [files[name]])
        if rng.random() < 0.8:
            state = json.loads(files["state.json"])
            facts = {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
            state["files"][name] = facts
            files["state.json"] = json.dumps(state).encode()
            if rng.random() < 0.1:
                files["state.json"] = edit_tree(rng, files["state.json"])
    folder = "run/checkpoints/step-00000002"
    return Case("checkpoint", {f"{folder}/{name}": data for name, data in files.items()}, {})


def run_checkpoint(case: Case, box: Path, seeds: Seeds) -> bool:
    """Go on from a checkpoint, as `train --resume auto` does."""
    from mbv3dist.training.setup import _resume

    run = seeds.run
    run.config = dataclasses.replace(run.config, out=str(box / "in"), name="run")
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            _resume(run)
    finally:
        for line in said.getvalue().splitlines():
            check_text(line)
    require(isinstance(run.start_step, int) and isinstance(run.best_score, int | float), "types")
    require(isinstance(run.evals_without_gain, int), "evals_without_gain")
    return True


def make_state(rng: Random, seeds: Seeds) -> Case:
    """Mutate the loader's state."""
    return Case("state", {"input": mutate(rng, "json", [seeds.data_state])}, {})


def run_state(case: Case, box: Path, seeds: Seeds) -> bool:
    """Find the step to go on from."""
    from mbv3dist.data.state import resume_step

    try:
        state = json.loads(case.files["input"])
    except (ValueError, RecursionError):
        return False  # whoever reads the file meets that
    step, warnings = resume_step(state, seeds.run.train_split, seeds.run.plan)
    require(type(step) is int and not warnings, "step")
    return True


MODELS: dict[str, Target] = {
    "spec": Target(make_spec, run_spec, 0.7),
    "model": Target(make_model, run_model, 0.3, on_disk=True),
    "weights": Target(make_weights, run_weights, 0.6, on_disk=True),
    "checkpoint": Target(make_checkpoint, run_checkpoint, 0.4, on_disk=True),
    "state": Target(make_state, run_state, 0.3),
}
