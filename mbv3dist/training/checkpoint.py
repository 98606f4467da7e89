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
from safetensors.torch import load_file, save_file

_NAME = re.compile(r"step-(\d{8,})")
_STATE_FILE = "state.json"


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
        save_file(_contiguous(model), folder / "model.safetensors")
        if ema is not None:
            save_file(_contiguous(ema), folder / "ema.safetensors")
        torch.save(optimizer, folder / "optimizer.pt")
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
        state = json.loads((path / _STATE_FILE).read_text())
        for name, facts in state["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
                return f"{name} differs from what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{_STATE_FILE} is unreadable ({error})"
    return None


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
    """Reads a checkpoint onto the CPU; nothing is unpickled beyond tensors and plain values."""
    state = json.loads((path / _STATE_FILE).read_text())
    ema = path / "ema.safetensors"
    return Checkpoint(
        step=state["step"],
        model=load_file(path / "model.safetensors"),
        ema=load_file(ema) if ema.is_file() else None,
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=state,
    )
