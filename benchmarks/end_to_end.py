"""How fast is training as a whole, from files to stepped weights, ours beside the peers'?

    python benchmarks/end_to_end.py --data FOLDER --voc FOLDER     # without: drawn pictures
    python benchmarks/end_to_end.py --parts small,large,detector --amp bf16       # on a GPU
    python benchmarks/end_to_end.py --quick

Ours is `mbv3dist train` as users run it, on shards made by `mbv3dist convert`; the peers are loops
around torchvision's and timm's data sets, loaders and models: in the form of torchvision's
reference scripts, and in the fastest form that its own parts allow. Each is a process of its own
with the same number of workers or threads, reading the same pictures from the page cache, and
waits while others run; rounds are interleaved. A round is one epoch, of which the first steps, in
which a loader gets going, are not timed. Told beside images/s is the share of the time in which
the device had no batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import tracing
from child import Child
from end_to_end_systems import TITLES
from pixel_peers import pictures

PARTS = ("small", "large", "detector")
SIZES = {"small": 224, "large": 224, "detector": 320}
DELAYED = "ours_delayed"
DRAWN = 128  # different pictures, where none are given


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for; save what there is after each."""
    sections: dict[str, Any] = {}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in args.parts.split(","):
            data = prepare(work.resolve(), part, args)
            sections[part] = measure_part(data, part, args)
            report = {**harness.header("end_to_end", args.words), "sections": sections}
            if args.json is not None:
                args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def samples_of(part: str, args: argparse.Namespace) -> int:
    """How many pictures an epoch has: a round is one."""
    return int((args.warm + args.steps) * batch_of(part, args))


def batch_of(part: str, args: argparse.Namespace) -> int:
    """The batch of a part."""
    return int(args.detector_batch if part == "detector" else args.batch)


def prepare(work: Path, part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make the folder that the peers read and the shards that ours reads; return where they are."""
    is_detector = part == "detector"
    samples = samples_of(part, args)
    place = work / f"{'voc' if is_detector else 'classes'}-{samples}"
    folder, shards = place / "folder", place / "ours"
    source = args.voc if is_detector else args.data
    if not shards.is_dir():
        print(f"end_to_end: preparing {samples} pictures", file=sys.stderr)
        width, height = (320, 240) if args.quick else (500, 375)
        count = 16 if args.quick else DRAWN
        if is_detector:
            if source is None:
                source = place / "drawn"
                pictures.write_voc(source, count, width=width, height=height)
            pictures.copy_voc(source, folder, samples=samples)
        else:
            if source is None:
                source = place / "drawn"
                pictures.write_pictures(source, count, width=width, height=height)
            pictures.copy_folder(pictures.list_folder(source), folder, samples=samples)
        kind, split = ("voc", "trainval") if is_detector else ("imagefolder", "train")
        words = [sys.executable, "-m", "mbv3dist", "convert", kind, str(folder), "--split", split]
        done = subprocess.run([*words, "--out", str(shards)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"convert failed: {(done.stderr or done.stdout).strip()}")
    split = "trainval" if is_detector else "train"
    from mbv3dist.data.index import open_split

    return {
        "source": "drawn" if source is None or source.name == "drawn" else source.resolve().name,
        "samples": samples,
        "classes": len(open_split(shards, split).classes),
        "place": place,
    }


def systems_of(part: str, args: argparse.Namespace) -> list[str]:
    """Ours and its peers; when quick, ours delayed as well, which has to be seen."""
    if args.quick:
        return ["ours", DELAYED, "torchvision"]
    return ["ours", "torchvision", "torchvision_tuned", *(["timm"] if part != "detector" else [])]


def measure_part(data: dict[str, Any], part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all systems on one task."""
    batch = batch_of(part, args)
    job = {
        "model": part,
        "folder": str(data["place"] / "folder"),
        "place": str(data["place"]),
        "samples": data["samples"],
        "classes": data["classes"],
        "size": SIZES[part] if args.size is None else args.size,
        "batch": batch,
        "warm": args.warm,
        "steps": args.steps,
        "workers": args.workers,
        "threads": args.threads,
        "device": args.device,
        "amp": args.amp,
    }
    answers: dict[str, list[dict[str, float]]] = {}
    versions: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    others: dict[str, list[float]] = {}
    kernels: list[str] = []
    started = time.time()
    with ExitStack() as stack:
        runs = {}
        for name in systems_of(part, args):
            print(f"end_to_end: {part}: {TITLES[name]}", file=sys.stderr)
            child = stack.enter_context(
                Child(
                    Path(sys.executable),
                    "end_to_end_systems",
                    name,
                    work=data["place"] / "logs",
                    with_gpu=args.device == "cuda",
                )
            )
            versions[name] = child.ask({"do": "open", **job})["versions"]
            answers[name] = []
            runs[name] = partial(one_round, child, answers[name])
            runs[name]()  # the first is a cold one
        figures = harness.interleave(
            runs,
            rounds=args.rounds,
            failed=failed,
            errors=(RuntimeError,),
            quiet=args.quiet,
            others=others,
        )
        if "ours" not in figures:
            raise RuntimeError(f"ours has no figure: {failed['ours']}")
        if args.trace is not None:
            path = args.trace.resolve()
            trace = path.with_name(f"{part}-{path.name}")
            ours = _child_of(runs["ours"])
            kernels = ours.ask({"do": "trace", "path": str(trace), **job})["kernels"]
    return {
        "data": {key: data[key] for key in ("source", "samples", "classes")},
        "settings": {key: job[key] for key in SHOWN},
        **harness.header("end_to_end", args.words),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "seconds": round(time.time() - started, 1),
        "base": "torchvision",
        "systems": {
            name: row_of(name, figures, answers[name][-args.rounds :], versions[name])
            for name in figures
        },
        "others_took": others,
        "failed": failed,
        "kernels": kernels,
    }


SHOWN = ("model", "size", "batch", "warm", "steps", "workers", "threads", "amp")


def _child_of(run: partial[float]) -> Child:
    child: Child = run.args[0]
    return child


def one_round(child: Child, answers: list[dict[str, float]]) -> float:
    """Train for a round; return images/s."""
    answer = child.ask({"do": "round"})
    answers.append(answer)
    return float(answer["images"] / answer["seconds"])


def row_of(
    name: str,
    figures: dict[str, list[float]],
    answers: list[dict[str, float]],
    versions: dict[str, str],
) -> dict[str, Any]:
    """What the table says of a system."""
    base = figures.get("torchvision", figures["ours"])
    waits = {
        key: harness.spread([one[f"{key}_s"] / one["seconds"] for one in answers], digits=4)
        for key in ("host_wait", "device_wait")
    }
    return {
        "title": TITLES[name],
        "images_per_s": harness.spread(figures[name]),
        "times_base": harness.ratio(figures[name], base),
        "ours_is": harness.ratio(figures["ours"], figures[name]),
        **waits,
        "data_wait": waits["device_wait"],
        "versions": versions,
    }


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Training from files to stepped weights", ""]
    for name, part in report["sections"].items():
        host, settings = part["machine"], part["settings"]
        lines += [
            f"## {name}, {settings['size']} px, batch {settings['batch']}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s.",
            f"Machine: {host['cpu']}, {host['cores']} cores, Python {host['python']}, device "
            f"{part['device']}, autocast {settings['amp']}, load {host['load_1min']} at the end.",
            f"Data: {part['data']['samples']} pictures ({part['data']['source']}), page cache; "
            f"{settings['workers']} workers or threads; {settings['warm']} steps to get warm, then "
            f"{settings['steps']} timed.",
            "",
            *table_of(part),
            "",
            *(f"- not measured: {TITLES[key]}: {why}" for key, why in part["failed"].items()),
            harness.disturbance(list(part["others_took"].values())),
            "",
        ]
        if part["kernels"]:
            lines += ["What ours spends its time in (one round):", "", *part["kernels"], ""]
    return "\n".join(lines)


def table_of(part: dict[str, Any]) -> list[str]:
    """Systems beside each other."""
    return harness.table(
        ("training", "ours is (95 % interval)", "images/s", "device waits for data", "host waits"),
        (
            (
                row["title"],
                f"{row['ours_is']['ratio']:.2f}x ({row['ours_is']['low']:.2f} to "
                f"{row['ours_is']['high']:.2f})",
                f"{row['images_per_s']['median']:.1f} ({row['images_per_s']['p10']:.1f} to "
                f"{row['images_per_s']['p90']:.1f})",
                *(f"{100 * row[key]['median']:.1f} %" for key in ("device_wait", "host_wait")),
            )
            for row in part["systems"].values()
        ),
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("Training as a whole, ours beside the peers'.", rounds=5)
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}; default small,detector; GPU: all")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CLASS/PICTURE.jpg")
    parser.add_argument("--voc", type=Path, metavar="FOLDER", help="detector: VOC folder")
    parser.add_argument("--batch", type=int, help="of classifiers; default 16, on a GPU 256")
    parser.add_argument("--detector-batch", type=int, help="default 8, on a GPU 64")
    parser.add_argument("--steps", type=int, help="timed in a round; default 12, on a GPU 80")
    parser.add_argument("--warm", type=int, help="steps before; default 4, on a GPU 20")
    parser.add_argument("--size", type=int, help="canvas; default 224, detector 320")
    parser.add_argument("--workers", type=int, help="or threads; default 2, on a GPU all cores")
    parser.add_argument("--threads", type=int, help="of torch on a CPU; default: all cores")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    tracing.add_option(parser)
    args = parser.parse_args(words)
    args.words = list(words)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    cores = os.cpu_count() or 1
    default = "small" if args.quick else ",".join(PARTS) if on_gpu else "small,detector"
    args.parts = args.parts or default
    if unknown := sorted(set(args.parts.split(",")) - set(PARTS)):
        raise ValueError(f"--parts {unknown[0]}: choose of {', '.join(PARTS)}")
    if args.quick:
        args.rounds, args.batch, args.detector_batch = min(args.rounds, 2), 4, 2
        args.warm, args.steps, args.threads = 1, 4, args.threads or 1
        args.size = args.size or 96
    args.batch = args.batch or (256 if on_gpu else 16)
    args.detector_batch = args.detector_batch or (64 if on_gpu else 8)
    args.steps = args.steps or (80 if on_gpu else 12)
    args.warm = args.warm or (20 if on_gpu else 4)
    args.workers = args.workers or (cores if on_gpu else 2)
    args.threads = args.threads or (0 if on_gpu else cores)
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("end_to_end", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
