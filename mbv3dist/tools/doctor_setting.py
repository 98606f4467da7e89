"""What `mbv3dist doctor` measures: a recipe or what suits the data, and the machine's part."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mbv3dist.config import Architecture, DataConfig, ModelConfig, TrainConfig, ViewConfig
from mbv3dist.data.index import Split, training_split
from mbv3dist.data.joined import open_splits
from mbv3dist.recipe import load_config
from mbv3dist.tools.doctor_data import draw_data_set

if TYPE_CHECKING:
    import torch

_CPU_BATCH = 8  # of a step on a small CPU, which takes many seconds for a GPU's batch


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds that each measurement takes, about."""

    disk: float = 2.5
    decode: float = 1.5
    copy: float = 0.5
    step: float = 4.0
    together: float = 6.0
    tries_variants: bool = True


QUICK = Pace(disk=0.7, decode=0.6, copy=0.2, step=1.0, together=2.0, tries_variants=False)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured: a recipe, the data and the machine's part in the run."""

    config: TrainConfig
    split: Split
    device: torch.device
    ranks: int
    batch_size: int  # of a rank's forward pass
    precision: str
    pace: Pace
    is_drawn: bool


def read_recipe(
    recipe: str | None,
    data: Sequence[str],
    split: str | None,
    architecture: str | None,
    num_threads: int | None,
) -> TrainConfig | None:
    """The recipe, with what the command names in place of its own; None without a recipe."""
    if recipe is None:
        return None
    words: list[str] = []
    if data:
        words += ["--data.path", *data]
    for flag, value in (
        ("data.train_split", split),
        ("model.architecture", architecture),
        ("data.num_threads", num_threads),
    ):
        if value is not None:
            words.append(f"--{flag}={value}")
    return load_config(recipe, words)


@contextmanager
def opened(
    paths: Sequence[str], config: TrainConfig | None, split: str | None
) -> Iterator[tuple[Split, bool]]:
    """The split to measure, and whether it was drawn for the purpose."""
    if not paths:
        with tempfile.TemporaryDirectory(prefix="mbv3dist-doctor-") as folder:
            yield open_splits([str(draw_data_set(Path(folder)))], "train"), True
        return
    cache_dir = config.data.cache_dir or None if config is not None else None
    name = config.data.train_split if config is not None else split or training_split(paths[0])
    yield open_splits(list(paths), name, cache_dir=cache_dir), False


def settle(
    config: TrainConfig | None,
    split: Split,
    *,
    architecture: str | None,
    batch_size: int | None,
    num_threads: int | None,
    ranks: int | None,
    device: str,
    pace: Pace,
    is_drawn: bool,
) -> Setting:
    """Fills what nobody said with what suits the machine and the data."""
    import torch

    from mbv3dist.inference.predict import choose_device
    from mbv3dist.tools.doctor_environment import cores
    from mbv3dist.training.to_device import check_decode

    target = choose_device(device)
    on_gpu = target.type == "cuda"
    if config is not None:
        check_decode(config.data.decode, target)
    ranks = ranks or (max(1, torch.cuda.device_count()) if on_gpu else 1)
    if config is None:
        config = _default_config(split.task, architecture, on_gpu=on_gpu, num_threads=num_threads)
        config = dataclasses.replace(
            config,
            data=dataclasses.replace(
                config.data, global_batch_size=ranks * config.data.global_batch_size
            ),
        )
    if config.task != split.task:
        raise ValueError(
            f"{split.where} is a {split.task} data set, {config.model.architecture} a "
            f"{config.task} model; name a model for it with --architecture"
        )
    micro = config.data.global_batch_size // ranks // config.optim.accumulation_steps
    if not on_gpu:
        micro = min(micro, max(_CPU_BATCH, cores()["usable"]))
    optim = dataclasses.replace(config.optim, accumulation_steps=1)
    if config.num_cpu_threads:
        torch.set_num_threads(config.num_cpu_threads)
    torch.backends.cudnn.benchmark = True
    return Setting(
        config=dataclasses.replace(config, optim=optim),
        split=split,
        device=target,
        ranks=ranks,
        batch_size=batch_size or max(2, micro),
        precision=config.mixed_precision or "no",
        pace=pace,
        is_drawn=is_drawn,
    )


def _default_config(
    task: str, architecture: str | None, *, on_gpu: bool, num_threads: int | None
) -> TrainConfig:
    """The recipe that most would begin with."""
    import torch

    if architecture is not None and architecture not in get_args(Architecture):
        raise ValueError(f"--architecture {architecture}: give {', '.join(get_args(Architecture))}")
    is_detection = task == "detection"
    names = ("ssdlite_mobilenetv3_large", 320, "ssd", 32)
    if not is_detection:
        names = ("mobilenetv3_large", 224, "random_resized_crop", 128)
    default, size, view, batch = names
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    return TrainConfig(
        name="doctor",
        mixed_precision="bf16" if bf16 else "no",
        data=DataConfig(
            path=("-",),
            global_batch_size=batch,
            num_threads=num_threads or DataConfig().num_threads,
            view=ViewConfig(name=view),  # type: ignore[arg-type]
        ),
        model=ModelConfig(
            architecture=architecture or default,  # type: ignore[arg-type]
            input_size=size,
        ),
    )


def needed_side(config: TrainConfig) -> int:
    """The shorter side of a picture that the view has use for."""
    if config.task == "detection":
        return config.model.input_size
    return config.data.view.resize or round(config.model.input_size * 256 / 224)


def describe(setting: Setting) -> dict[str, Any]:
    """The setting in plain JSON values."""
    config = setting.config
    return {
        "architecture": config.model.architecture,
        "input_size": config.model.input_size,
        "view": config.data.view.name,
        "batch_size": setting.batch_size,
        "precision": setting.precision,
        "num_threads": config.data.num_threads,
        "ranks": setting.ranks,
        "device": str(setting.device),
    }
