"""How does training scale with the number of ranks, and how far would it go?

    python benchmarks/scaling.py                  # CPU: 1 and 2 ranks over gloo; GPUs: all, NCCL
    python benchmarks/scaling.py --quick
    python benchmarks/scaling.py --models mobilenetv3_large --amp bf16      # GPUs, 224 px

Our training step (see scale/step.py) runs on real processes, which live through the benchmark and
take turns in interleaved rounds: one rank alone; n ranks side by side that do DDP's work and send
nothing; n ranks in DDP as training has them; the same with everything that is sent timed; and
all-reduces of several sizes. Sections of the report:

- weak: the same batch on every rank; strong: the same global batch. Communication's share is what
  the step in DDP takes longer than side by side without it, waiting for each other included. Of the
  timed step: what was sent beside the backward pass (overlapped) and what the step got longer by
  (exposed).
- prediction: the model of scale/model.py, fed with the steps side by side and the link that the
  sweep shows, against the step in DDP, which it has not seen. The error may be 15 %.
- curve: what the model says of 8 to 1024 ranks, of this machine's kind or of a given rate.

What is not in the step: loading (unless `--data-rate`), validation, checkpoints, and the records of
every 20th step. Assumptions stand in ASSUMPTIONS and in every report.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
from machine import versions
from scale.curve import curve_model
from scale.figures import (
    KINDS,
    LIMIT,
    Answers,
    Measured,
    job_name,
    prediction_model,
    scaling_model,
)
from scale.model import LINKS
from scale.pool import Pool
from scale.report import report_text

ARCHITECTURES = (
    "mobilenetv3_small",
    "mobilenetv3_large",
    "ssdlite_mobilenetv3_small",
    "ssdlite_mobilenetv3_large",
)
# Of what training sends: the normalizer, and buckets of 2 MiB or a layer that is larger.
SWEEP_BYTES = (4, 1 << 14, 1 << 18, 1 << 20, 1 << 21, 1 << 22)
ASSUMPTIONS = {
    "prediction": [
        "Computation is taken from ranks that run side by side in DDP over groups of one: on a "
        "shared host they slow each other down, and that is measured, not modelled.",
        "A step waits for the slowest rank: steps of ranks are independent draws from those "
        "measured. On a host that ranks share the last one runs as fast as one alone meanwhile.",
        "An all-reduce takes latency + bytes / rate for each of the 2 (n - 1) messages of a ring; "
        "both figures are fitted to a sweep between otherwise idle ranks.",
        "The normalizer's all-reduce is hidden by the forward pass. Buckets are sent one after the "
        "other, each when its gradients are there, as measured in the backward pass; their sizes "
        "are those that DDP made.",
        "On a CPU sending takes the cores' time: the share of them that the sweep kept busy, less "
        "what computing leaves free, is taken from the backward pass. On GPUs nothing is.",
        "Not in it: caches that computing and sending contend for, and the ranks' wake-ups where "
        "other processes take the cores.",
    ],
    "curve": [
        "Links have the stated rate and latency at any load: no other traffic, no congestion, "
        "a network without a bottleneck between its switches. Nodes are full.",
        "Each bucket takes the faster of a ring over all ranks and of a hierarchy (ring in the "
        "node, double binary tree among nodes). The call's own launch is not counted.",
        "Every rank draws its step's length anew from those measured here (given: from a normal "
        "distribution); so none is worse than the worst one measured, and no node is always slow.",
        "Smaller batches in strong scaling: a fixed part and one by picture, from the whole and "
        "the half batch on one rank. Batches below 2 are left out: BatchNorm needs two.",
        "Ranks that fill a host compute as slowly as they do here beside each other; efficiency is "
        "against one rank alone.",
        "Given rates: the gradients come at the same shares of the step as on this machine.",
        "Data comes in time, unless --data-rate says what a node's loader delivers.",
    ],
}


def sweep_job(args: argparse.Namespace) -> dict[str, Any]:
    return {"job": "sweep", "sizes": list(SWEEP_BYTES), "repeats": args.sweep_repeats}


def make_jobs(
    pools: dict[int, Pool], batch: int, args: argparse.Namespace
) -> dict[str, Callable[[], Answers]]:
    """Return what is measured in a round, by name."""
    steps = {"job": "steps", "steps": args.steps}
    largest = pools[max(pools)]
    one = {**steps, "form": "alone"}
    jobs: dict[str, Callable[[], Answers]] = {
        "alone": partial(largest.ask, {**one, "batch": batch}, ranks=[0]),
        "half": partial(largest.ask, {**one, "batch": batch // 2}, ranks=[0]),
    }
    for world, pool in pools.items():
        forms = ("apart", "together", "traced") if world > 1 else ("apart",)
        for kind in KINDS:
            share = batch if kind == "weak" else batch // world
            for form in forms:
                job = {**steps, "form": form, "batch": share}
                jobs[job_name(world, kind, form)] = partial(pool.ask, job)
        if world > 1:
            jobs[f"{world} sweep"] = partial(pool.ask, sweep_job(args))
    return jobs


def seconds_of(answers: Answers) -> float:
    """Return the figure of a run: the mean step, or the mean all-reduce of a sweep."""
    return float(np.mean([answer.get("steps_s") or answer["seconds"] for answer in answers]))


def measure_model(architecture: str, pools: dict[int, Pool], args: argparse.Namespace) -> Measured:
    """Measure a model in all rounds."""
    size = args.size or args.default_sizes[architecture.startswith("ssdlite")]
    batch = args.batch or args.default_batch
    build = {"job": "build", "architecture": architecture, "size": size, "amp": args.amp}
    for pool in pools.values():
        facts = pool.ask({**build, "batch": batch, "delay_s": args.delay_s})[0]
    jobs = make_jobs(pools, batch, args)
    seen: dict[str, list[tuple[float, Answers]]] = {name: [] for name in jobs}

    def timed(name: str) -> float:
        answers = jobs[name]()
        seen[name].append((seconds_of(answers), answers))
        return seen[name][-1][0]

    others: dict[str, list[float]] = {}
    figures = harness.interleave(
        {name: partial(timed, name) for name in jobs},
        rounds=args.rounds,
        quiet=args.quiet,
        others=others,
    )
    # Of runs that were disturbed and done again, the answers that count are those of the figure.
    runs = {
        name: [next(a for f, a in seen[name] if f == figure) for figure in figures[name]]
        for name in jobs
    }
    return Measured(
        size=size,
        batch=batch,
        worlds=tuple(pools),
        facts=facts,
        runs=runs,
        others=others,
        sweep_bytes=SWEEP_BYTES,
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all models; return the report."""
    started = time.time()
    found: dict[str, Measured] = {}
    with ExitStack() as stack:
        folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: ranks that met in a file cannot meet there again.
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        pools = {
            world: stack.enter_context(
                Pool(world, device=args.device, threads=args.threads, work=work)
            )
            for world in args.worlds
        }
        for architecture in args.models:
            print(f"scaling: {architecture}", file=sys.stderr)
            found[architecture] = measure_model(architecture, pools, args)
    facts = next(iter(found.values())).facts
    head = harness.header("scaling", args.words)
    about = {
        **head,
        "versions": versions("torch", "accelerate", "timm"),
        "device": facts["device"],
        "backend": facts["backend"],
        "threads": facts["threads"],
        "amp": args.amp,
        "steps": args.steps,
    }
    sections: dict[str, dict[str, Any]] = {
        kind: {"models": {name: scaling_model(one, kind) for name, one in found.items()}}
        for kind in KINDS
    }
    sections["prediction"] = {
        "limit": LIMIT,
        "assumptions": ASSUMPTIONS["prediction"],
        "models": {name: prediction_model(one) for name, one in found.items()},
    }
    sections["curve"] = {
        "assumptions": ASSUMPTIONS["curve"],
        "data_rate": args.data_rate,
        "models": {name: curve_model(name, one, args) for name, one in found.items()},
    }
    seconds = round(time.time() - started, 1)
    return {
        **head,
        "sections": {
            name: {**section, **about, "seconds": seconds} for name, section in sections.items()
        },
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", default="", help=f"of {','.join(ARCHITECTURES)}")
    parser.add_argument(
        "--size", type=int, default=0, help="of pictures; default: 96, detectors 160; GPU 224, 320"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="of a rank; strong: of all ranks; default 8, GPU 128"
    )
    parser.add_argument("--ranks", type=int, default=0, help="most of them; default: GPUs, or 2")
    parser.add_argument("--steps", type=int, default=0, help="in a run; default 6, GPU 20")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each rank; default 1")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no")
    links = ", ".join(LINKS)
    parser.add_argument("--link-intra", help=f"of {links}, measured (on several ranks)")
    parser.add_argument("--link-inter", help=f"of {links}; default eth10 on a CPU, else ndr400")
    parser.add_argument("--ranks-per-node", type=int, default=0, help="default 8, on a CPU all")
    parser.add_argument("--curve-ranks", default="8,16,32,64,128,256,512,1024")
    parser.add_argument("--data-rate", type=float, default=0.0, help="images/s a node can load")
    parser.add_argument("--given-rate", type=float, default=0.0, help="images/s of a given GPU")
    parser.add_argument("--given-batch", type=int, default=256, help="of such a GPU; default 256")
    parser.add_argument(
        "--jitter", type=float, default=0.02, help="deviation of its steps; default 0.02"
    )
    # Slows every bucket's all-reduce: tests have to see it in the figures.
    parser.add_argument("--delay-s", type=float, default=0.0, help=argparse.SUPPRESS)


def count_gpus() -> int:
    """Return the number of GPUs, without making a context on one."""
    if sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):
        return 0  # no driver: importing torch would take seconds to say the same
    import torch

    return torch.cuda.device_count()


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("How training scales with its ranks, and a model of it.", rounds=9)
    add_options(parser)
    args = parser.parse_args(words)
    args.words = list(words)
    num_gpus = 0 if args.device == "cpu" else count_gpus()
    if args.device == "cuda" and num_gpus == 0:
        raise ValueError("--device cuda: there is no GPU here; it takes cpu")
    on_gpu = num_gpus > 0
    args.device = "cuda" if on_gpu else "cpu"
    args.ranks = args.ranks or (num_gpus if on_gpu else 2)
    if args.ranks < 1 or (on_gpu and args.ranks > num_gpus):
        most = f"1 to {num_gpus}, one for each GPU" if on_gpu else "1 or more"
        raise ValueError(f"--ranks {args.ranks}: give {most}")
    both = "mobilenetv3_small,ssdlite_mobilenetv3_small"
    args.models = (args.models or (ARCHITECTURES[0] if args.quick else both)).split(",")
    unknown = set(args.models) - set(ARCHITECTURES)
    if unknown:
        raise ValueError(f"--models {','.join(args.models)}: choose of {', '.join(ARCHITECTURES)}")
    quick = args.quick and not on_gpu
    # Of classifiers and of detectors.
    args.default_sizes = (224, 320) if on_gpu else (32, 64) if quick else (96, 160)
    args.default_batch = 128 if on_gpu else 4 if quick else 8
    args.steps = args.steps or (20 if on_gpu else 2 if quick else 6)
    args.sweep_repeats = 20 if on_gpu else 2 if quick else 4
    if args.quick:
        args.rounds = min(args.rounds, 2)
    _check_numbers(args)
    args.worlds = sorted({2**i for i in range(1, 20) if 2**i < args.ranks} | {args.ranks})
    batch = args.batch or args.default_batch
    parts = math.lcm(2, *args.worlds)  # 2: half a batch alone
    least = 2 * max(2, args.worlds[-1])
    if batch % parts or batch < least:
        raise ValueError(
            f"--batch {batch}: in strong scaling each rank gets an equal part of it, 2 pictures or "
            f"more; for {args.ranks} rank(s) give a multiple of {parts}, at least {least}"
        )
    return args


def _check_numbers(args: argparse.Namespace) -> None:
    for name, limit in (("rounds", 1), ("steps", 1), ("threads", 1), ("given_batch", 2)):
        if getattr(args, name) < limit:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {limit}")
    for name in ("batch", "size", "ranks_per_node", "data_rate", "given_rate", "jitter", "delay_s"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative")
    if args.given_rate and len(args.models) > 1:
        raise ValueError("--given-rate is of one model; name it with --models")
    if args.link_intra not in (None, "measured", *LINKS) or args.link_inter not in (None, *LINKS):
        raise ValueError(f"--link-intra and --link-inter: choose of {', '.join(LINKS)}")
    if args.link_intra == "measured" and args.ranks == 1:
        raise ValueError("--link-intra measured needs two ranks or more, to measure it")
    try:
        args.curve_ranks = sorted({int(word) for word in args.curve_ranks.split(",")})
    except ValueError:
        raise ValueError(
            f"--curve-ranks {args.curve_ranks}: give numbers, such as 8,64,1024"
        ) from None
    if args.curve_ranks[0] < 2:
        raise ValueError("--curve-ranks must be 2 or more")


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return harness.run("scaling", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
