"""From what scaling.py's ranks answered to the sections of its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import harness
import numpy as np

from scale.model import (
    Bucket,
    Cluster,
    Link,
    Prediction,
    Shape,
    bootstrap,
    fit_link,
    predict,
    ring_s,
)

LIMIT = 0.15  # of the prediction's error
KINDS = ("weak", "strong")

Answers = list[dict[str, Any]]  # of the ranks to one job


@dataclass(frozen=True)
class Measured:
    """One model's rounds.

    Attributes:
        size: Side of its pictures.
        batch: Of a rank in weak scaling, and of all ranks in strong scaling.
        worlds: Numbers of ranks beside one.
        facts: What a rank says of the model and its device.
        runs: Name -> for each round what the ranks answered; see `job_name`.
        others: Name -> share of the cores that other processes took.
        sweep_bytes: Sizes of the all-reduces in "sweep" runs.
    """

    size: int
    batch: int
    worlds: tuple[int, ...]
    facts: dict[str, Any]
    runs: dict[str, list[Answers]]
    others: dict[str, list[float]]
    sweep_bytes: tuple[int, ...]

    @property
    def rounds(self) -> int:
        """How many."""
        return len(self.runs["alone"])

    def share_of(self, kind: str, world: int) -> int:
        """Return a rank's batch."""
        return self.batch if kind == "weak" else self.batch // world

    def steps_ms(self, name: str) -> list[float]:
        """Return the mean step of each round, over ranks and steps."""
        return [1e3 * float(np.mean([a["steps_s"] for a in row])) for row in self.runs[name]]

    def draws(self, name: str, place: int) -> list[float]:
        """Return all ranks' steps of a round, in seconds."""
        return [step for answer in self.runs[name][place] for step in answer["steps_s"]]


def job_name(world: int, kind: str, form: str) -> str:
    """Return the name of a run of several ranks."""
    return f"{world} {kind} {form}"


def scaling_model(found: Measured, kind: str) -> dict[str, Any]:
    """Return a model's part of the section "weak" or "strong"."""
    alone = found.steps_ms("alone")
    base = [1e3 * found.batch / took for took in alone]
    ranks = {"1": _row(found, base, alone, base, world=1, kind=kind)}
    for world in found.worlds:
        if world == 1:
            continue
        together = found.steps_ms(job_name(world, kind, "together"))
        apart = found.steps_ms(job_name(world, kind, "apart"))
        images = [1e3 * world * found.share_of(kind, world) / took for took in together]
        row = _row(found, images, together, base, world=world, kind=kind)
        if kind == "weak":
            row["contention"] = harness.ratio(apart, alone)
        talk = harness.ratio(apart, together)
        traced = [_traced_ms(answers) for answers in found.runs[job_name(world, kind, "traced")]]
        row["communication"] = {
            "share": {
                "share": round(1 - talk["ratio"], 4),
                "low": round(1 - talk["high"], 4),
                "high": round(1 - talk["low"], 4),
            },
            "traced_ms": {
                name: harness.spread([one[name] for one in traced], digits=3)
                for name in ("busy", "overlapped", "exposed", "waiting", "transfer")
            },
            "exposed_share": harness.spread(
                [one["exposed"] / one["step"] for one in traced], digits=4
            ),
        }
        ranks[str(world)] = row
    return {"size": found.size, "batch": found.batch, "ranks": ranks, "others_took": found.others}


def _row(
    found: Measured,
    images: list[float],
    steps_ms: list[float],
    base: list[float],
    *,
    world: int,
    kind: str,
) -> dict[str, Any]:
    batch = found.share_of(kind, world)
    return {
        "batch_per_rank": batch,
        "global_batch": batch * world,
        "step_ms": harness.spread(steps_ms, digits=3),
        "images_per_s": harness.spread(images),
        "speedup": harness.ratio(images, base),
        "efficiency": harness.ratio([value / world for value in images], base),
    }


def _traced_ms(answers: Answers) -> dict[str, float]:
    """Return what of a traced step was spent on sending, means over steps and ranks.

    busy = overlapped + exposed: at least one collective was under way, beside the backward pass or
    while it had nothing to do. A collective lasts on each rank from its own call to the end; what
    it lasts longer than on the rank that called last is waiting for that one, not transfer.
    """
    steps: list[dict[str, float]] = []
    for place in range(len(answers[0]["traces"])):
        traces = [answer["traces"][place] for answer in answers]
        lasted = [_durations(trace) for trace in traces]
        shortest = [min(durations) for durations in zip(*lasted, strict=True)]
        for answer, trace, durations in zip(answers, traces, lasted, strict=True):
            blocking = durations[0]  # the normalizer
            last_ready = max(ready for _, ready, _ in trace["buckets"])
            last_end = max(end for _, _, end in trace["buckets"])
            overlapped = _covered(
                [(ready, min(end, last_ready)) for _, ready, end in trace["buckets"]]
            )
            exposed = blocking + last_end - last_ready
            steps.append(
                {
                    "busy": overlapped + exposed,
                    "overlapped": overlapped,
                    "exposed": exposed,
                    "waiting": sum(durations) - sum(shortest),
                    "transfer": sum(shortest),
                    "step": answer["steps_s"][place],
                }
            )
    return {name: 1e3 * float(np.mean([step[name] for step in steps])) for name in steps[0]}


def _durations(trace: dict[str, Any]) -> list[float]:
    pairs = [trace["normalizer"]]
    pairs += [(ready, end) for _, ready, end in trace["buckets"]]
    return [end - start for start, end in pairs]


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return how much of the time at least one interval covers."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def step_shape(found: Measured, name: str, picks: Sequence[int]) -> Shape:
    """Return the mean step of "apart" runs: when it has its gradients, and how many bytes."""
    answers = [answer for place in picks for answer in found.runs[name][place]]
    traces = [trace for answer in answers for trace in answer["traces"]]
    sizes = [size for size, _, _ in traces[0]["buckets"]]
    ready = np.mean([[row[1] for row in trace["buckets"]] for trace in traces], axis=0)
    return Shape(
        step_s=float(np.mean([step for answer in answers for step in answer["steps_s"]])),
        backward_end_s=float(np.mean([trace["backward_end"] for trace in traces])),
        buckets=tuple(Bucket(size, float(at)) for size, at in zip(sizes, ready, strict=True)),
    )


def sweep_seconds(found: Measured, world: int, picks: Sequence[int]) -> list[float]:
    """Return the median all-reduce of each size."""
    rows = found.runs[f"{world} sweep"]
    every = [
        [np.mean([a["seconds"][i] for a in rows[place]], axis=0) for place in picks]
        for i in range(len(found.sweep_bytes))
    ]
    return [float(np.median(np.concatenate(values))) for values in every]


def measured_link(found: Measured, world: int, picks: Sequence[int]) -> Link:
    """Return what the ranks of this machine talk over."""
    seconds = sweep_seconds(found, world, picks)
    return fit_link(found.sweep_bytes, seconds, ranks=world, title="measured on this machine")


def measured_overlap(found: Measured, world: int) -> float:
    """Return the share of an all-reduce's time that takes nothing from computation.

    A GPU's links move bytes by themselves. On a CPU it is the ranks' cores that copy and add: of
    what the sweep took of them (processor time over time), those that computing leaves free do a
    part, and the rest is taken from it. Cores that other processes took do not count.
    """
    if found.facts["device"] != "cpu":
        return 1.0
    name = f"{world} sweep"
    used = float(
        np.median([sum(a["cpu_s"] / a["wall_s"] for a in answers) for answers in found.runs[name]])
    )
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = (every or 1) * (1 - min(0.9, float(np.median(found.others[name]))))
    computing = min(cores, world * found.facts["threads"])
    stolen: float = max(0.0, used - (cores - computing)) / computing
    return 1.0 - min(1.0, stolen)


def prediction_model(found: Measured) -> dict[str, Any]:
    """Return a model's part of the section "prediction"."""
    worlds = [world for world in found.worlds if world > 1]
    if not worlds:
        return {"checks": [], "reason": "one rank: there is nothing to check it against"}
    every = list(range(found.rounds))
    largest = worlds[-1]
    fits = bootstrap(
        lambda picks: _link_figures(measured_link(found, largest, picks)), found.rounds
    )
    link = measured_link(found, largest, every)
    one_link = Cluster(link, link, largest)
    shape = step_shape(found, job_name(largest, "weak", "apart"), every)
    return {
        "link": {
            **{name: _rounded(value) for name, value in fits.items()},
            "ranks": largest,
            "sizes_bytes": list(found.sweep_bytes),
            "measured_us": [round(1e6 * took, 1) for took in sweep_seconds(found, largest, every)],
            "fitted_us": [
                round(1e6 * ring_s(size, largest, one_link), 1) for size in found.sweep_bytes
            ],
        },
        "overlap": round(measured_overlap(found, largest), 3),
        "buckets": [
            {"bytes": bucket.num_bytes, "ready": round(bucket.ready_s / shape.step_s, 3)}
            for bucket in shape.buckets
        ],
        "checks": [_check(found, kind, world) for world in worlds for kind in KINDS],
    }


def _link_figures(link: Link) -> dict[str, float]:
    return {"latency_us": link.latency_us, "gbytes_per_s": link.gbytes_per_s}


@dataclass(frozen=True)
class Inputs:
    """What a prediction is made of: nothing of it was measured in DDP among several ranks."""

    shape: Shape
    draws: list[list[float]]  # steps of each round, in seconds
    overlap: float
    contention: float


def model_inputs(found: Measured, kind: str, world: int) -> Inputs:
    """Return the inputs of all rounds."""
    every = list(range(found.rounds))
    apart = job_name(world, kind, "apart")
    alone = found.steps_ms("alone")
    beside = found.steps_ms(job_name(world, "weak", "apart"))
    return Inputs(
        shape=step_shape(found, apart, every),
        draws=[found.draws(apart, place) for place in every],
        overlap=measured_overlap(found, world),
        contention=float(np.median(beside) / np.median(alone)),
    )


def predict_rounds(
    found: Measured, inputs: Inputs, world: int, picks: Sequence[int]
) -> list[Prediction]:
    """Return the prediction for each of these rounds: its own steps, and the link of all."""
    link = measured_link(found, world, picks)
    cluster = Cluster(link, link, world)
    return [
        predict(
            inputs.shape,
            inputs.draws[place],
            world,
            cluster,
            overlap=inputs.overlap,
            contention=inputs.contention,
        )
        for place in picks
    ]


def _check(found: Measured, kind: str, world: int) -> dict[str, Any]:
    """Compare a prediction with the steps of DDP, which it was not made of."""
    together = found.steps_ms(job_name(world, kind, "together"))
    inputs = model_inputs(found, kind, world)

    def figures(picks: list[int]) -> dict[str, float]:
        steps = [1e3 * one.step_s for one in predict_rounds(found, inputs, world, picks)]
        predicted = float(np.median(steps))
        measured = float(np.median([together[place] for place in picks]))
        error = predicted / measured - 1
        return {"measured_ms": measured, "predicted_ms": predicted, "error": error}

    result: dict[str, Any] = {
        name: _rounded(value) for name, value in bootstrap(figures, found.rounds).items()
    }
    result["error"]["error"] = result["error"].pop("value")
    rounds = predict_rounds(found, inputs, world, list(range(found.rounds)))
    middle = sorted(rounds, key=lambda one: one.step_s)[len(rounds) // 2]
    parts = {name: round(1e3 * value, 3) for name, value in middle.parts.items()}
    return {
        "kind": kind,
        "ranks": world,
        **result,
        "within": abs(result["error"]["error"]) <= LIMIT,
        "parts_ms": parts,
    }


def _rounded(value: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 4) for name, figure in value.items()}
