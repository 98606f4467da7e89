"""The one training loop, for classifiers and detectors, on any number of processes.

plan -> batch -> device colour and normalisation -> forward -> loss -> backward -> step. Accelerate
gives processes, DDP and precision; order, schedule and checkpoints are ours, and all of them are
functions of the step alone, so that a killed run continues as if nothing had happened.
"""

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mbv3dist.config import TrainConfig
from mbv3dist.data.decode_choice import Decode
from mbv3dist.data.loader import Loader
from mbv3dist.evaluation.run import evaluate
from mbv3dist.models.directory import save_model
from mbv3dist.ops.color import normalize_images
from mbv3dist.training.checkpoint import save_checkpoint
from mbv3dist.training.damage import DamageLedger
from mbv3dist.training.meter import Meter
from mbv3dist.training.optim import lr_factor, set_lr, train_mode
from mbv3dist.training.processes import (
    AgreedError,
    StopRequest,
    is_distributed,
    is_lost_peer,
    leave_group,
    local_rank,
    on_main_process,
    start_sum,
    step_seed,
)
from mbv3dist.training.report import write_report
from mbv3dist.training.setup import Run, identity, prepare
from mbv3dist.training.to_device import ToDevice, choose_for_run
from mbv3dist.training.tracking import Tracker, format_numbers

_CALM = "lower --optim.lr, add --optim.warmup_epochs or --optim.clip_grad_norm"


def train(config: TrainConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Trains a model and leaves it in `OUT/NAME/last` and, with validation, `OUT/NAME/best`.

    Args:
        config: the whole recipe.
        quiet: print nothing.

    Returns:
        {run, steps, stopped, best_score, metric, val}: `val` holds the last validation's figures.

    Raises:
        ValueError: the recipe, the data or the launch do not fit together; one line says how.
        OSError: the disk is full or not readable.
    """
    try:
        try:
            run = prepare(config)
        except (ValueError, OSError):
            if local_rank() != 0:  # every rank meets the same error; one line of it is enough
                raise SystemExit(2) from None
            raise
        return fit(run, quiet=quiet)
    except AgreedError:
        if is_distributed() and dist.get_rank() != 0:
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"rank {dist.get_rank()}: another rank ended; its message says why", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        leave_group()


def fit(run: Run, *, quiet: bool = False) -> dict[str, Any]:
    """The training loop, from `run.start_step` to the end of the plan."""
    config, accelerator, plan, task = run.config, run.accelerator, run.plan, run.task
    device = accelerator.device
    rank = accelerator.process_index
    world_size, accumulation = accelerator.num_processes, config.optim.accumulation_steps
    mean, std = run.spec.preprocess.mean, run.spec.preprocess.std
    view = config.data.view
    meter = Meter(device)
    val: dict[str, Any] | None = None
    step, stopped = run.start_step, False
    choice = choose_for_run(
        run.decode, device, partial(_make_loader, run), deterministic=config.deterministic
    )
    loader = _make_loader(run, choice.decode)
    to_device = ToDevice(device, choice.decode)
    loader.budget.damaged.update(run.damaged)
    with (
        StopRequest() as stop,
        Tracker(
            accelerator, config, start_step=step, num_steps=plan.num_steps, quiet=quiet
        ) as tracker,
        loader,
    ):
        tracker.say(_banner(run))
        tracker.say(choice.reason)
        ledger = DamageLedger(loader.budget, run.train_split, config.run_dir, group=stop.group)
        train_mode(run.step_model, freeze_bn=config.model.freeze_bn)
        meter.restart_clock()  # choosing a decoder takes its time
        meter.ask()
        for step, batch in loader:
            batch = to_device(batch)
            meter.begin()
            # Dropout depends on (seed, step, rank) alone: no generator state to save.
            torch.manual_seed(step_seed(config.seed, step, rank))
            progress = plan.epochs_done(step)
            set_lr(run.optimizer, lr_factor(progress, config.optim, epochs=config.epochs))

            # The loss is divided by a count over ALL ranks and micro-batches. It is known from the
            # targets alone, so that it is on its way while the first forward pass runs.
            micro_batches = batch.split(accumulation)
            targets = [task.targets(micro) for micro in micro_batches]
            normalizer = torch.stack([task.normalizer(t) for t in targets]).sum().float()
            summed = start_sum(normalizer)

            for i, micro in enumerate(micro_batches):
                images = normalize_images(
                    micro.image,
                    mean=mean,
                    std=std,
                    color=micro.color if view.has_color else None,
                    with_hue=view.hue > 0,
                )
                is_last = i == accumulation - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(run.step_model):
                    losses = task.losses(run.step_model(images), micro, targets[i])
                    scale = world_size / summed().clamp(min=1)  # DDP averages over ranks
                    accelerator.backward(torch.stack(list(losses.values())).sum() * scale)
                meter.add(losses, normalizer)
            if config.optim.clip_grad_norm > 0:
                accelerator.clip_grad_norm_(run.model.parameters(), config.optim.clip_grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.ema is not None:
                run.ema.update(run.model, step=step)  # type: ignore[operator]

            step += 1  # steps done
            meter.step(batch.image.shape[0] * world_size)
            epoch = plan.epochs_done(step)
            is_end = step == plan.num_steps
            is_eval = run.val_split is not None and _is_eval_step(run, step)
            is_asked = stop.heard()
            is_log = is_log_step(config, step) or is_end or is_asked
            if is_eval or is_log or _is_checkpoint_step(run, step):
                for reason in ledger.agree():
                    tracker.say(f"warning: goes with weight 0: {reason}")
            if is_log:
                lr = run.optimizer.param_groups[-1]["lr"]
                values = {"epoch": round(epoch, 4), **meter.read(), "lr": lr}
                if not values["loss"] < float("inf"):
                    raise ValueError(f"the loss became {values['loss']} by step {step}; {_CALM}")
                tracker.record("train", step, values)

            if is_eval:
                val = validate(run)
                _note_score(run, val[task.metric])
                if run.evals_without_gain == 0:
                    on_main_process(partial(_save_model, run, "best"))
                tracker.record("val", step, {"epoch": round(epoch, 4), **val})
                tracker.say(f"validation at epoch {epoch:.2f}: {format_numbers(val)}")
                train_mode(run.step_model, freeze_bn=config.model.freeze_bn)
                meter.restart_clock()
                is_end = is_end or is_out_of_patience(run)

            stopped = is_asked and not is_end
            if _is_checkpoint_step(run, step) or stopped or is_end:
                on_main_process(partial(_save_checkpoint, run, step, loader))
            if stopped or is_end:
                break
            meter.ask()
        if stopped:
            tracker.say(f"stopped on request after step {step}; --resume auto goes on from there")
        else:
            on_main_process(partial(_save_model, run, "last"))
            page = on_main_process(partial(_write_report, run))
            tracker.say(f"report: {page}")
    accelerator.wait_for_everyone()
    return {
        "run": str(config.run_dir),
        "steps": step,
        "stopped": stopped,
        "metric": task.metric,
        "best_score": run.best_score if run.best_score >= 0 else None,
        "val": val,
    }


def _make_loader(run: Run, decode: Decode) -> Loader:
    """The training batches of this rank, from the run's first step on."""
    config, accelerator = run.config, run.accelerator
    return Loader(
        run.train_split,
        run.plan,
        view=config.data.view,
        size=config.model.input_size,
        seed=config.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
        start_step=run.plan.num_steps if is_out_of_patience(run) else run.start_step,
        pin_memory=accelerator.device.type == "cuda",
        verify=config.data.verify,
        error_budget=config.data.error_budget,
        cache=run.cache,
        decode=decode,
    )


def validate(run: Run) -> dict[str, Any]:
    """Losses and metrics on the validation split, of the moving average if there is one."""
    assert run.val_split is not None
    model = _scored_model(run)
    if is_distributed():
        # Each rank's BatchNorm statistics end with its own last batch; rank 0's are the run's.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    try:
        with full_precision(model):
            return evaluate(
                model,
                run.spec,
                run.val_split,
                batch_size=run.config.eval.batch_size,
                device=run.accelerator.device,
                num_threads=run.config.data.num_threads,
                cache=run.cache,
                min_negatives=run.config.model.min_negatives,
            )
    except ValueError as error:  # of one rank; evaluate tells all
        raise AgreedError(str(error)) from None


@contextlib.contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Without Accelerate's autocast, which it hangs on the instance: scores are those of `eval`."""
    patched = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


def _save_checkpoint(run: Run, step: int, loader: Loader) -> None:
    weights = [weight.isfinite().all() for weight in run.model.parameters()]
    if not torch.stack(weights).all():
        raise ValueError(f"the weights are not finite after step {step}, not saved; {_CALM}")
    optimizer: dict[str, Any] = {"optimizer": run.optimizer.state_dict()}
    if run.accelerator.scaler is not None:
        optimizer["scaler"] = run.accelerator.scaler.state_dict()
    save_checkpoint(
        run.config.run_dir,
        step,
        model=run.model.state_dict(),
        ema=None if run.ema is None else run.ema.module.state_dict(),  # type: ignore[union-attr]
        optimizer=optimizer,
        state={
            "identity": identity(run),
            "data": loader.state(),
            "damaged": loader.budget.damaged,
            "best_score": run.best_score,
            "evals_without_gain": run.evals_without_gain,
        },
        keep_last=run.config.checkpoint.keep_last,
    )


def _scored_model(run: Run) -> nn.Module:
    """The moving average if there is one: it is what is validated and kept."""
    model = run.ema.module if run.ema is not None else run.model
    assert isinstance(model, nn.Module)
    return model


def _save_model(run: Run, name: str) -> None:
    save_model(_scored_model(run), run.spec, run.config.run_dir / name)


def _write_report(run: Run) -> str:
    model = _scored_model(run)
    with full_precision(model):
        return str(write_report(run.config, model, run.spec, run.val_split or run.train_split))


def _note_score(run: Run, score: float | None) -> None:
    """Keeps account of the best score."""
    score = -1.0 if score is None else score
    if score > run.best_score:
        run.best_score, run.evals_without_gain = score, 0
    else:
        run.evals_without_gain += 1


def is_out_of_patience(run: Run) -> bool:
    """Whether early stopping has ended, or ends, the run."""
    patience = run.config.eval.early_stop
    return 0 < patience <= run.evals_without_gain


def is_log_step(config: TrainConfig, step: int) -> bool:
    """Every so many steps metrics are recorded."""
    return step % config.tracking.log_every_steps == 0


def _is_eval_step(run: Run, step: int) -> bool:
    """After the step that completes every n-th epoch, and at the end."""
    done, before = (run.plan.epochs_finished(s) for s in (step, step - 1))
    every = run.config.eval.every_epochs
    return step == run.plan.num_steps or done // every > before // every


def _is_checkpoint_step(run: Run, step: int) -> bool:
    config = run.config.checkpoint
    if config.every_steps and step % config.every_steps == 0:
        return True
    if not config.every_epochs:
        return False
    done, before = (run.plan.epochs_done(s) / config.every_epochs + 1e-9 for s in (step, step - 1))
    return int(done) > int(before)


def _banner(run: Run) -> str:
    accelerator, plan = run.accelerator, run.plan
    where = f"step {run.start_step} of {plan.num_steps}"
    if run.start_step == plan.num_steps or is_out_of_patience(run):
        where += ": the run is complete"
    return (
        f"{run.config.run_dir}: {run.spec.architecture}, {len(run.spec.classes)} classes, "
        f"{plan.num_samples} training samples, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}, from {where}"
    )
