"""What does a training step cost, ours beside torchvision's and timm's?

    python benchmarks/train_step.py             # all that this device can
    python benchmarks/train_step.py --quick
    python benchmarks/train_step.py --parts classifiers --variants large --json FILE --add

- classifiers: Small and Large at 224 px beside timm's and torchvision's: zero_grad, forward, loss,
  backward and optimiser, stages apart.
- detectors: SSDLite-Large at 320 px, of ours and of torchvision's `ssdlite320_mobilenet_v3_large`,
  with the same weights, pictures and boxes.
- inference: the classifiers' forward pass, ours with folded batch norms.
- layers: each layer of ours alone beside the time that its bytes take; where kernels could pay. By
  default on a GPU only.
- counts: dispatched operations and host synchronisations, of the detectors' loss and step.
- roofline: bandwidth of this device's memory and the bytes that must move, in every run that
  measures; each system's share of its floor.

On a CPU systems are eager in float32, in both memory formats. On a GPU they are measured in bf16
and fp16 (with a gradient scaler), contiguous, in channels_last, compiled in three modes, and as
CUDA graphs; `--amp`, `--compile`, `--no-cuda-graphs`, `--channels-last` choose. A configuration
that fails stands in the report with the reason. The report is saved after each part.

Systems take turns (A B C, A B C, ...), ratios are of medians of the same rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import roofline
import torch
import tracing
from machine import versions
from steps.counts import count_ops, count_syncs
from steps.inference import inference_system
from steps.layers import REPEATS, measure_layers
from steps.matrix import Built, build_all, no_mark, reason, settings_of
from steps.measure import measured
from steps.report import report_text
from steps.systems import (
    COMPILE_MODES,
    Setting,
    classifier,
    make_classifier,
    our_detector,
    their_detector,
)

from mbv3dist.models.ssdlite import SSDLite

PARTS = ("detectors", "counts", "classifiers", "inference", "layers")
CPU_PARTS = PARTS[:-1]
GPU_PARTS = ("classifiers", "detectors", "inference", "layers", "counts")  # most wanted first
VARIANTS = ("small", "large")
AMPS = ("no", "bf16", "fp16")
NUM_CLASSES = 20
Measure = Callable[[argparse.Namespace], dict[str, Any]]
AGREEMENT = {"no": 1e-4, "bf16": 0.05, "fp16": 0.05}  # of the two detectors' losses, relative


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for; save what there is after each section.

    Raises:
        RuntimeError: Of sections that failed, after the others are measured and saved.
    """
    args.points, args.floors = [], {}
    failed: list[str] = []
    report: dict[str, Any] = {**harness.header("train_step", args.words), "sections": {}}
    if set(args.parts) - {"counts"}:
        amps = tuple(args.amp)
        args.rates = roofline.measure_device(args.device, amps=amps, quick=args.quick)
    for name, run in sections_of(args).items():
        print(f"train_step: {name}", file=sys.stderr)
        started = time.time()
        try:
            found = {name: run(args)}
        except RuntimeError as error:
            failed.append(f"{name}: {reason(error)}")
            continue
        if args.points:
            found["roofline"] = {
                "device": device_name(args.device),
                **args.rates,
                "floors": dict(args.floors),
                "points": list(args.points),
            }
        for key, result in found.items():
            report["sections"].pop(key, None)  # the roofline goes last
            report["sections"][key] = {
                **result,
                **harness.header("train_step", args.words),
                "versions": versions("torch", "torchvision", "timm"),
                "device": device_name(args.device),
                "threads": torch.get_num_threads(),
                "amp": ",".join(args.amp),
                "seconds": round(time.time() - started, 1),
            }
        save(report, args)
    if failed:  # what was measured is saved
        raise RuntimeError("; ".join(failed))
    return report


def save(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Keep what there is so far, for a run that is cut off."""
    if args.json is None:
        return
    merged = add_points(report, args) if args.add else report
    args.json.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def add_points(report: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A saved report with this one's sections; the roofline keeps the points of both.

    The rates are this run's; each point has the limit that its own run's rates gave.
    """
    before = args.before.get("roofline")
    ours = report["sections"].get("roofline")
    if before and ours:
        mine = {(point["model"], point["what"]) for point in args.points}
        kept = [p for p in before["points"] if (p["model"], p["what"]) not in mine]
        ours["points"] = [*kept, *args.points]
        ours["floors"] = {**before["floors"], **args.floors}
    return harness.merged(report, args.json)


def sections_of(args: argparse.Namespace) -> dict[str, Measure]:
    """What is measured: section -> how, in its order."""
    found: dict[str, Measure] = {}
    for part in args.parts:
        if part in ("detectors", "counts"):
            found[part] = measure_detectors if part == "detectors" else measure_counts
            continue
        measure_one = {
            "classifiers": measure_classifiers,
            "inference": measure_inference,
            "layers": measure_kinds,
        }[part]
        for variant in args.variants:
            found[f"{part} {variant}"] = partial(measure_one, variant=variant)
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def measure_detectors(args: argparse.Namespace) -> dict[str, Any]:
    """SSDLite-Large of ours and torchvision's."""
    options = {"batch": args.batch, "num_classes": NUM_CLASSES}
    makes = {
        "ours": partial(our_detector, **options),
        "torchvision": partial(their_detector, **options),
    }
    built = build_all(makes, args.settings, limit_s=args.build_limit, budget_s=args.budget)
    losses = dict(built.first_losses)
    drop_deviating(built)
    traffic = roofline.count_traffic(SSDLite("large", num_classes=NUM_CLASSES), size=320)
    words = {"section": "detectors", "model": "detector large"}
    result = measured(built, args, batch=args.batch, traffic=traffic, **words)
    return {**result, "first_losses": losses}


def drop_deviating(built: Built) -> None:
    """Take out systems whose loss before any optimiser step is not the others'.

    They do something else, and are told among those that failed. Of two that differ both go.
    """
    losses = {name: built.first_losses[name] for name in built.systems}
    tolerance = max((AGREEMENT[system.setting.amp] for system in built.systems.values()), default=0)
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    middle = statistics.median(finite) if finite else math.nan
    for name, loss in losses.items():
        if not abs(loss - middle) <= tolerance / 2 * middle:
            del built.systems[name]
            built.failed[name] = f"its first loss is {loss:.6g}, the middle of all is {middle:.6g}"


def measure_counts(args: argparse.Namespace) -> dict[str, Any]:
    """Operations, those that wait by their names, and on a GPU the waits that torch sees."""
    rows: dict[str, dict[str, Any]] = {}
    for name, make in (("ours", our_detector), ("torchvision", their_detector)):
        on_gpu = args.device.type == "cuda"
        setting = Setting(args.device, amp=args.amp[0] if on_gpu else "no")
        system = make(setting, batch=args.batch, num_classes=NUM_CLASSES)
        assert system.loss_only is not None
        actions = {"loss": system.loss_only, "step": partial(system.step, no_mark)}
        if on_gpu:
            system.step(no_mark)  # kernels are chosen
        rows[name] = {what: count_ops(action) for what, action in actions.items()}
        if on_gpu:
            for what, action in actions.items():
                rows[name][what]["syncs_seen"] = count_syncs(action)
    return {"batch": args.batch, "systems": rows}


def measure_classifiers(args: argparse.Namespace, *, variant: str) -> dict[str, Any]:
    """A classifier's training at 224 px."""
    batch = args.classifier_batch
    makes = {
        library: partial(classifier, library, variant, batch=batch)
        for library in ("ours", "timm", "torchvision")
    }
    built = build_all(makes, args.settings, limit_s=args.build_limit, budget_s=args.budget)
    traffic = roofline.count_traffic(make_classifier("ours", variant), size=224)
    words = {"section": f"classifiers {variant}", "model": f"classifier {variant}"}
    return measured(built, args, batch=batch, traffic=traffic, **words)


def measure_inference(args: argparse.Namespace, *, variant: str) -> dict[str, Any]:
    """A classifier's forward pass at 224 px."""
    batch = args.classifier_batch
    makes = {
        library: partial(inference_system, library, variant, batch=batch)
        for library in ("ours", "timm", "torchvision")
    }
    built = build_all(makes, args.settings, limit_s=args.build_limit, budget_s=args.budget)
    traffic = roofline.count_traffic(make_classifier("ours", variant), size=224)
    words = {"section": f"inference {variant}", "model": f"classifier {variant}"}
    return measured(built, args, batch=batch, traffic=traffic, **words)


def measure_kinds(args: argparse.Namespace, *, variant: str) -> dict[str, Any]:
    """The layers of a classifier of ours, one by one, in the first precision."""
    return measure_layers(
        replace(args.settings[0], compile="", graph=False),
        variant=variant,
        batch=args.classifier_batch,
        gb_per_s=args.rates["bandwidth"]["copy"]["best_gb_s"],
        repeats=2 if args.quick else REPEATS,
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("A training step of ours beside torchvision's and timm's.", rounds=9)
    add = parser.add_argument
    add("--parts", help=f"of {','.join(PARTS)}; default: all, without layers on a CPU")
    add("--variants", help="of classifiers; default small,large, of a quick run on a CPU small")
    add("--batch", type=int, help="of detectors; default 8, on a GPU 64")
    add("--classifier-batch", type=int, help="default 16, on a GPU 256")
    add("--steps", type=int, help="in a round; default 1, on a GPU 20")
    add("--amp", help=f"of {','.join(AMPS)}; default no, on a GPU bf16,fp16")
    add(
        "--channels-last",
        action="store_true",
        help="measure this memory format alone (quick: does)",
    )
    add(
        "--compile",
        nargs="?",
        const="default",
        metavar="MODES",
        help=f"compiled systems too: no, or of {','.join(COMPILE_MODES)}; default: all on a GPU",
    )
    add(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="systems as CUDA graphs too; default: on a GPU",
    )
    add("--build-limit", type=float, default=180.0, help="seconds for making one system; 0: none")
    add("--budget", type=float, default=0.0, help="seconds for making a section's; 0: no end")
    add("--add", action="store_true", help="add the sections to those in --json")
    add("--device", help="default: cuda if there is one")
    add("--threads", type=int, help="of torch on the CPU; default: as launched")
    tracing.add_option(parser)
    args = parser.parse_args(words)
    args.words = list(words)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = args.device.type == "cuda"
    if args.quick:
        args.rounds = min(args.rounds, 2)
    small = args.quick and not on_gpu
    args.channels_last |= small
    args.batch = args.batch or (64 if on_gpu else 2 if small else 8)
    args.classifier_batch = args.classifier_batch or (256 if on_gpu else 4 if small else 16)
    args.steps = args.steps or (20 if on_gpu else 1)
    if args.threads:
        torch.set_num_threads(args.threads)
    _choose(args)
    if args.add and args.json is None:
        raise ValueError("--add needs --json FILE to add to")
    args.before = {}
    if args.add and args.json.is_file():
        args.before = json.loads(args.json.read_text(encoding="utf-8")).get("sections", {})
    return args


def _choose(args: argparse.Namespace) -> None:
    """Put parts, variants and settings into the arguments.

    Raises:
        ValueError: A word is unknown, or needs a GPU.
    """
    on_gpu = args.device.type == "cuda"
    if args.cuda_graphs and not on_gpu:
        raise ValueError("--cuda-graphs needs a GPU")
    default_parts = ",".join(GPU_PARTS if on_gpu else CPU_PARTS)
    args.parts = _words(args.parts or default_parts, PARTS, "--parts")
    default_variants = "small" if args.quick and not on_gpu else ",".join(VARIANTS)
    args.variants = _words(args.variants or default_variants, VARIANTS, "--variants")
    args.amp = _words(args.amp or ("bf16,fp16" if on_gpu else "no"), AMPS, "--amp")
    everything = on_gpu and not args.quick
    modes = args.compile or (",".join(COMPILE_MODES) if everything else "no")
    args.compile = [] if modes == "no" else _words(modes, COMPILE_MODES, "--compile")
    if args.cuda_graphs is None:
        args.cuda_graphs = on_gpu
    args.settings = settings_of(
        args.device,
        amps=args.amp,
        modes=args.compile,
        graphs=args.cuda_graphs,
        both_formats=not args.channels_last,
    )


def _words(text: str, known: Sequence[str], flag: str) -> list[str]:
    """A list of words with commas between them.

    Raises:
        ValueError: One is unknown.
    """
    found = text.split(",")
    if set(found) - set(known):
        raise ValueError(f"{flag} {text}: choose of {', '.join(known)}")
    return found


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    torch.backends.cudnn.benchmark = True  # as our training has it
    return harness.run("train_step", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
