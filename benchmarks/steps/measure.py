"""Systems measured in turns: figures, stages, each library's best, shares of the byte floor."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import harness
import roofline
import torch
import tracing

from steps import device_state
from steps.matrix import Built, best_names, choose_base, no_mark, release, same_as
from steps.systems import Clock, Setting, System

STAGES = ("zero_grad", "input", "forward", "loss", "backward", "graph", "optimizer")
COUNTED = ("forward", "loss", "backward", "graph")  # what `images_per_s` is of
STEP = "step"  # all of it, with what lies between steps


def one_pass(
    system: System, device: torch.device, *, steps: int, batch: int, found: list[dict[str, float]]
) -> float:
    """Do some steps; add their mean stages to `found`; return pictures/s of what is compared."""
    clocks = []
    for _ in range(steps):
        clock = Clock(device)
        system.whole_step(clock)
        clocks.append(clock)  # read at the end: on a GPU reading waits, and the host may run ahead
    totals: dict[str, float] = {}
    for clock in clocks:
        for name, took in clock.stages().items():
            totals[name] = totals.get(name, 0.0) + took / steps
    totals[STEP] = clocks[0].until_end_of(clocks[-1]) / steps
    found.append(totals)
    return 1000 * batch / sum(totals.get(name, 0.0) for name in COUNTED)


def measure_systems(
    built: Built,
    args: argparse.Namespace,
    *,
    section: str,
    batch: int,
    base: str,
    traffic: roofline.Traffic,
) -> dict[str, Any]:
    """Measure systems in turns.

    Args:
        built: The systems; one that fails while it is measured goes to those that failed.
        args: rounds, steps, device, quiet, trace, and `rates` of the device.
        section: Its name in the report.
        batch: Pictures in a step.
        base: Name of the system that ratios are against, if there is one.
        traffic: What a picture moves.
    """
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in built.systems}
    runs = {
        name: partial(
            one_pass, system, args.device, steps=args.steps, batch=batch, found=stages[name]
        )
        for name, system in built.systems.items()
    }
    options: dict[str, Any] = {"failed": built.failed, "errors": (RuntimeError,)}
    warm = harness.interleave(runs, rounds=1, **options)
    runs = {name: run for name, run in runs.items() if name in warm}
    clocks = {"before": device_state.state(args.device)}
    others: dict[str, list[float]] = {}
    figures = harness.interleave(
        runs, rounds=args.rounds, quiet=args.quiet, others=others, **options
    )
    base = choose_base(list(figures), base)
    clocks["load"] = device_state.state(args.device, partial(_busy, built.systems[base]))
    clocks["after"] = device_state.state(args.device)
    kept = {name: stages[name][-args.rounds :] for name in figures}
    whole = {name: [1000 * batch / one[STEP] for one in every] for name, every in kept.items()}
    result = {
        "batch": batch,
        "base": base,
        "systems": {name: _row(name, built, figures, whole, kept, base=base) for name in figures},
        **_best(whole, built.systems),
        "failed": built.failed,
        "others_took": {name: others[name] for name in figures},
        "clocks": clocks,
    }
    for name, row in result["systems"].items():
        is_training = built.systems[name].optimizer is not None
        row["floor"] = roofline.fractions(
            row["step_images_per_s"]["median"],
            traffic,
            amp=built.systems[name].setting.amp,
            gb_per_s=args.rates["bandwidth"]["copy"]["best_gb_s"],
            training=is_training,
        )
    if args.trace is not None:
        result["trace"] = _trace(built.systems, result["best"], args, section=section)
    return result


def _row(
    name: str,
    built: Built,
    figures: dict[str, list[float]],
    whole: dict[str, list[float]],
    kept: dict[str, list[dict[str, float]]],
    *,
    base: str,
) -> dict[str, Any]:
    """One system's figures."""
    system, every = built.systems[name], kept[name]
    return {
        "title": system.title,
        "library": system.library,
        "kind": system.setting.kind,
        "images_per_s": harness.spread(figures[name]),
        "step_images_per_s": harness.spread(whole[name]),
        "ms": {
            stage: harness.spread([one[stage] for one in every], digits=3)
            for stage in STAGES
            if stage in every[0]
        },
        "times_base": harness.ratio(figures[name], figures[base]),
        "times_same": harness.ratio(figures[name], figures[same_as(system, list(figures))]),
        "first_call_s": built.first_call_s[name],
    }


def _best(whole: dict[str, list[float]], systems: dict[str, System]) -> dict[str, Any]:
    """Each library's best configuration by whole steps, and how ours compares with the others'."""
    medians = {name: float(harness.spread(values)["median"]) for name, values in whole.items()}
    best = best_names(medians, systems)
    ours = best.get("ours")
    return {
        "best": best,
        "best_ratio": {
            library: harness.ratio(whole[ours], whole[name])
            for library, name in best.items()
            if ours is not None and library != "ours"
        },
    }


def _busy(system: System) -> None:
    """One step, done: the host must not run seconds ahead of the device."""
    system.whole_step(no_mark)
    if system.setting.device.type == "cuda":
        torch.cuda.synchronize()


def _trace(
    systems: dict[str, System], best: dict[str, str], args: argparse.Namespace, *, section: str
) -> dict[str, Any]:
    """Trace one step of our best system."""
    if "ours" not in best:
        return {"file": "", "system": "none of ours could be measured", "kernels": []}
    path = tracing.named(args.trace, section)
    system = systems[best["ours"]]
    rows = tracing.traced(partial(system.whole_step, no_mark), path, device=args.device)
    return {"file": path.name, "system": best["ours"], "kernels": tracing.as_dicts(rows)}


def measured(
    built: Built,
    args: argparse.Namespace,
    *,
    section: str,
    batch: int,
    traffic: roofline.Traffic,
    model: str,
) -> dict[str, Any]:
    """Measure a section and put its systems into the roofline."""
    wanted = f"torchvision {wanted_kind(args)}"
    result = measure_systems(
        built, args, section=section, batch=batch, base=wanted, traffic=traffic
    )
    args.floors[model] = roofline.floor_entry(traffic)
    for name, row in result["systems"].items():
        system = built.systems[name]
        args.points.append(
            roofline.point(
                traffic,
                images_per_s=row["step_images_per_s"]["median"],
                amp=system.setting.amp,
                gb_per_s=args.rates["bandwidth"]["copy"]["best_gb_s"],
                training=system.optimizer is not None,
                model=model,
                library=system.library,
                system=name,
                batch=batch,
            )
        )
    built.systems.clear()
    release()
    return result


def wanted_kind(args: argparse.Namespace) -> str:
    """Torchvision as its references run it: contiguous, eager, in the first precision."""
    settings: list[Setting] = args.settings
    return settings[0 if args.channels_last else 1].kind
