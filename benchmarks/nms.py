"""What does post-process cost: decode, threshold, top-k per class, NMS, the best detections?

    python benchmarks/nms.py            # 16 pictures on a CPU, 64 on a GPU when there is one
    python benchmarks/nms.py --quick
    python benchmarks/nms.py --trace trace.json.gz   # and where the time of ours goes

Raw outputs of SSDLite at 320 px (3234 anchors), 21 and 91 columns (background included), options of
torchvision's `ssdlite320_mobilenet_v3_large`. Systems, all measured in turn in the same run:

- torchvision: the method of a real `ssdlite320_mobilenet_v3_large`, picture by picture;
- one call: softmax, decoding and top-k for the whole batch, then one `batched_nms` over all
  pictures and classes (what people write to get rid of the loop);
- ours: `mbv3dist.ops.nms.postprocess`;
- ours in a graph: on a GPU, the same replayed;
- softmax, decode: those two alone, which every system needs.

Two kinds of outputs:

- dense: of a model that knows nothing yet. Logits are N(0, 1), so nearly every anchor has nearly
  every class above the threshold of 0.001; deltas are N(0, 1), boxes near their anchors;
- sparse: of a trained model. Up to 8 objects in a picture; anchors that overlap one by half see it
  (its class wins, deltas point at it), those between 0.3 and 0.5 half so; elsewhere background wins
  by N(10.5, 1) against N(0, 1), which leaves some hundreds of candidates above the threshold.

What torchvision finds and what ours finds is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
import tracing
from machine import versions
from nms_outputs import OPTIONS, SIZE, Outputs, make_outputs, one_call
from torch import Tensor
from torch.autograd import DeviceType
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from mbv3dist.ops.boxes import anchors_to_pixels
from mbv3dist.ops.nms import Detections, postprocess

SYSTEMS = {
    "torchvision": "torchvision, picture by picture",
    "one_call": "one batched_nms over the batch",
    "ours": "ours",
    "ours_graph": "ours in a CUDA graph",
    "common": "softmax, decode alone",
}
COLUMNS = (21, 91)
KINDS = ("dense", "sparse")
PAIR_INSTRUCTIONS = 15  # of an overlap: min, max, sub, mul, fma, compare
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def make_systems(outputs: Outputs) -> dict[str, Callable[[], Any]]:
    """Return what is timed."""
    columns, batch = outputs.logits.shape[-1], len(outputs.logits)
    model = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=columns
    ).eval()
    pixels = [anchors_to_pixels(outputs.anchors, SIZE)] * batch
    raw = {"bbox_regression": outputs.deltas, "cls_logits": outputs.logits}
    ours = partial(
        postprocess, outputs.logits, outputs.deltas, outputs.anchors, size=SIZE, **OPTIONS
    )
    systems: dict[str, Callable[[], Any]] = {
        "torchvision": partial(model.postprocess_detections, raw, pixels, [SIZE] * batch),
        "one_call": partial(one_call, outputs),
        "ours": ours,
        "common": outputs.scores_and_boxes,
    }
    if outputs.logits.is_cuda:
        ours()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours()
        systems["ours_graph"] = graph.replay
    return systems


def count_mismatches(theirs: list[dict[str, Tensor]], ours: Detections) -> int:
    """Return in how many pictures a box, a score, a label or their order differs."""
    wrong = 0
    for picture, found in enumerate(theirs):
        count = int(ours.count[picture])
        wrong += not (
            count == len(found["scores"])
            and torch.equal(ours.boxes[picture, :count], found["boxes"])
            and torch.equal(ours.scores[picture, :count], found["scores"])
            and torch.equal(ours.labels[picture, :count], found["labels"] - 1)
        )
    return wrong


def timed_ms(run: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call, until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def count_launches(run: Callable[[], object]) -> dict[str, int]:
    """Return what a call launches on the GPU (kernels, copies, fills) and how often it waits."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
    events = profile.events() or []
    return {
        "launches": sum(event.device_type == DeviceType.CUDA for event in events),
        "waits": sum(event.name in WAITS for event in events),
    }


def gpu_facts(outputs: Outputs, systems: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Launches and waits of a batch, and the floors: bytes moved once, overlaps that must be."""
    device = outputs.logits.device
    idle = count_launches(lambda: None)["waits"]
    counts = {}
    for name in ("ours", "one_call"):
        systems[name]()
        counts[name] = count_launches(systems[name])
    # The loop does the same for each picture: two of them are counted.
    two = Outputs(outputs.logits[:2], outputs.deltas[:2], outputs.anchors)
    counts["torchvision"] = count_launches(make_systems(two)["torchvision"])
    counts = {name: {**c, "waits": max(0, c["waits"] - idle)} for name, c in counts.items()}
    counts["torchvision"] = {
        name: value * len(outputs.logits) // 2 for name, value in counts["torchvision"].items()
    }
    found = systems["ours"]()
    tensors = (outputs.logits, outputs.deltas, outputs.anchors)
    tensors += (found.boxes, found.scores, found.labels, found.count)
    num_bytes = sum(x.numel() * x.element_size() for x in tensors)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_ms = min(timed_ms(partial(target.copy_, source), device) for _ in range(5))
    facts = {"counts": counts, "bytes": num_bytes, "bytes_floor_ms": num_bytes * copy_ms / 2**31}
    properties = torch.cuda.get_device_properties(device)
    clock_khz = getattr(properties, "clock_rate", 0)
    if clock_khz:
        instructions = needed_pairs(outputs) * PAIR_INSTRUCTIONS
        lanes = properties.multi_processor_count * 128
        facts["pairs_floor_ms"] = instructions / lanes / clock_khz
    return facts


def needed_pairs(outputs: Outputs) -> int:
    """Return how many overlaps NMS cannot do without.

    A box that is kept must be compared with all that were kept before it in its class, one that is
    dropped with one.
    """
    scores, _ = outputs.scores_and_boxes()
    most = OPTIONS["topk_candidates"]
    candidates = (scores[..., 1:] > OPTIONS["score_threshold"]).sum(1).clamp(max=int(most))
    num_classes = candidates.shape[1]
    options = {**OPTIONS, "max_detections": num_classes * int(most)}
    found = postprocess(
        outputs.logits,
        outputs.deltas,
        outputs.anchors,
        size=SIZE,
        **options,  # type: ignore[arg-type]
    )
    kept = torch.stack(
        [torch.bincount(row[row >= 0], minlength=num_classes) for row in found.labels]
    )
    return int((kept * (kept - 1) // 2 + candidates - kept).sum())


def measure_case(
    kind: str, columns: int, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one kind of outputs."""
    batch = args.batch or (64 if device.type == "cuda" else 16)
    outputs = make_outputs(kind, batch, columns, device)
    systems = make_systems(outputs)
    ours = systems["ours"]()
    mismatches = count_mismatches(systems["torchvision"](), ours)
    scores, _ = outputs.scores_and_boxes()
    above = (scores[..., 1:] > OPTIONS["score_threshold"]).float()
    candidates = above.sum(1).clamp(max=OPTIONS["topk_candidates"]).sum(1)
    others: dict[str, list[float]] = {}
    figures = harness.interleave(
        {name: partial(timed_ms, run, device) for name, run in systems.items()},
        rounds=args.rounds,
        quiet=args.quiet,
        others=others,
    )
    result = {
        "kind": kind,
        "columns": columns,
        "device": device.type,
        "batch": batch,
        "above_threshold": round(above.mean().item(), 4),
        "candidates_per_picture": round(candidates.mean().item(), 1),
        "detections_per_picture": round(ours.count.float().mean().item(), 1),
        "pictures_that_differ": mismatches,
        "ms": {name: harness.spread(values, digits=3) for name, values in figures.items()},
        "ours_is": {
            name: harness.ratio(figures[name], figures["ours"])
            for name in ("torchvision", "one_call", "common")
        },
        "others_took": others,
    }
    return result | (gpu_facts(outputs, systems) if device.type == "cuda" else {})


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases on every device."""
    if args.threads:
        torch.set_num_threads(args.threads)
    devices = [torch.device(name) for name in args.devices.split(",")]
    cases = []
    for device in devices:
        for columns in COLUMNS:
            for kind in KINDS:
                print(f"nms: {kind}, {columns} columns, {device.type}", file=sys.stderr)
                cases.append(measure_case(kind, columns, device, args))
    is_gpu = torch.cuda.is_available()
    traced = {} if args.trace is None else {"trace": trace(args.trace, devices[-1], args)}
    return {
        **harness.header("nms", args.words),
        "gpu": torch.cuda.get_device_name() if is_gpu else "none",
        "threads": torch.get_num_threads(),
        "versions": versions("torch", "torchvision", "numba", *(["triton"] if is_gpu else [])),
        "cases": cases,
        **traced,
    }


def trace(path: Path, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """Trace ours on the outputs of the last case: most columns, a trained model's."""
    kind, columns = KINDS[-1], COLUMNS[-1]
    batch = args.batch or (64 if device.type == "cuda" else 16)
    outputs = make_outputs(kind, batch, columns, device)
    inputs = (outputs.logits, outputs.deltas, outputs.anchors)
    run = partial(postprocess, *inputs, size=SIZE, **OPTIONS)  # type: ignore[arg-type]
    run()  # compiles
    rows = tracing.traced(run, path, device=device)
    what = f"ours, {device.type}, {batch} pictures, {columns} columns, {kind}"
    return {"file": path.name, "system": what, "kernels": tracing.as_dicts(rows)}


def report_text(report: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [f"GPU: {report['gpu']}. CPU threads: {report['threads']}.", ""]
    rows = []
    for case in report["cases"]:
        ms, ratios = case["ms"], case["ours_is"]
        rows.append(
            (
                f"{case['device']}, {case['batch']} pictures, {case['columns']} columns, "
                f"{case['kind']}",
                f"{case['candidates_per_picture']:.0f}",
                *(
                    f"{ms[name]['median']:.2f}" if name in ms else ""
                    for name in ("torchvision", "one_call", "ours", "ours_graph", "common")
                ),
                *(
                    f"{row['ratio']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
                    for row in (ratios["torchvision"], ratios["one_call"])
                ),
                str(case["pictures_that_differ"]),
            )
        )
    head = ("outputs", "candidates", *(f"{title}, ms" for title in SYSTEMS.values()))
    head += ("ours against torchvision", "against one call", "pictures that differ")
    lines += harness.table(head, rows)
    gpu = [case for case in report["cases"] if "counts" in case]
    if gpu:
        lines += ["", *harness.table(("outputs", *GPU_HEAD), [_gpu_row(case) for case in gpu])]
    lines += [
        "",
        harness.disturbance([x for c in report["cases"] for x in c["others_took"].values()]),
    ]
    if "trace" in report:
        found = report["trace"]
        lines += ["", f"One call of {found['system']} ({found['file']}):", ""]
        lines += tracing.kernel_table(tracing.from_dicts(found["kernels"]))
    return "\n".join(lines) + "\n"


GPU_HEAD = (
    "launches and waits: torchvision",
    "one call",
    "ours",
    "bytes floor, ms",
    "overlaps floor, ms",
    "ours in a graph over their sum",
)


def _gpu_row(case: dict[str, Any]) -> tuple[str, ...]:
    counts = (case["counts"][name] for name in ("torchvision", "one_call", "ours"))
    pairs = case.get("pairs_floor_ms")
    floor = case["bytes_floor_ms"] + (pairs or 0)
    return (
        f"{case['columns']} columns, {case['kind']}",
        *(f"{row['launches']}, {row['waits']}" for row in counts),
        f"{case['bytes_floor_ms']:.4f}",
        "" if pairs is None else f"{pairs:.4f}",
        f"{case['ms']['ours_graph']['median'] / floor:.1f}",
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("What post-process costs, beside torchvision's.", rounds=7)
    default = "cpu,cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--devices", default=default, help=f"of cpu, cuda; default {default}")
    parser.add_argument("--batch", type=int, default=0, help="default: 16 on a CPU, 64 on a GPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU")
    tracing.add_option(parser)
    args = parser.parse_args(words)
    args.words = list(words)
    if args.quick:
        args.rounds, args.batch = min(args.rounds, 2), args.batch or 2
    for name in args.devices.split(","):
        if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"--devices {name}: there is none here; it takes {default}")
    if args.rounds < 1 or args.batch < 0 or args.threads < 0:
        raise ValueError("--rounds must be at least 1, --batch and --threads at least 0")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("nms", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
