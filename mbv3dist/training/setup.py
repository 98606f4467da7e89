"""From a recipe to all the loop uses: data, plan, model, optimiser, where to start from."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mbv3dist.config import TrainConfig
from mbv3dist.data.batch import Batch
from mbv3dist.data.index import Split
from mbv3dist.data.joined import choose_pass, open_splits
from mbv3dist.data.plan import Plan
from mbv3dist.data.state import ACCEPTABLE, resume_step
from mbv3dist.data.store import CacheOptions, node_options
from mbv3dist.messages import shown
from mbv3dist.models.directory import ModelSpec
from mbv3dist.models.ssdlite import SSDLite, parameter_groups
from mbv3dist.recipe import config_to_dict
from mbv3dist.training.build import build_model
from mbv3dist.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    restore,
)
from mbv3dist.training.classification import ClassificationTask
from mbv3dist.training.detection import DetectionTask
from mbv3dist.training.optim import build_optimizer, train_mode
from mbv3dist.training.processes import (
    check_devices,
    check_launch,
    check_world_size,
    is_distributed,
    on_main_process,
)

BUCKET_MB = 2  # of gradients that DDP sends at once; see docs/decisions.md


class Task(Protocol):
    """What the loop asks of a task; `targets` is the task's own affair."""

    metric: ClassVar[str]

    def targets(self, batch: Batch) -> Any:
        """What the model is to learn from a micro-batch; needs no model."""

    def normalizer(self, targets: Any) -> Tensor:
        """What the loss is divided by once summed over all ranks, 0-d."""

    def losses(self, outputs: Any, batch: Batch, targets: Any) -> dict[str, Tensor]:
        """Sums of the loss parts over a micro-batch, each 0-d."""


@dataclass
class Run:
    """Everything the loop uses, made once by `prepare`."""

    config: TrainConfig
    accelerator: Accelerator
    train_split: Split
    val_split: Split | None
    plan: Plan
    spec: ModelSpec
    task: Task
    model: nn.Module  # bare: checkpoints and evaluation use it
    step_model: nn.Module  # wrapped for DDP, precision and compilation: the loop calls it
    optimizer: Any
    ema: nn.Module | None
    start_step: int
    best_score: float
    evals_without_gain: int
    cache: CacheOptions
    damaged: dict[int, str]  # samples the run went without before it was resumed
    decode: Literal["auto", "cpu", "hybrid", "gpu"]  # as asked, or as before it was resumed


def prepare(config: TrainConfig) -> Run:
    """Opens the data, makes or restores the model, and checks that everything fits."""
    check_launch()
    check_devices(torch.cuda.device_count())
    if config.num_cpu_threads:
        torch.set_num_threads(config.num_cpu_threads)
    train_split, val_split = open_data(config)
    if train_split.task != config.task:
        raise ValueError(
            f"{train_split.where} is a {train_split.task} data set and --model.architecture "
            f"{config.model.architecture} a {config.task} model; convert the data with --task "
            f"{config.task}, or choose another architecture"
        )
    plan = Plan(
        train_split.shard_sizes,
        global_batch_size=config.data.global_batch_size,
        epochs=config.epochs,
        seed=config.seed,
        lanes=config.data.lanes,
        block_shards=config.data.block_shards,
        tail=config.data.tail,
        samples=choose_pass(
            train_split,
            weights=config.data.weights,
            balance_classes=config.data.balance_classes,
        ),
    )
    parts = int(os.environ.get("WORLD_SIZE", "1")), config.optim.accumulation_steps
    plan.check_world(*parts)
    if plan.global_batch_size == parts[0] * parts[1]:
        raise ValueError(
            f"global batch size {plan.global_batch_size} leaves one sample per rank and "
            "micro-batch, and BatchNorm needs two; set --data.global_batch_size to "
            f"{2 * plan.global_batch_size} or more"
        )
    accelerator = make_accelerator(config)
    on_main_process(lambda: _make_run_dir(config))

    torch.manual_seed(config.seed)
    spec, model = build_model(
        config, train_split.classes, train_fingerprint=train_split.fingerprint
    )
    if config.model.init_from:
        accelerator.print(spec.provenance["init_from"])
    model = model.to(accelerator.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.sync_bn:
        from timm.layers import convert_sync_batchnorm

        model = convert_sync_batchnorm(model)
    optimizer = build_optimizer(
        parameter_groups(model), config.optim, fused=accelerator.mixed_precision != "fp16"
    )
    ema = None
    if config.optim.ema_decay:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True)
    step_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    keep_buffers_local(step_model)
    if config.compile:
        step_model = torch.compile(step_model, dynamic=False)
    task: Task
    if isinstance(model, SSDLite):
        task = DetectionTask.from_config(config, model.anchors)
    else:
        task = ClassificationTask.from_config(config)
    run = Run(
        config=config,
        accelerator=accelerator,
        train_split=train_split,
        val_split=val_split,
        plan=plan,
        spec=spec,
        task=task,
        model=model,
        step_model=step_model,
        optimizer=prepared_optimizer,
        ema=ema,
        start_step=0,
        best_score=-1.0,
        evals_without_gain=0,
        cache=node_options(config.data.cache_dir, int(config.data.cache_gb * 1e9)),
        damaged={},
        decode=config.data.decode,
    )
    if is_distributed():
        _settle_buckets(run)
    if config.resume == "auto":
        _resume(run)
    # Again, with what this part of the run is made with; a resume that is refused leaves it alone.
    on_main_process(lambda: _write_config(config))
    return run


def open_data(config: TrainConfig) -> tuple[Split, Split | None]:
    """The training split, and the validation split if the recipe names one."""
    data = config.data
    cache_dir = data.cache_dir or None
    train_split = open_splits(data.path, data.train_split, cache_dir=cache_dir)
    if not data.val_split:
        return train_split, None
    return train_split, open_splits(data.val_path or data.path, data.val_split, cache_dir=cache_dir)


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate as this loop uses it: no prepared loaders, no prepared schedules."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True
    # Small buckets: the last one has no backward pass left to hide behind.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # else torchrun's ranks would each train alone
        mixed_precision=config.mixed_precision or None,
        log_with="wandb" if config.tracking.wandb else None,
        kwargs_handlers=[ddp],
    )
    if config.sync_bn and accelerator.device.type != "cuda":
        raise ValueError("--sync_bn works on GPUs only; leave it out on CPUs")
    check_world_size(accelerator.num_processes)
    return accelerator


def keep_buffers_local(model: nn.Module) -> None:
    """Stop DDP from sending rank 0's BatchNorm statistics in each step, if `model` is in DDP.

    They are still sent once, when DDP is built. Rank 0's are the run's, and `validate` sends them.
    Set here since torch 2.15 deprecates the argument `broadcast_buffers` and accelerate does not
    know its successor.
    """
    if isinstance(model, DistributedDataParallel):
        model.broadcast_buffers = False


def _settle_buckets(run: Run) -> None:
    """One backward pass before the run.

    DDP lays out its gradient buckets anew after the first step, and with them the order in which
    gradients are added. Doing that before step 0, and again before a resumed step, makes both add
    in the same order: the same bits.
    """
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    train_mode(run.step_model, freeze_bn=run.config.model.freeze_bn)
    parts = run.accelerator.num_processes * run.config.optim.accumulation_steps
    size = run.config.model.input_size
    images = torch.zeros(run.plan.global_batch_size // parts, 3, size, size)
    images = images.to(run.accelerator.device, memory_format=torch.channels_last)
    for _ in range(2):
        outputs = run.step_model(images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.stack([out.float().mean() for out in outputs]).sum().backward()
    run.model.load_state_dict(before)
    run.model.zero_grad()


def _resume(run: Run) -> None:
    """Continues from the newest whole checkpoint, if there is one."""
    # Rank 0 decides, so that a rank whose file system lags behind cannot start elsewhere.
    path, complaints = on_main_process(partial(find_checkpoint, run.config.run_dir))
    for complaint in complaints:
        run.accelerator.print(f"warning: {complaint}")
    if path is None:
        if complaints:
            raise ValueError(
                f"no checkpoint in {run.config.run_dir} is whole; start afresh with "
                "--resume never --overwrite true"
            )
        return
    if not path.is_dir():
        raise ValueError(
            f"{path}: rank 0 sees this checkpoint, this rank does not; --out must be shared"
        )
    checkpoint = load_checkpoint(path)
    _check_same_run(run, checkpoint, path)
    restore(
        checkpoint,
        path,
        model=run.model,
        ema=None if run.ema is None else run.ema.module,  # type: ignore[arg-type]
        optimizer=run.optimizer,
        scaler=run.accelerator.scaler,
    )
    run.start_step, warnings = _resume_data(run, checkpoint, path)
    for warning in warnings:
        run.accelerator.print(f"warning: accepted: {warning}")
    run.damaged = {int(index): reason for index, reason in checkpoint.state["damaged"].items()}
    run.best_score = checkpoint.state["best_score"]
    run.evals_without_gain = checkpoint.state["evals_without_gain"]


def _resume_data(run: Run, checkpoint: Checkpoint, path: Path) -> tuple[int, list[str]]:
    """The step to go on from, if the checkpoint's data state is that of this run."""
    accept = run.config.data.accept_changes
    unknown = [name for name in accept if name not in ACCEPTABLE]
    if unknown:
        raise ValueError(
            f"--data.accept_changes {unknown[0]}: cannot be accepted; what can: "
            f"{', '.join(ACCEPTABLE)}"
        )
    state = checkpoint.state["data"]
    if run.decode == "auto" and "decode" not in accept:
        # What was measured then is kept: the pixels of a step are to stay the same.
        on_gpu = run.accelerator.device.type == "cuda"
        run.decode = state.get("decode", "cpu") if on_gpu and isinstance(state, dict) else "cpu"
    decode = None if run.decode == "auto" else run.decode
    try:
        step, warnings = resume_step(state, run.train_split, run.plan, accept=accept, decode=decode)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be continued: {error}") from None
    assert step == checkpoint.step
    return step, warnings


def _check_same_run(run: Run, checkpoint: Checkpoint, path: Path) -> None:
    """A checkpoint of other data, another order or another model cannot be continued."""
    if "data" not in checkpoint.state:
        raise ValueError(
            f"{path}: was written by an older mbv3dist and cannot be continued; start another run "
            f"with --name, from these weights with --model.init_from {run.config.run_dir / 'last'}"
        )
    mine = identity(run)
    theirs = checkpoint.state["identity"]
    for name, value in mine.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"{path}: cannot be continued: {name} was {shown(theirs.get(name))} and is now "
                f"{value!r}; restore it, or start another run with --name, from these weights with "
                f"--model.init_from {run.config.run_dir / 'last'}"
            )


def identity(run: Run) -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run; plain JSON values."""
    return {
        "architecture": run.spec.architecture,
        "classes": list(run.spec.classes),
        "input_size": run.spec.input_size,
        "width": run.spec.width,
        "reduced_tail": run.spec.reduced_tail,
        "mean and std": [list(run.spec.preprocess.mean), list(run.spec.preprocess.std)],
        "bn_eps": run.spec.bn_eps,
        "anchors": json.loads(json.dumps(asdict(run.spec.anchors))) if run.spec.anchors else None,
        "parameter groups": [[g["name"], len(g["params"])] for g in run.optimizer.param_groups],
        "optimizer": run.config.optim.name,
        "ema_decay": run.config.optim.ema_decay,
        "epochs": run.config.epochs,
    }


def _make_run_dir(config: TrainConfig) -> None:
    """Makes the run's folder; an existing run is never overwritten by accident."""
    folder = config.run_dir
    if config.overwrite and config.resume == "never" and folder.exists():
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--overwrite: {folder} is not the folder of a run; choose --name")
        shutil.rmtree(folder)
    if config.resume == "never" and list_checkpoints(config.run_dir):
        raise ValueError(
            f"{folder} holds a run; continue it with --resume auto, or start afresh with "
            "--overwrite true or another --name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not list_checkpoints(folder):
        _write_config(config)
    if config.resume == "never":
        (folder / "metrics.jsonl").unlink(missing_ok=True)


def _write_config(config: TrainConfig) -> None:
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False)
    (config.run_dir / "config.yaml").write_text(text, encoding="utf-8")
