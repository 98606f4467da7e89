"""The section "curve" of scaling.py's report: what its model says of many ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from scale.figures import (
    KINDS,
    Measured,
    job_name,
    measured_link,
    measured_overlap,
    step_shape,
)
from scale.model import LINKS, Cluster, Shape, normal_steps, predict

# Half of the byte floor of training on an H100 at 224 px with separate BatchNorm passes: what
# train_step.py is to reach on a GPU, until a GPU says what it does reach.
AIMS = {"mobilenetv3_small": 41_000.0, "mobilenetv3_large": 13_500.0}


def curve_model(architecture: str, found: Measured, args: argparse.Namespace) -> dict[str, Any]:
    """Return a model's part of the section "curve"."""
    largest = found.worlds[-1]
    every = list(range(found.rounds))
    shape = step_shape(found, job_name(largest, "weak", "apart"), every)
    curves = [_measured_curve(found, shape, args)]
    rate = args.given_rate or AIMS.get(architecture, 0.0)
    if rate:
        curves.append(_given_curve(shape, rate, args))
    return {"curves": curves}


def _measured_curve(found: Measured, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Ranks like this machine's."""
    on_cpu = found.facts["device"] == "cpu"
    largest = found.worlds[-1]
    every = list(range(found.rounds))
    name = args.link_intra or ("measured" if largest > 1 else "nvlink4")
    intra = measured_link(found, largest, every) if name == "measured" else LINKS[name]
    inter = LINKS[args.link_inter or ("eth10" if on_cpu else "ndr400")]
    cluster = Cluster(intra, inter, args.ranks_per_node or (largest if on_cpu else 8))
    # Ranks that fill a host are as slow as those here are beside each other.
    full = job_name(largest, "weak", "apart") if largest > 1 else "alone"
    draws = [found.draws(full, place) for place in every]
    middle = float(np.median([np.mean(row) for row in draws]))
    steps = [step / float(np.mean(row)) * middle for row in draws for step in row]
    whole = float(np.median(found.steps_ms("alone"))) / 1e3
    half = float(np.median(found.steps_ms("half"))) / 1e3
    fixed = max(0.0, 2 * half - whole) / whole  # share of a step that a smaller batch keeps
    one_rank = found.batch / whole
    overlap = measured_overlap(found, largest) if largest > 1 else 1.0
    points: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for ranks in args.curve_ranks:
        for kind in KINDS:
            batch = found.batch if kind == "weak" else found.batch * args.curve_ranks[0] / ranks
            if batch < 2 or batch != int(batch):
                continue  # BatchNorm needs two
            factor = fixed + (1 - fixed) * batch / found.batch
            scaled = [step * factor for step in steps]
            points[kind].append(
                _point(shape, scaled, ranks, cluster, int(batch), one_rank, args, overlap)
            )
    device = found.facts["device"]
    kind_of_rank = f"CPU, {found.facts['threads']} thread(s) each" if on_cpu else device
    return {
        "name": "measured",
        "title": f"ranks like this machine's ({kind_of_rank})",
        "batch_per_rank": found.batch,
        "step_ms": round(1e3 * middle, 3),
        "images_per_s_one": round(one_rank, 1),
        "links": _links(cluster),
        "overlap": round(overlap, 3),
        "points": points,
    }


def _given_curve(shape: Shape, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Ranks that are as fast as somebody says: the bytes are this model's."""
    intra = LINKS.get(args.link_intra or "nvlink4", LINKS["nvlink4"])
    inter = LINKS[args.link_inter or "ndr400"]
    cluster = Cluster(intra, inter, args.ranks_per_node or 8)
    step_s = args.given_batch / rate
    steps = normal_steps(step_s, args.jitter)
    points = [
        _point(shape, steps, ranks, cluster, args.given_batch, rate, args, 1.0)
        for ranks in args.curve_ranks
    ]
    origin = "as given" if args.given_rate else "the aim for an H100, not measured"
    return {
        "name": "given",
        "title": f"GPUs of {rate:.0f} images/s each ({origin})",
        "batch_per_rank": args.given_batch,
        "step_ms": round(1e3 * step_s, 3),
        "images_per_s_one": round(rate, 1),
        "jitter": args.jitter,
        "links": _links(cluster),
        "overlap": 1.0,
        "points": {"weak": points, "strong": []},
    }


def _point(
    shape: Shape,
    steps: Sequence[float],
    ranks: int,
    cluster: Cluster,
    batch: int,
    one_rank: float,
    args: argparse.Namespace,
    overlap: float,
) -> dict[str, Any]:
    """Return what is predicted for a number of ranks; `one_rank`: images/s of one alone."""
    local, nodes = cluster.shape(ranks)
    data_s = batch * local / args.data_rate if args.data_rate else 0.0
    found = predict(shape, steps, ranks, cluster, overlap=overlap, data_s=data_s)
    images = batch * ranks / found.step_s
    parts = found.parts
    exposed = parts["gradients"]
    return {
        "ranks": ranks,
        "nodes": nodes,
        "batch_per_rank": batch,
        "step_ms": round(1e3 * found.step_s, 3),
        "images_per_s": round(images, 1),
        "efficiency": round(images / ranks / one_rank, 4),
        "communication_ms": round(1e3 * found.communication_s, 4),
        "exposed_ms": round(1e3 * exposed, 4),
        "stragglers_ms": round(1e3 * parts["stragglers"], 4),
        "data_ms": round(1e3 * parts["data"], 4),
        "algorithm": found.algorithm,
        "node_images_per_s": round(images / nodes, 1),
    }


def _links(cluster: Cluster) -> dict[str, Any]:
    return {
        "intra": asdict(cluster.intra),
        "inter": asdict(cluster.inter),
        "ranks_per_node": cluster.ranks_per_node,
    }
