"""The measurements of one system, in its own interpreter: what is asked of it, in which order."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peers import damage
from peers.protocol import Outcome, Request, run_ranks
from peers.samples import read_pictures


def run(adapter: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return the raw results of an adapter, by measurement."""
    root, source = Path(job["root"]), Path(job["source"])
    places: dict[str, Path] = {}
    for variant in adapter.VARIANTS:
        places[variant] = root / variant.replace(" ", "_")
        places[variant].mkdir(parents=True)
        adapter.pack(source, places[variant], variant)
    results: dict[str, Any] = {
        "versions": adapter.versions(),
        "settings": adapter.SETTINGS,
        "variants": list(adapter.VARIANTS),
    }
    parts = {
        "order": _order,
        "resume": _resume,
        "elastic": _elastic,
        "evaluation": _evaluation,
        "damage": _damage,
    }
    seconds: dict[str, float] = {}
    for name, part in parts.items():
        started = time.perf_counter()
        results[name] = part(adapter, job, places)
        seconds[name] = round(time.perf_counter() - started, 1)
    started = time.perf_counter()
    scale = job["scale"]
    sizes = shard_sizes(scale["num_samples"], scale["num_shards"])
    results["scale"] = adapter.scale({**scale, "shard_sizes": sizes, "root": job["root"]})
    seconds["scale"] = round(time.perf_counter() - started, 1)
    results["seconds_by_part"] = seconds
    return results


def shard_sizes(num_samples: int, num_shards: int) -> list[int]:
    """Return the samples of each shard, as even as they can be."""
    return [num_samples // num_shards + (n < num_samples % num_shards) for n in range(num_shards)]


def _first(adapter: Any) -> str:
    return str(next(iter(adapter.VARIANTS)))


def _deliver(adapter: Any, request: Request, job: dict[str, Any]) -> dict[str, Any]:
    outcomes = run_ranks(adapter.deliver, request, limit_s=job["limit_s"])
    return {
        "world_size": request.world_size,
        "workers": request.workers,
        "ranks": [item.value["entries"] if item.value else None for item in outcomes],
        "touched": [item.value["touched"] if item.value else None for item in outcomes],
        "extra": [item.value["extra"] if item.value else None for item in outcomes],
        "state": outcomes[0].value["state"] if outcomes[0].value else None,
        "problem": next((_problem(item) for item in outcomes if item.value is None), None),
    }


def _problem(outcome: Outcome) -> str:
    if outcome.timed_out:
        return "no end within the time limit"
    return outcome.error or f"ended by {outcome.signal}"


def _request(job: dict[str, Any], place: Path, variant: str, **values: Any) -> Request:
    return Request(place=place, variant=variant, global_batch=job["global_batch"], **values)


def _order(adapter: Any, job: dict[str, Any], places: dict[str, Path]) -> list[dict[str, Any]]:
    """Read whole epochs on every world size and number of workers, in every variant."""
    runs = []
    for variant, kind in adapter.VARIANTS.items():
        if "order" not in kind:
            continue
        for workers in adapter.WORKERS:
            for world_size in job["world_sizes"]:
                if variant != _first(adapter) and workers != adapter.WORKERS[-1]:
                    continue
                request = _request(
                    job,
                    places[variant],
                    variant,
                    world_size=world_size,
                    workers=workers,
                    epochs=job["epochs"],
                )
                runs.append({"variant": variant, **_deliver(adapter, request, job)})
    return runs


def _resume(adapter: Any, job: dict[str, Any], places: dict[str, Path]) -> dict[str, Any] | None:
    """Stop two ranks after some steps, go on in new processes, beside a run without a stop."""
    variant = _first(adapter)
    request = _request(
        job, places[variant], variant, world_size=2, workers=adapter.WORKERS[-1], epochs=2
    )
    whole = _deliver(adapter, request, job)
    cuts = []
    for stop in job["stops"]:
        before = _deliver(adapter, replace(request, stop=stop), job)
        if before["state"] is None:
            return None if before["problem"] is None else {"problem": before["problem"]}
        after = _deliver(adapter, replace(request, state=before["state"]), job)
        cuts.append({"stop": stop, "before": before, "after": after})
    alone = replace(request, world_size=1, workers=adapter.WORKERS[0], epochs=1)
    before = _deliver(adapter, replace(alone, stop=job["stops"][-1]), job)
    after = _deliver(adapter, replace(alone, state=before["state"]), job)
    return {"whole": whole, "cuts": cuts, "alone": {"before": before, "after": after}}


def _elastic(adapter: Any, job: dict[str, Any], places: dict[str, Path]) -> list[dict[str, Any]]:
    """Go on with one epoch on other world sizes; also uninterrupted on the first of them."""
    variant = _first(adapter)
    walks = []
    for worlds in job["elastic"]:
        request = _request(
            job,
            places[variant],
            variant,
            world_size=worlds[0],
            workers=adapter.WORKERS[-1],
            epochs=1,
        )
        whole = _deliver(adapter, request, job)
        state: dict[str, Any] | None = None
        legs = []
        for leg, world_size in enumerate(worlds):
            last = leg == len(worlds) - 1
            step = replace(
                request,
                world_size=world_size,
                state=state,
                stop=None if last else job["elastic_steps"],
            )
            legs.append(_deliver(adapter, step, job))
            state = legs[-1]["state"]
            if not last and state is None:
                break
        walks.append({"worlds": worlds, "whole": whole, "legs": legs})
    return walks


def _evaluation(adapter: Any, job: dict[str, Any], places: dict[str, Path]) -> list[dict[str, Any]]:
    variant = _first(adapter)
    runs = []
    for world_size in job["evaluation_world_sizes"]:
        request = _request(
            job,
            places[variant],
            variant,
            world_size=world_size,
            workers=adapter.WORKERS[-1],
            epochs=1,
            evaluate=True,
        )
        runs.append(_deliver(adapter, request, job))
    return runs


def _damage(adapter: Any, job: dict[str, Any], places: dict[str, Path]) -> dict[str, Any]:
    """Read damaged copies of the packed data, each in a process of its own."""
    pictures = read_pictures(Path(job["source"]))
    table: dict[str, Any] = {}
    for variant, kind in adapter.VARIANTS.items():
        if "damage" not in kind:
            continue
        rows = {}
        for case in job["damage"]:
            copy = Path(job["root"]) / f"damaged-{variant}-{case.replace(' ', '-')}"
            shutil.copytree(places[variant], copy)
            outcome = damage.read_damaged(
                adapter, copy, variant, case, pictures, limit_s=job["damage_limit_s"]
            )
            rows[case] = None if outcome is None else asdict(outcome)
            shutil.rmtree(copy)
        table[variant] = rows
    return table
