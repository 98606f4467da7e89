"""`mbv3dist doctor`: what this machine does in a second, what bounds training, what to change.

Rates are measured apart (disk, checksums, decoding by threads, copies, training steps) and then
together, as one rank of a run goes through them. doctor_advice.py makes the sentences.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from mbv3dist.config import TrainConfig
from mbv3dist.data.decode_choice import Decode, decide
from mbv3dist.data.index import Split
from mbv3dist.data.store import CacheOptions, node_options
from mbv3dist.tools import doctor_advice as advice
from mbv3dist.tools import doctor_data as rates
from mbv3dist.tools.doctor_page import report_text
from mbv3dist.tools.doctor_setting import (
    QUICK,
    Pace,
    Setting,
    describe,
    needed_side,
    opened,
    read_recipe,
    settle,
)

_HEAD_BYTES = 512 << 20  # of shards that are read at most
_ENOUGH_MEMORY = 0.8  # of what is available may be the page cache's for the data set

Progress = Callable[[int, int], None]


def doctor(
    data: Sequence[str] = (),
    *,
    recipe: str | None = None,
    split: str | None = None,
    architecture: str | None = None,
    batch_size: int | None = None,
    num_threads: int | None = None,
    ranks: int | None = None,
    device: str = "auto",
    quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures this machine for a data set and a recipe.

    Args:
        data: data sets made by convert, read as one; none: those of the recipe, or else pictures
            drawn for the purpose.
        recipe: YAML file; default: what suits the data's task.
        split: split to measure; default: the recipe's, or train, trainval, the only one.
        architecture: network in place of the recipe's.
        batch_size: pictures of a rank's forward pass in place of the recipe's.
        num_threads: decoding threads of a rank in place of the recipe's.
        ranks: processes of the run on this node; default: one for each GPU.
        device: auto, cpu, cuda or cuda:N.
        quick: measure for a shorter time.
        progress: called with (measurements done, measurements in all).

    Returns:
        {environment, data, settings, rates, bound, verdict, advice}, plain JSON values. Rates are
        pictures per second unless their name says otherwise, those of `limits` for the whole node.

    Raises:
        ValueError: no such data, split or device, or a recipe that does not fit the data.
        OSError: the data cannot be read.
    """
    config = read_recipe(recipe, data, split, architecture, num_threads)
    paths = config.data.path if config is not None else tuple(data)
    with opened(paths, config, split) as (found, is_drawn):
        setting = settle(
            config,
            found,
            architecture=architecture,
            batch_size=batch_size,
            num_threads=num_threads,
            ranks=ranks,
            device=device,
            pace=QUICK if quick else Pace(),
            is_drawn=is_drawn,
        )
        return _examine(setting, paths, progress or (lambda done, total: None))


def print_doctor(args: Namespace, *, progress: Progress | None = None) -> None:
    """Does what the flags of `mbv3dist doctor` say; errors as `doctor`."""
    result = doctor(
        args.data,
        recipe=args.recipe,
        split=args.split,
        architecture=args.architecture,
        batch_size=args.batch_size,
        num_threads=args.num_threads,
        ranks=args.ranks,
        device=args.device,
        quick=args.quick,
        progress=progress,
    )
    print(json.dumps(result, indent=2) if args.json else report_text(result))


def _examine(setting: Setting, paths: Sequence[str], progress: Progress) -> dict[str, Any]:
    """Measures one thing after the other."""
    from mbv3dist.tools.doctor_environment import environment

    config, split = setting.config, setting.split
    facts = environment(paths[0] if paths and split.remote is None else config.out)
    threads = rates.thread_counts(facts["cores"]["usable"], config.data.num_threads * setting.ranks)
    done, total = 0, len(threads) + 6

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    cache = node_options(config.data.cache_dir, int(config.data.cache_gb * 1e9))
    disk = _measure_source(setting, rates.head_split(split, _HEAD_BYTES))
    tick()
    head = _warm_head(setting, disk)
    picture_bytes, is_raw = rates.describe_pictures(head)
    tick()
    decode, height, width = _measure_decode(setting, head, threads, cache, tick)
    measured = {
        "disk": disk,
        "crc_mb_per_s": rates.measure_crc(),
        "decode": decode,
        **_measure_device(setting, head, cache, facts, tick),
    }
    data = {
        "where": None if setting.is_drawn else split.where,
        "split": split.name,
        "task": split.task,
        "samples": len(split),
        "shards": len(split.shards),
        "bytes": int(split.shard_bytes.sum()),
        "picture_bytes": picture_bytes,
        "height": height,
        "width": width,
        "is_raw": is_raw,
    }
    found = _find(setting, facts, data, measured)
    measured["limits"] = advice.limits(found)
    return {
        "environment": facts,
        "data": _rounded(data),
        "settings": describe(setting),
        "rates": _rounded(measured),
        "bound": advice.find_bound(measured["limits"]),
        "verdict": advice.verdict(found),
        "advice": advice.advise(found) + advice.environment_advice(facts, ranks=setting.ranks),
    }


def _find(
    setting: Setting, facts: dict[str, Any], data: dict[str, Any], measured: dict[str, Any]
) -> advice.Findings:
    """All that the advice is made of."""
    config, split, disk = setting.config, setting.split, measured["disk"]
    is_remote = split.remote is not None
    memory = facts["memory"]["available_bytes"]
    kept = config.data.cache_gb * 1e9 if is_remote else _ENOUGH_MEMORY * (memory or 0)
    # Where the page cache answered, nobody knows the disk.
    is_known = disk is not None and (disk.get("cached_share") or 0) < 0.1
    return advice.Findings(
        device=setting.device.type,
        ranks=setting.ranks,
        cores=facts["cores"]["usable"],
        machine_cores=facts["cores"]["machine"],
        num_threads=config.data.num_threads,
        decode=measured["decode"],
        decode_mode=measured["together"]["decode"],
        ways=measured["ways"],
        steps=tuple(advice.StepRate(**item) for item in measured["step"]),
        needs_side=needed_side(config),
        picture_bytes=data["picture_bytes"],
        sample_bytes=data["bytes"] / data["samples"],
        height=data["height"],
        width=data["width"],
        data_bytes=data["bytes"],
        input_size=config.model.input_size,
        is_detection=split.task == "detection",
        is_raw=data["is_raw"],
        reads_every_epoch=data["bytes"] > kept,
        disk_mb_per_s=disk["mb_per_s"] if is_known else None,
        is_remote=is_remote,
        file_system=facts["disk"]["file_system"],
        memory_bytes=memory,
        crc_mb_per_s=measured["crc_mb_per_s"],
        verify=config.data.verify,
        copy_mb_per_s=measured["copy"]["mb_per_s"] if measured["copy"] else None,
        has_decoder=None not in (facts["decoder"]["nvimgcodec"], facts["decoder"]["numba"]),
    )


def _measure_source(setting: Setting, head: Split) -> dict[str, Any] | None:
    """The disk or network that the shards come from; None for pictures drawn just now."""
    if setting.is_drawn:
        return None
    seconds = setting.pace.disk
    if head.remote is not None:
        return {"mb_per_s": rates.measure_network(head, seconds=seconds), "is_network": True}
    paths = [head.shards[number].path for number in range(len(head.shards))]
    piece = int(head.shard_bytes.sum()) // max(1, len(head))
    threads = setting.config.data.num_threads * setting.ranks
    return rates.measure_disk(paths, piece_bytes=piece, num_threads=threads, seconds=seconds)


def _warm_head(setting: Setting, disk: dict[str, Any] | None) -> Split:
    """The part of the split that decoding is measured on, in the page cache."""
    rate = (disk or {}).get("sequential_mb_per_s", 100.0) * 1e6
    head = rates.head_split(setting.split, min(_HEAD_BYTES, int(3 * rate)))
    if head.remote is None:
        paths = [head.shards[number].path for number in range(len(head.shards))]
        rates.warm_up(paths, seconds=10.0)
    return head


def _measure_decode(
    setting: Setting, head: Split, threads: list[int], cache: CacheOptions, tick: Callable[[], None]
) -> tuple[dict[int, float], float, float]:
    """Pictures per second by threads; mean height and width of the pictures."""
    config = setting.config
    # What is compiled when it is first used is compiled here; how fast it goes gives the batches.
    first = rates.measure_decode(
        head, config, num_threads=1, batch_size=8, seconds=0.1, cache=cache
    )
    decode = {}
    for count in threads:
        batch = rates.batch_for(first.images_per_s, num_threads=count, largest=256)
        result = rates.measure_decode(
            head,
            config,
            num_threads=count,
            batch_size=batch,
            seconds=setting.pace.decode,
            cache=cache,
        )
        decode[count] = result.images_per_s
        tick()
    return decode, result.mean_height, result.mean_width


def _measure_device(
    setting: Setting,
    head: Split,
    cache: CacheOptions,
    facts: dict[str, Any],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Copies, steps, and steps fed by the loader."""
    from mbv3dist.tools import doctor_device as device

    config, target, pace = setting.config, setting.device, setting.pace
    copy = None
    if target.type == "cuda":
        copy = device.measure_copy(
            target,
            batch_size=setting.batch_size,
            size=config.model.input_size,
            seconds=pace.copy,
        )
    tick()
    tries = [(setting.batch_size, setting.precision)]
    if target.type == "cuda" and pace.tries_variants:
        if setting.precision == "no" and facts["gpu"]["bf16"]:
            tries.append((setting.batch_size, "bf16"))
        tries.append((2 * setting.batch_size, setting.precision))
    ways: dict[Decode, float] = {}
    problems: dict[Decode, str] = {}
    if target.type == "cuda":
        ways, problems = device.measure_ways(
            head,
            config,
            target,
            batch_size=setting.batch_size,
            num_threads=config.data.num_threads,
            seconds=pace.decode,
            cache=cache,
        )
    mode = _choose_mode(config, ways, problems)
    tick()
    steps, step = device.measure_steps(
        head, config, target, tries=tries, seconds=pace.step, cache=cache
    )
    tick()
    together = device.measure_together(
        step,
        head,
        config,
        target,
        batch_size=steps[0]["batch_size"],
        num_threads=config.data.num_threads,
        decode=mode,
        seconds=pace.together,
        cache=cache,
    )
    tick()
    return {
        "ways": ways,
        "ways_not_possible": problems,
        "copy": copy,
        "step": steps,
        "together": together,
    }


def _choose_mode(
    config: TrainConfig, ways: dict[Decode, float], problems: dict[Decode, str]
) -> Decode:
    """What data.decode is in a run of this recipe."""
    wanted = config.data.decode
    if wanted != "auto":
        if wanted in problems:
            raise ValueError(f"--data.decode {wanted}: {problems[wanted]}")
        return wanted
    return decide(ways, problems).decode if ways and not config.deterministic else "cpu"


def _rounded(value: Any) -> Any:
    """Numbers with four digits: there are no more in a measurement."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
