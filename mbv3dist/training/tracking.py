"""Where the numbers of a run go: the console, metrics.jsonl, and W&B through Accelerate.

Only rank 0 writes. After a resume, records beyond the checkpoint are dropped from metrics.jsonl, so
that every step stands in it once.
"""

import json
import os
import shlex
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mbv3dist.config import TrainConfig
from mbv3dist.recipe import config_to_dict
from mbv3dist.training.processes import on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator

_PLAIN_LINE_SECONDS = 10.0  # between progress lines when the output is no terminal
_MUCH_WAIT = 0.10  # of the time; above, the run says once how to find out what bounds it


class Tracker:
    """Metrics and progress of one run."""

    def __init__(
        self,
        accelerator: "Accelerator",
        config: TrainConfig,
        *,
        start_step: int,
        num_steps: int,
        quiet: bool = False,
    ) -> None:
        """Opens metrics.jsonl and, if asked, W&B.

        Raises:
            ValueError: W&B was asked for and cannot start.
        """
        self._accelerator = accelerator
        self._is_main = accelerator.is_main_process
        self._wandb = config.tracking.wandb
        self._recipe = str(config.run_dir / "config.yaml")
        self._num_train_records = 0
        self._has_hinted = False
        self._num_steps = num_steps
        self._last_line = 0.0
        self._path = config.run_dir / "metrics.jsonl"
        self._progress: Any = None
        self._quiet = quiet
        on_main_process(partial(drop_records_after, self._path, start_step))
        if self._wandb:
            _start_wandb(accelerator, config)
        if self._is_main and not quiet and sys.stdout.isatty():
            self._progress = _progress_bar(start_step, num_steps)

    def __enter__(self) -> "Tracker":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._wandb:  # Accelerate's end_training would also end the process group
            for tracker in self._accelerator.trackers:
                tracker.finish()

    def say(self, text: str) -> None:
        """One line on the console, rank 0 only."""
        if self._is_main and not self._quiet:
            if self._progress is not None:
                self._progress.console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)

    def advance(self, step: int, epoch: float, text: str = "") -> None:
        """Shows that `step` steps are done."""
        if self._progress is not None:
            self._progress.update(
                self._progress.task_ids[0], completed=step, epoch=epoch, numbers=text
            )

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes one record: kind `train` or `val`, after `step` steps."""
        if self._is_main:
            line = json.dumps({"kind": kind, "step": step, **values})
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(line + "\n")
        if self._wandb:
            self._accelerator.log(_flatten(kind, values), step=step)
        if kind == "train":
            text = format_numbers(values)
            self.advance(step, values["epoch"], text)
            now = time.monotonic()
            is_due = now - self._last_line > _PLAIN_LINE_SECONDS or step == self._num_steps
            if self._progress is None and is_due:
                self._last_line = now
                self.say(f"step {step}/{self._num_steps}  epoch {values['epoch']:.2f}  {text}")
            self._hint(values["device_wait_max"])

    def _hint(self, device_wait: float) -> None:
        """Says, once in a run, what to do about a device that waits for data."""
        self._num_train_records += 1
        # The first record holds the start of the loader's threads, which is no measure of the run.
        if self._num_train_records > 1 and device_wait > _MUCH_WAIT and not self._has_hinted:
            self._has_hinted = True
            self.say(
                f"hint: the device waited {100 * device_wait:.0f} % of the time for data: run "
                f"`mbv3dist doctor --recipe {shlex.quote(self._recipe)}` for what bounds it"
            )


def format_numbers(values: dict[str, Any]) -> str:
    """The figures of a record that a person watches."""
    shown = ("loss", "lr", "map", "map_50", "top1", "top5")
    parts = [f"{name} {values[name]:.4g}" for name in shown if values.get(name) is not None]
    if "images_per_s" in values:
        parts.append(f"{values['images_per_s']:.0f} img/s")
        parts.append(format_wait(values))
    return "  ".join(parts)


def format_wait(values: dict[str, Any]) -> str:
    """Who waited for data, and how long; see `Meter.read` for the figures.

    On a CPU the host is the device, and one share says it all.
    """
    text = f"waited for data {_share(values, 'data_wait')}"
    if values["device_wait"] != values["data_wait"]:
        text = (
            f"device waited for data {_share(values, 'device_wait')}, "
            f"host {_share(values, 'data_wait')}"
        )
    return f"{text} ({values['data_wait_ms']:.3g} ms a step)"


def _share(values: dict[str, Any], name: str) -> str:
    """A share of time, and that of the slowest rank where it says something else."""
    mean, longest = (f"{100 * values[key]:.0f} %" for key in (name, f"{name}_max"))
    return mean if longest == mean else f"{mean} [a rank: {longest}]"


def _flatten(kind: str, values: dict[str, Any]) -> dict[str, float]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flatten(f"{kind}/{name}", value))
        elif isinstance(value, int | float):
            flat[f"{kind}/{name}"] = float(value)
    return flat


def _progress_bar(start_step: int, num_steps: int) -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("epoch {task.fields[epoch]:.2f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    bar.add_task("steps", total=num_steps, completed=start_step, epoch=0.0, numbers="")
    return bar


def drop_records_after(path: Path, step: int) -> None:
    """Keeps the records of the first `step` steps; a half-written last line goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _start_wandb(accelerator: "Accelerator", config: TrainConfig) -> None:
    """Starts W&B on rank 0; a resumed run continues its W&B run."""
    id_file = config.run_dir / "wandb_id"
    init: dict[str, Any] = {"name": config.name, "dir": str(config.run_dir), "resume": "allow"}
    # Not as init_trackers' `config`: for that Accelerate 1.10 starts a second offline run.
    init |= {"config": config_to_dict(config), "allow_val_change": True}
    if accelerator.is_main_process:
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        init["id"] = id_file.read_text()
    try:
        accelerator.init_trackers(config.tracking.project, init_kwargs={"wandb": init})
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--tracking.wandb: Weights & Biases did not start ({reason}); run `wandb login`, or "
            "set WANDB_MODE=offline, or go without it: --tracking.wandb false"
        ) from None
