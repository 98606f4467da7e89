"""`mbv3dist eval`: a model directory against a split, on one process or several."""

import os
from collections.abc import Callable
from typing import Any

import torch

from mbv3dist.data.index import open_split
from mbv3dist.data.store import CacheOptions, node_options
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.predict import choose_device
from mbv3dist.models.onnx_model import load_any_model


def score(
    model: str,
    data: str,
    *,
    split: str,
    batch_size: int = 32,
    num_threads: int = 2,
    device: str = "auto",
    cache: CacheOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Scores a model directory on a split; under torchrun the ranks share the work.

    Args:
        model: model directory, or exported .onnx file.
        data: data set made by convert.
        split: its split.
        batch_size: pictures per rank and step.
        num_threads: decoding threads per rank.
        device: auto, cpu, cuda or cuda:N; under a launcher each rank takes its own.
        cache: how shards of a remote data set are kept.
        progress: called with (pictures done, pictures of this rank).

    Returns:
        The figures on rank 0, None on the others.

    Raises:
        ValueError: model and data do not fit, or the device is not there.
    """
    loaded = load_any_model(model)
    cache = cache or node_options()
    opened = open_split(data, split, cache_dir=cache.folder)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        # Without cpu=True and without CUDA, every rank would score the whole split alone.
        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        assert state.num_processes == int(os.environ["WORLD_SIZE"])
        target = state.device
    else:
        target = choose_device(device)
    result = evaluate(
        loaded.model.to(target),
        loaded.spec,
        opened,
        batch_size=batch_size,
        device=target,
        num_threads=num_threads,
        cache=cache,
        progress=progress,
    )
    if torch.distributed.is_initialized():
        is_main = torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
        return result if is_main else None
    return result
