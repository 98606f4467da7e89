"""What does a training step cost, ours beside torchvision's and timm's?

    python benchmarks/train_step.py                  # CPU: B=8 at 320 px; GPU: B=64
    python benchmarks/train_step.py --amp bf16 --compile --cuda-graphs      # GPU
    python benchmarks/train_step.py --quick

- detectors: SSDLite-Large at 320 px, forward + loss + backward, of ours and of torchvision's
  `ssdlite320_mobilenet_v3_large`, with the same weights, pictures and boxes; stages apart.
- counts: dispatched operations and host synchronisations, of the loss alone and of the step.
- classifiers: Small and Large at 224 px beside timm's and torchvision's.

Systems take turns (A B C, A B C, ...), ratios are of medians of the same rounds. Each system is
measured in both memory formats; ours trains in channels_last, torchvision's references do not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import torch
from machine import versions
from train_step_systems import (
    Clock,
    Setting,
    System,
    captured,
    classifier,
    count_ops,
    count_syncs,
    our_detector,
    their_detector,
)

STAGES = ("input", "forward", "loss", "backward", "graph", "optimizer")
COUNTED = ("forward", "loss", "backward", "graph")  # what a ratio is of
PARTS = ("detectors", "counts", "classifiers")
NUM_CLASSES = 20
AGREEMENT = 1e-4  # of the two detectors' losses, relative, in full precision


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for."""
    sections = {}
    for part in args.parts.split(","):
        print(f"train_step: {part}", file=sys.stderr)
        started = time.time()
        for name, result in MEASURES[part](args).items():
            sections[name] = {
                **result,
                **harness.header("train_step", args.words),
                "versions": versions("torch", "torchvision", "timm"),
                "device": device_name(args.device),
                "threads": torch.get_num_threads(),
                "amp": args.amp,
                "seconds": round(time.time() - started, 1),
            }
    return {**harness.header("train_step", args.words), "sections": sections}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """The ways in which each system is measured."""
    plain = Setting(args.device, amp=args.amp)
    formats = [replace(plain, channels_last=True)]
    if not args.channels_last:
        formats.append(plain)
    if args.compile:
        formats.append(replace(formats[0], compile=True))
    return formats


def build(make: Callable[[Setting], System], setting: Setting) -> System:
    """A system, captured as a graph if its setting says so."""
    system = make(setting)
    return captured(system) if setting.graph else system


def one_pass(
    system: System, device: torch.device, *, steps: int, batch: int, found: list[dict[str, float]]
) -> float:
    """Do some steps; add their mean stages to `found`; return pictures/s of what is compared."""
    clocks = []
    for _ in range(steps):
        system.optimizer.zero_grad(set_to_none="CUDA graph" not in system.title)
        clock = Clock(device)
        system.step(clock)
        system.optimizer.step()
        clock("optimizer")
        clocks.append(clock)  # read at the end: on a GPU reading waits, and the host may run ahead
    totals: dict[str, float] = {}
    for clock in clocks:
        for name, took in clock.stages().items():
            totals[name] = totals.get(name, 0.0) + took / steps
    found.append(totals)
    return 1000 * batch / sum(totals.get(name, 0.0) for name in COUNTED)


def measure_systems(
    systems: dict[str, System], args: argparse.Namespace, *, batch: int, base: str
) -> dict[str, Any]:
    """Measure systems in turns; ratios against the system named `base`."""
    stages: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    runs = {
        name: partial(
            one_pass, system, args.device, steps=args.steps, batch=batch, found=stages[name]
        )
        for name, system in systems.items()
    }
    for run in runs.values():
        run()  # warms up
    others: dict[str, list[float]] = {}
    figures = harness.interleave(runs, rounds=args.rounds, quiet=args.quiet, others=others)
    rows = {}
    for name, system in systems.items():
        every = stages[name][-args.rounds :]
        rows[name] = {
            "title": system.title,
            "images_per_s": harness.spread(figures[name]),
            "ms": {
                stage: harness.spread([one[stage] for one in every], digits=3)
                for stage in STAGES
                if stage in every[0]
            },
            "times_base": harness.ratio(figures[name], figures[base]),
            "times_same": harness.ratio(figures[name], figures[same_as(name, systems)]),
        }
    return {"batch": batch, "base": base, "systems": rows, "others_took": others}


def same_as(name: str, systems: dict[str, System]) -> str:
    """The name of torchvision's system in the same memory format, compiled if this one is."""
    kind = name.partition(" ")[2].replace("graph", "channels_last")
    return f"torchvision {kind}" if f"torchvision {kind}" in systems else name


def measure_detectors(args: argparse.Namespace) -> dict[str, Any]:
    """SSDLite-Large of ours and torchvision's."""
    systems, failed = {}, {}
    options = {"batch": args.batch, "num_classes": NUM_CLASSES}
    for setting in settings_of(args):
        kind = "channels_last" if setting.channels_last else "contiguous"
        kind += " compiled" if setting.compile else ""
        systems[f"ours {kind}"] = our_detector(setting, **options)
        systems[f"torchvision {kind}"] = their_detector(setting, **options)
    if args.cuda_graphs:
        graphed = replace(settings_of(args)[-1], channels_last=True, graph=True)
        try:
            systems["ours graph"] = build(partial(our_detector, **options), graphed)
        except RuntimeError as error:
            failed["ours graph"] = str(error).splitlines()[0]
    losses = first_losses(systems, tolerance=AGREEMENT if args.amp == "no" else 0.05)
    base = "torchvision channels_last" if args.channels_last else "torchvision contiguous"
    result = measure_systems(systems, args, batch=args.batch, base=base)
    return {"detectors": {**result, "first_losses": losses, "failed": failed}}


def first_losses(systems: dict[str, System], *, tolerance: float) -> dict[str, float]:
    """The loss of each system before any optimiser step; all must be the same.

    Raises:
        RuntimeError: They differ, so the systems do not do the same work.
    """
    losses = {}
    for name, system in systems.items():
        if "graph" not in name:
            losses[name] = float(system.step(lambda stage: None).detach())
    lowest, highest = min(losses.values()), max(losses.values())
    if highest - lowest > tolerance * highest:
        raise RuntimeError(f"the systems' losses differ: {losses}")
    return losses


def measure_counts(args: argparse.Namespace) -> dict[str, Any]:
    """Operations and synchronisations, counted on the CPU, and seen on the GPU if there is one."""
    rows: dict[str, dict[str, Any]] = {}
    for name, make in (("ours", our_detector), ("torchvision", their_detector)):
        on_cpu = make(Setting(torch.device("cpu")), batch=args.batch, num_classes=NUM_CLASSES)
        assert on_cpu.loss_only is not None
        rows[name] = {
            "loss": count_ops(on_cpu.loss_only),
            "step": count_ops(lambda system=on_cpu: system.step(lambda stage: None)),
        }
        if args.device.type == "cuda":
            on_gpu = make(Setting(args.device, amp=args.amp), batch=args.batch, num_classes=20)
            assert on_gpu.loss_only is not None
            on_gpu.step(lambda stage: None)
            rows[name]["loss"]["syncs_seen"] = count_syncs(on_gpu.loss_only)
            rows[name]["step"]["syncs_seen"] = count_syncs(
                lambda system=on_gpu: system.step(lambda stage: None)
            )
    return {"counts": {"batch": args.batch, "systems": rows}}


def measure_classifiers(args: argparse.Namespace) -> dict[str, Any]:
    """Classifiers at 224 px."""
    result = {}
    for variant in ("small", "large"):
        systems = {}
        for setting in settings_of(args):
            kind = "channels_last" if setting.channels_last else "contiguous"
            kind += " compiled" if setting.compile else ""
            for name in ("ours", "timm", "torchvision"):
                make = partial(classifier, name, variant, batch=args.classifier_batch)
                systems[f"{name} {kind}"] = make(setting)
        if args.cuda_graphs:
            graphed = replace(settings_of(args)[-1], channels_last=True, graph=True)
            for name in ("ours", "timm"):
                make = partial(classifier, name, variant, batch=args.classifier_batch)
                systems[f"{name} graph"] = build(make, graphed)
        base = "torchvision channels_last" if args.channels_last else "torchvision contiguous"
        result[f"classifiers {variant}"] = measure_systems(
            systems, args, batch=args.classifier_batch, base=base
        )
    return result


MEASURES = {
    "detectors": measure_detectors,
    "counts": measure_counts,
    "classifiers": measure_classifiers,
}


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Training steps", ""]
    for name, part in report["sections"].items():
        host = part["machine"]
        found = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
        lines += [
            f"## {name}, batch {part['batch']}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s. {found}.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {part['threads']} thread(s), device "
            f"{part['device']}, autocast {part['amp']}, load {host['load_1min']} at the end.",
            "",
            *(counts_table(part) if name == "counts" else systems_table(part)),
            "",
        ]
    return "\n".join(lines)


def systems_table(part: dict[str, Any]) -> list[str]:
    """Systems beside each other, with their stages."""
    rows = part["systems"].values()
    stages = [stage for stage in STAGES if any(stage in row["ms"] for row in rows)]
    base = part["systems"][part["base"]]["title"]
    lines = harness.table(
        (
            "system",
            "images/s",
            f"times {base}",
            "same format",
            *(f"{stage}, ms" for stage in stages),
        ),
        (
            (
                row["title"],
                f"{row['images_per_s']['median']:.1f} ({row['images_per_s']['p10']:.1f} to "
                f"{row['images_per_s']['p90']:.1f})",
                *(
                    f"{row[key]['ratio']:.2f} ({row[key]['low']:.2f} to {row[key]['high']:.2f})"
                    for key in ("times_base", "times_same")
                ),
                *(
                    f"{row['ms'][stage]['median']:.2f}" if stage in row["ms"] else ""
                    for stage in stages
                ),
            )
            for row in rows
        ),
    )
    lines += [
        "",
        "images/s and ratios are of forward + loss + backward; `same format`: times torchvision in "
        "the same memory format, and compiled if the system is.",
    ]
    if "first_losses" in part:
        values = ", ".join(f"{name} {value:.6f}" for name, value in part["first_losses"].items())
        lines.append(f"First losses: {values}.")
        lines += [f"- not measured: {name}: {why}" for name, why in part["failed"].items()]
    return [*lines, harness.disturbance(list(part["others_took"].values()))]


def counts_table(part: dict[str, Any]) -> list[str]:
    """Operations and synchronisations."""
    rows = []
    for name, counts in part["systems"].items():
        for what, row in counts.items():
            waits = ", ".join(f"{op} {number}" for op, number in row["waiting_ops"].items())
            seen = str(row.get("syncs_seen", "-"))
            rows.append((name, what, str(row["ops"]), str(row["waits"]), seen, waits or "none"))
    head = ("system", "what", "operations", "that wait", "seen on the GPU", "which")
    return harness.table(head, rows)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("A training step of ours beside torchvision's and timm's.", rounds=9)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--batch", type=int, help="of detectors; default 8, on a GPU 64")
    parser.add_argument("--classifier-batch", type=int, help="default 16, on a GPU 256")
    parser.add_argument("--steps", type=int, help="in a round; default 1, on a GPU 20")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument(
        "--channels-last", action="store_true", help="measure this memory format alone"
    )
    parser.add_argument("--compile", action="store_true", help="compiled systems too")
    parser.add_argument("--cuda-graphs", action="store_true", help="ours as a CUDA graph too")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; default: as launched")
    args = parser.parse_args(words)
    args.words = list(words)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        raise ValueError(f"--parts {args.parts}: choose of {', '.join(PARTS)}")
    on_gpu = args.device.type == "cuda"
    if args.cuda_graphs and not on_gpu:
        raise ValueError("--cuda-graphs needs a GPU")
    if args.quick:
        args.rounds = min(args.rounds, 2)
    quick = args.quick and not on_gpu
    args.batch = args.batch or (64 if on_gpu else 2 if quick else 8)
    args.classifier_batch = args.classifier_batch or (256 if on_gpu else 4 if quick else 16)
    args.steps = args.steps or (20 if on_gpu else 1)
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    torch.backends.cudnn.benchmark = True  # as our training has it
    return harness.run("train_step", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
