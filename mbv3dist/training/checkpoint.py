"""Checkpoints that are whole or absent.

`RUN/checkpoints/step-00001234/` holds model.safetensors, optimizer.pt, state.json and, with a
moving average, ema.safetensors. It is written into a hidden folder, flushed to disk and renamed, so
a name that exists is complete; state.json also carries every file's size and SHA-256, so that
damage that came later is noticed and the checkpoint before is taken. Nothing in it depends on the
number of ranks.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mbv3dist.messages import one_line, shown
from mbv3dist.models.description import parse_json
from mbv3dist.models.pickles import load_pickle

_NAME = re.compile(r"step-(\d{8,})")
_STATE_FILE = "state.json"
_MODEL_FILE, _EMA_FILE, _OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.pt"
_MAX_STATE_BYTES = 256 * 1024 * 1024  # with a list of damaged samples it may be large
# What goes on from `state.json` besides the step, and of which type it is.
_STATE_TYPES: dict[str, type | tuple[type, ...]] = {
    "identity": dict,
    "data": dict,
    "damaged": dict,
    "best_score": (int, float),
    "evals_without_gain": int,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; tensors on the CPU."""

    step: int
    model: dict[str, torch.Tensor]
    ema: dict[str, torch.Tensor] | None
    optimizer: dict[str, Any]
    state: dict[str, Any]


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    ema: dict[str, torch.Tensor] | None = None,
    keep_last: int = 2,
) -> Path:
    """Writes one checkpoint atomically and removes all but the last `keep_last`.

    Args:
        run_dir: the run's folder.
        step: optimiser steps done.
        model: state dict of the bare model.
        optimizer: the optimiser's state dict, with the scaler's if there is one.
        state: JSON-able rest: plan, best score, configuration.
        ema: state dict of the moving average.
        keep_last: how many checkpoints stay.

    Raises:
        OSError: the disk is full or not writable; checkpoints written before are untouched.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    temporary.mkdir()
    try:
        _write_files(temporary, step, model=model, optimizer=optimizer, state=state, ema=ema)
        if final.exists():  # the same step again after a resume: the old one is as good
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); free some space and go on with "
            "--resume auto"
        ) from None
    _sync_folder(folder)
    for old in list_checkpoints(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return final


def _write_files(
    folder: Path,
    step: int,
    *,
    model: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
    state: dict[str, Any],
    ema: dict[str, torch.Tensor] | None,
) -> None:
    try:
        save_file(_contiguous(model), folder / _MODEL_FILE)
        if ema is not None:
            save_file(_contiguous(ema), folder / _EMA_FILE)
        torch.save(optimizer, folder / _OPTIMIZER_FILE)
    except OSError:
        raise
    except Exception as error:  # both libraries report a full disk as errors of their own
        raise OSError(str(error)) from error
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    text = json.dumps({"step": step, "files": files, **state}, indent=2)
    (folder / _STATE_FILE).write_text(text + "\n")
    for path in folder.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    _sync_folder(folder)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = _read_state(path)["files"]
        for name in (_MODEL_FILE, _OPTIMIZER_FILE):
            if name not in files:
                return f"{name} is missing"
        for name, facts in files.items():
            if name not in (_MODEL_FILE, _EMA_FILE, _OPTIMIZER_FILE):
                return f"{_STATE_FILE} names {shown(name)}, which is no file of a checkpoint"
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
                return f"{name} differs from what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_STATE_FILE} is unreadable ({one_line(str(error))})"
    return None


def _read_state(path: Path) -> dict[str, Any]:
    with (path / _STATE_FILE).open("rb") as file:
        text = file.read(_MAX_STATE_BYTES + 1)
    state = parse_json(text) if len(text) <= _MAX_STATE_BYTES else None
    if not isinstance(state, dict):
        raise ValueError("not an object")
    return state


def find_checkpoint(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(run_dir)):
        problem = damage(path)
        if problem is None:
            return path, complaints
        complaints.append(f"{path}: {problem}; trying the one before")
    return None, complaints


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; nothing is unpickled beyond tensors and plain values.

    Raises:
        ValueError: if a file is damaged, or holds anything else than `save_checkpoint` writes.
        OSError: if a file cannot be read.
    """
    name = _STATE_FILE
    try:
        state = _read_state(path)
        _check_state(state, step=int(path.name.rpartition("-")[2]))
        name = _MODEL_FILE
        model = load_file(path / name)
        name = _EMA_FILE
        ema = load_file(path / name) if (path / name).is_file() else None
        name = _OPTIMIZER_FILE
        optimizer = load_pickle(path / name)
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("optimizer"), dict):
            raise ValueError("it holds no state of an optimiser")
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path / name} is damaged or holds more than tensors and plain values, which is all "
            f"that is read (weights_only): {_reason(error)}; remove {path.name} to go on from "
            "the checkpoint before"
        ) from None
    return Checkpoint(step=state["step"], model=model, ema=ema, optimizer=optimizer, state=state)


def _check_state(state: dict[str, Any], *, step: int) -> None:
    """Refuse a `state.json` that nothing could go on from; an older version's lacks `data`."""
    if type(state.get("step")) is not int or state["step"] != step:
        raise ValueError(f"step is {shown(state.get('step'))} in the checkpoint of step {step}")
    for name, kind in _STATE_TYPES.items():
        value = state.get(name)
        if "data" in state and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"{name} is {shown(value)}")
    if "data" not in state:
        return
    if state["data"].get("step") != step:
        raise ValueError(f"its data are at step {shown(state['data'].get('step'))}, not {step}")
    for index, reason in state["damaged"].items():
        if not (index.isascii() and index.isdigit() and len(index) < 19):
            raise ValueError(f"damaged sample {shown(index)}")
        if not isinstance(reason, str):
            raise ValueError(f"reason of damage {shown(reason)}")


def restore(
    checkpoint: Checkpoint,
    path: Path,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Any,
    scaler: Any = None,
) -> None:
    """Puts a checkpoint's weights and the optimiser's memory in place; its rates stay as they are.

    Args:
        checkpoint: what `load_checkpoint` read.
        path: where from, for messages.
        model: the bare model.
        ema: its moving average, if there is one.
        optimizer: the optimiser, prepared or not.
        scaler: fp16's gradient scaler, if there is one.

    Raises:
        ValueError: if the checkpoint is of another model or optimiser.
    """
    # Rates and decay are the recipe's of today; momentum buffers come from the checkpoint.
    recipe = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        model.load_state_dict(checkpoint.model)
        if ema is not None and checkpoint.ema is not None:
            ema.load_state_dict(checkpoint.ema)
        optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
        if scaler is not None and "scaler" in checkpoint.optimizer:
            scaler.load_state_dict(checkpoint.optimizer["scaler"])
        for group, values in zip(optimizer.param_groups, recipe, strict=True):
            group.update(values)
        _check_memory(optimizer)
    except Exception as error:  # torch has no one error for a state that does not fit
        raise ValueError(
            f"{path} does not fit this run's model and optimiser: {_reason(error)}; start "
            "another run with --name"
        ) from None


def _check_memory(optimizer: Any) -> None:
    """Refuse buffers of another shape than their weight; a step would end in torch's own words."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                fits = isinstance(value, int | float) or value is None
                if isinstance(value, torch.Tensor):
                    fits = (
                        value.shape in (weight.shape, torch.Size([]))
                        and value.dtype.is_floating_point
                    )
                if not fits:
                    raise ValueError(f"{shown(name)} of a weight of shape {tuple(weight.shape)}")


def _reason(error: Exception) -> str:
    """The first line with something to say, printable and bounded."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in") else "".join(lines[:1])
    return one_line(text) or type(error).__name__
