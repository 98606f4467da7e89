"""How fast is a picture on a CPU, how large is the file, and what does 8 bits cost?

    python benchmarks/latency.py --model MODEL --data DATA      # a trained detector, its data set
    python benchmarks/latency.py --quick                        # random weights, drawn pictures

Every system goes from one canvas, uint8 [1, 3, S, S], to detections with its own post-process, with
one thread and with two, in interleaved rounds: our model in torch as it is, with batch norms folded
and (--compile) compiled; the exported ONNX files in float32 and int8 by onnxruntime; and
torchvision's `ssdlite320_mobilenet_v3_large` with the very same weights. Beside that: how far
onnxruntime's detections are from ours on at least 50 pictures with batches of 1 and 7, file sizes,
and, with --data, the scores of each file on a split.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import onnxruntime
import torch
from latency_models import stand_in, torchvision_twin
from torch import Tensor

from mbv3dist.data.index import open_split
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.check import (
    compare_detections,
    drawn_canvases,
    reference_detections,
    reference_outputs,
)
from mbv3dist.inference.export import export_onnx, export_torch
from mbv3dist.inference.fold import DeployedNetwork
from mbv3dist.inference.quantize import calibration_canvases, quantize_onnx
from mbv3dist.models.directory import LoadedModel, load_model, save_model
from mbv3dist.models.onnx_model import load_onnx, open_session
from mbv3dist.models.preprocess import normalize
from mbv3dist.ops.nms import Detections

BASE = "torchvision"
SYSTEMS = {
    BASE: "torchvision, the same weights",
    "torch": "ours, torch",
    "folded": "ours, torch, batch norms folded",
    "compiled": "ours, folded, torch.compile",
    "onnx": "ours, ONNX float32, onnxruntime",
    "int8": "ours, ONNX int8, onnxruntime",
}
OUTPUTS = ["boxes", "scores", "labels", "count"]
BATCHES = (1, 7)
NEARLY_EQUAL = 1e-5  # of scores: rounding decides their order


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Export, measure, compare."""
    started = time.time()
    loaded = load_model(args.model) if args.model else stand_in(args.classes)
    if loaded.spec.task != "detection":
        raise ValueError(f"--model {args.model} is a classifier; this measures detectors")
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        canvases = pictures(loaded, args)
        files, written = export_all(loaded, canvases, work, args)
        report = {
            **harness.header("latency", args.words),
            "model": describe(loaded, args),
            "versions": {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__},
            "pictures": len(canvases),
            "detections_per_picture": float(written["count"]),
            "agreement": agreement(loaded, files["onnx"], canvases),
            "sizes": {name: path.stat().st_size for name, path in files.items()},
            "latency": latency(loaded, files, canvases[: args.timed], args),
        }
        if args.data:
            report["scores"] = scores(loaded, files, args)
    report["seconds"] = round(time.time() - started, 1)
    return report


def pictures(loaded: LoadedModel, args: argparse.Namespace) -> Tensor:
    """Canvases of the split, or drawn ones."""
    if not args.data:
        return drawn_canvases(loaded.spec, args.pictures, seed=1)
    found = calibration_canvases(
        loaded.spec, str(args.data), split=args.split, num_pictures=args.pictures
    )
    return torch.from_numpy(np.concatenate(found))


def export_all(
    loaded: LoadedModel, canvases: Tensor, work: Path, args: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, float]]:
    """Write every file whose size or speed is of interest."""
    names = {"onnx": "model.onnx", "int8": "int8.onnx", "torch-export": "model.pt2"}
    files = {name: work / file for name, file in names.items()}
    export_onnx(loaded, files["onnx"])
    export_torch(loaded, files["torch-export"])
    if args.data:
        export_onnx(
            loaded, files["int8"], int8=str(args.data), split=args.calibrate, num_pictures=128
        )
    else:
        import onnx

        model = quantize_onnx(onnx.load(files["onnx"]), [canvases[:32].numpy()])
        files["int8"].write_bytes(model.SerializeToString())
    save_model(loaded.model, loaded.spec, work / "model")
    files["torch"] = work / "model" / "model.safetensors"
    files[BASE] = work / "torchvision.pth"
    buffer = io.BytesIO()
    torch.save(torchvision_twin(loaded).state_dict(), buffer)
    files[BASE].write_bytes(buffer.getvalue())
    session = open_session(files["onnx"], source="onnx")
    counts = [session.run(["count"], {"images": c[None].numpy()})[0].mean() for c in canvases]
    return files, {"count": float(np.mean(counts))}


def agreement(loaded: LoadedModel, file: Path, canvases: Tensor) -> dict[str, Any]:
    """How far onnxruntime's detections are from ours, from pixels to boxes, by batch size."""
    session = open_session(file, source=str(file))
    found: dict[str, Any] = {}
    for batch in BATCHES:
        row = {"pictures": 0, "detections": 0, "unmatched": 0, "boxes_px": 0.0, "scores": 0.0}
        row["other_order"] = 0
        for part in canvases.split(batch):
            theirs = Detections(
                *map(torch.from_numpy, session.run(OUTPUTS, {"images": part.numpy()}))
            )
            outputs = reference_outputs(loaded, part)
            ours = reference_detections(loaded, outputs["class_logits"], outputs["box_deltas"])
            both = compare_detections(ours, theirs)
            row["pictures"] += len(part)
            row["detections"] += both.detections // 2
            row["unmatched"] += both.unmatched
            row["boxes_px"] = max(row["boxes_px"], both.boxes_px)
            row["scores"] = max(row["scores"], both.scores)
            row["other_order"] += int(other_order(ours, theirs).sum())
        found[str(batch)] = row
    return found


def other_order(ours: Detections, theirs: Detections) -> Tensor:
    """Whether labels differ where no neighbour's score is nearly equal, bool [B]."""
    gaps = -ours.scores.diff(dim=1)
    distinct = torch.ones_like(ours.labels, dtype=torch.bool)
    distinct[:, 1:] &= gaps > NEARLY_EQUAL
    distinct[:, :-1] &= gaps > NEARLY_EQUAL
    return ((ours.labels != theirs.labels) & distinct).any(1)


def systems(
    loaded: LoadedModel, files: dict[str, Path], threads: int, args: argparse.Namespace
) -> dict[str, Callable[[Tensor], object]]:
    """What takes a canvas [1, 3, S, S] to detections, by name."""
    folded, twin = DeployedNetwork(loaded), torchvision_twin(loaded)

    def in_torch(canvas: Tensor) -> object:
        return reference_detections(loaded, *loaded.model(normalize(canvas, spec.preprocess)))

    def by(network: Callable[[Tensor], tuple[Tensor, Tensor]], canvas: Tensor) -> object:
        return reference_detections(loaded, *network(canvas))

    spec = loaded.spec
    calls: dict[str, Callable[[Tensor], object]] = {
        BASE: lambda canvas: twin([canvas[0].float() / 255]),
        "torch": in_torch,
        "folded": partial(by, folded),
    }
    if args.compile:
        calls["compiled"] = partial(by, torch.compile(folded, dynamic=False))
    for name in ("onnx", "int8"):
        session = open_session(files[name], source=name, num_threads=threads)
        calls[name] = partial(_run_session, session)
    return calls


def _run_session(session: Any, canvas: Tensor) -> object:
    return session.run(OUTPUTS, {"images": canvas.numpy()})


def latency(
    loaded: LoadedModel, files: dict[str, Path], canvases: Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Milliseconds a picture, batch of one, by number of threads and system."""
    found = {}
    before = torch.get_num_threads()
    for threads in args.threads:
        torch.set_num_threads(threads)
        others: dict[str, list[float]] = {}
        with torch.inference_mode():
            calls = systems(loaded, files, threads, args)
            runs = {name: partial(_ms, call, canvases) for name, call in calls.items()}
            for run in runs.values():
                run()  # warms up
            figures = harness.interleave(runs, rounds=args.rounds, quiet=args.quiet, others=others)
        found[str(threads)] = {
            "others_took": others,
            "systems": {
                name: {
                    "ms": harness.spread(figures[name], digits=2),
                    "faster_than_torchvision": harness.ratio(figures[BASE], figures[name]),
                }
                for name in figures
            },
        }
    torch.set_num_threads(before)
    return found


def _ms(call: Callable[[Tensor], object], canvases: Tensor) -> float:
    """Median over the pictures of one pass, in milliseconds."""
    times = []
    for canvas in canvases:
        started = time.perf_counter()
        call(canvas[None])
        times.append(time.perf_counter() - started)
    return 1000 * float(np.median(times))


def scores(loaded: LoadedModel, files: dict[str, Path], args: argparse.Namespace) -> dict[str, Any]:
    """Scores of model and files on the split."""
    split = open_split(args.data, args.split)
    models = {"torch": loaded, "onnx": load_onnx(files["onnx"]), "int8": load_onnx(files["int8"])}
    found = {}
    for name, each in models.items():
        result = evaluate(each.model, each.spec, split, batch_size=16, device="cpu")
        found[name] = {key: result[key] for key in ("samples", "map", "map_50", "voc_map")}
        found[name]["per_class"] = {key: row["ap"] for key, row in result["per_class"].items()}
    return found


def describe(loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
    """Which model was measured."""
    spec = loaded.spec
    return {
        "weights": "trained" if args.model else "random, made to look trained",
        "architecture": spec.architecture,
        "classes": len(spec.classes),
        "input_size": spec.input_size,
        "anchors": len(loaded.model.anchors),
    }


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    host, model = report["machine"], report["model"]
    lines = [
        "# Exported detectors on a CPU",
        "",
        f"`{report['command']}`, commit {report['commit']}, {report['seconds']:.0f} s.",
        f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, Python "
        f"{host['python']}, torch {report['versions']['torch']}, onnxruntime "
        f"{report['versions']['onnxruntime']}, load {host['load_1min']} at the end.",
        f"Model: {model['architecture']}, {model['classes']} classes, {model['input_size']} px, "
        f"{model['anchors']} anchors, weights {model['weights']}; "
        f"{report['detections_per_picture']:.0f} detections a picture.",
        "",
        "Milliseconds a picture from canvas to detections, batch of one; in brackets times faster "
        "than torchvision, with a 95 % interval.",
        "",
    ]
    threads = list(report["latency"])
    names = list(report["latency"][threads[0]]["systems"])
    rows = []
    for name in names:
        cells = [SYSTEMS[name]]
        for count in threads:
            row = report["latency"][count]["systems"][name]
            ms, faster = row["ms"], row["faster_than_torchvision"]
            cells.append(
                f"{ms['median']:.1f} ({faster['ratio']:.2f}x, {faster['low']:.2f} to "
                f"{faster['high']:.2f})"
            )
        size = report["sizes"].get(name)
        rows.append((*cells, "" if size is None else f"{size / 1e6:.2f} MB"))
    heads = [f"{count} thread{'s' if count != '1' else ''}" for count in threads]
    lines += harness.table(("system", *heads, "file"), rows)
    lines += [f"\nThe .pt2 file has {report['sizes']['torch-export'] / 1e6:.2f} MB."]
    for count in threads:
        shares = list(report["latency"][count]["others_took"].values())
        lines += [f"{count} thread(s): {harness.disturbance(shares)}"]
    return "\n".join([*lines, *agreement_lines(report), *score_lines(report), ""])


def agreement_lines(report: dict[str, Any]) -> list[str]:
    """Return how far onnxruntime's detections are from ours."""
    rows = [
        (
            batch,
            str(row["pictures"]),
            str(row["detections"]),
            str(row["unmatched"]),
            f"{row['boxes_px']:.1e}",
            f"{row['scores']:.1e}",
            str(row["other_order"]),
        )
        for batch, row in report["agreement"].items()
    ]
    head = ("batch", "pictures", "detections", "without counterpart", "boxes, px", "scores")
    size = report["model"]["input_size"]
    return [
        "",
        "onnxruntime's detections beside ours: largest differences, both from the same canvas of "
        f"{size} px. The order is looked at where scores are {NEARLY_EQUAL:g} apart.",
        "",
        *harness.table((*head, "pictures with another order"), rows),
    ]


def score_lines(report: dict[str, Any]) -> list[str]:
    """Return the scores, where a data set was given."""
    if "scores" not in report:
        return []
    rows = [
        (
            SYSTEMS[name],
            f"{row['map']:.4f}",
            f"{row['map_50']:.4f}",
            ", ".join(f"{label} {ap:.3f}" for label, ap in row["per_class"].items()),
        )
        for name, row in report["scores"].items()
    ]
    samples = next(iter(report["scores"].values()))["samples"]
    head = ("system", "mAP", "mAP@50", "AP")
    return ["", f"Scores on {samples} pictures:", "", *harness.table(head, rows)]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("Latency, size and accuracy of exported detectors.", rounds=9)
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory of a detector")
    parser.add_argument("--data", type=Path, metavar="DATA", help="data set that it was trained on")
    parser.add_argument("--split", default="test", help="for pictures and scores; default test")
    parser.add_argument("--calibrate", help="split for int8; default: train or trainval")
    parser.add_argument("--classes", type=int, default=20, help="without --model; default 20")
    parser.add_argument("--pictures", type=int, default=56, help="to compare; default 56")
    parser.add_argument("--timed", type=int, default=12, help="of them, for times; default 12")
    parser.add_argument("--threads", default="1,2", help="default 1,2")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    args = parser.parse_args(words)
    args.words = list(words)
    if args.quick:
        args.rounds, args.pictures, args.timed = 3, 14, 3
    if not all(word.isdigit() and int(word) > 0 for word in args.threads.split(",")):
        raise ValueError(f"--threads {args.threads}; it takes numbers like 1,2")
    args.threads = [int(word) for word in args.threads.split(",")]
    if min(args.rounds, args.pictures, args.timed, args.classes) < 1:
        raise ValueError("--rounds, --pictures, --timed and --classes must be at least 1")
    if args.data and not args.model:
        raise ValueError("--data needs --model: random weights have no score")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("latency", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
