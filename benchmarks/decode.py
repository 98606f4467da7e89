"""What does a picture cost, and where does the time go?

    python benchmarks/decode.py --data FOLDER            # class folder; drawn pictures without it
    python benchmarks/decode.py --quick

Three questions, on the pictures and views of `loader.py` (RandomResizedCrop to 224, flip):

- decoders: decode + crop + antialiased resize of files in memory, ours beside Pillow, torchvision
  and simplejpeg with OpenCV, with one thread and with two, all of the same crops; and how far the
  pixels are from Pillow's crop and antialiased resize;
- loader: our Loader with 1, 2, ... threads, and the share it reaches of what decoding alone of the
  same crops by as many threads gives;
- stages: where the time of a picture goes, with one thread.
"""

from __future__ import annotations

import argparse
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
import loader
import numpy as np
from child import Child, missing_modules
from PIL import Image

from mbv3dist.data.draws import Draws
from mbv3dist.data.views import random_resized_crop_view

SIZE = 224
DECODERS = {
    "ours": ("mbv3dist", ()),
    "pillow": ("Pillow", ("PIL", "numpy")),
    "torchvision": ("torchvision", ("torch", "torchvision")),
    "simplejpeg": ("simplejpeg + OpenCV linear", ("simplejpeg", "cv2")),
}
PARTS = ("decoders", "loader", "stages")
STAGES = {
    "read": "bytes of the shard, by the index; the pages are in memory",
    "parse": "headers and targets",
    "views": "random numbers, crops, boxes",
    "decode": "the region of the JPEG",
    "resize": "antialiased, onto the canvas, mirrored; with the calls around decoding",
    "collate": "targets to their places",
    "hand-over": "what is left: Python between the stages, queues, planning",
    "batch": "buffers and tensors of a batch, in other threads, beside the rest",
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the sections that were asked for."""
    sections = {}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in args.sizes.split(","):
            place = work.resolve() / name
            data = loader.prepare_pictures(place, name, args)
            for part in args.parts.split(","):
                print(f"decode: {part} of {name}", file=sys.stderr)
                started = time.time()
                result = MEASURES[part](place, args)
                sections[f"{part} {name}"] = {
                    "data": {key: value for key, value in data.items() if key != "labels"},
                    "rounds": min(len(shares) for shares in result["others_took"].values()),
                    **result,
                    **harness.header("decode", args.words),
                    "seconds": round(time.time() - started, 1),
                }
    return {**harness.header("decode", args.words), "sections": sections}


def save_views(place: Path, pictures: int) -> Path:
    """Draw a crop and a flip for each picture of the folder, for all decoders alike.

    Returns:
        A file with names (relative to the folder), crops int64 [n, 4], flips bool [n] and size.
    """
    folder, path = place / "folder", place / "views.npz"
    names = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.jpg"))[:pictures]
    crops = np.empty((len(names), 4), np.int64)
    for number, name in enumerate(names):
        with Image.open(folder / name) as image:
            width, height = image.size
        draws = Draws(0, epoch=0, sample=number)
        crops[number] = random_resized_crop_view(draws, width=width, height=height, size=SIZE).src
    flips = np.arange(len(names)) % 2 == 1
    np.savez(path, names=np.array(names), crops=crops, flips=flips, size=SIZE)
    return path


def measure_decoders(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure every decoder with one thread and with two."""
    views = str(save_views(place, args.pictures))
    reasons: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], float]] = {}
        for name, (title, needs) in DECODERS.items():
            python, lacking = choose_python(needs, args)
            if python is None:
                reasons[name] = f"not installed here ({lacking}); see `make bench-peers`"
                continue
            child = stack.enter_context(
                Child(python, "pixel_peers.decode_serve", name, work=place / "logs")
            )
            opened = child.ask({"do": "open", "views": views})
            difference = child.ask({"do": "difference"})
            rows[name] = {"title": title, **opened, "difference": difference}
            for threads in (1, 2):
                runs[f"{name} {threads}"] = partial(_rate, child, "pass", threads)
        for run in runs.values():
            run()  # warms up
        figures, others = _interleave(runs, args)
    for name, row in rows.items():
        one, two = figures[f"{name} 1"], figures[f"{name} 2"]
        row["images_per_s"] = {"1": harness.spread(one), "2": harness.spread(two)}
        row["scaling"] = harness.ratio(two, one)
        row["ours_is"] = harness.ratio(figures["ours 1"], one)
    return {"decoders": rows, "not_measured": reasons, "others_took": others}


def choose_python(needs: tuple[str, ...], args: argparse.Namespace) -> tuple[Path | None, str]:
    """Return the interpreter that has what a decoder needs, or None and what is missing."""
    own = Path(sys.executable)
    if not needs:
        return own, ""
    lacking = ""
    for python in (args.peers_python, own):
        missing = missing_modules(python, needs)
        if not missing:
            return python, ""
        lacking = ", ".join(sorted(missing))
    return None, lacking


def _interleave(
    runs: dict[str, Callable[[], float]], args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    others: dict[str, list[float]] = {}
    figures = harness.interleave(runs, rounds=args.rounds, quiet=args.quiet, others=others)
    return figures, others


def _rate(child: Child, what: str, threads: int) -> float:
    return float(child.ask({"do": what, "threads": threads})["images_per_s"])


def _ours(stack: ExitStack, place: Path, args: argparse.Namespace) -> Child:
    """Start the process that measures our Loader, with the pictures converted."""
    packed = place / "ours_peer"
    child = stack.enter_context(
        Child(Path(sys.executable), "pixel_peers.ours_stages", work=place / "logs")
    )
    if not (packed / "complete").is_file():
        packed.mkdir(exist_ok=True)
        child.ask({"do": "prepare", "folder": str(place / "folder"), "out": str(packed)})
        (packed / "complete").touch()
    child.ask({"do": "open", "place": str(packed), "batch": args.batch, "edge": args.edge})
    return child


def measure_loader(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the Loader, and decoding alone, with 1, 2, ... threads."""
    counts = [int(word) for word in args.threads.split(",")]
    with ExitStack() as stack:
        child = _ours(stack, place, args)
        runs: dict[str, Callable[[], float]] = {}
        for threads in counts:
            for what in ("loader", "limit"):
                runs[f"{what} {threads}"] = partial(_rate, child, what, threads)
        for run in runs.values():
            run()
        figures, others = _interleave(runs, args)
    first = figures[f"loader {counts[0]}"]
    return {
        "threads": {
            str(threads): {
                "loader_images_per_s": harness.spread(figures[f"loader {threads}"]),
                "limit_images_per_s": harness.spread(figures[f"limit {threads}"]),
                "share_of_limit": harness.ratio(
                    figures[f"loader {threads}"], figures[f"limit {threads}"]
                ),
                "scaling": harness.ratio(figures[f"loader {threads}"], first),
            }
            for threads in counts
        },
        "others_took": others,
    }


def measure_stages(place: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time of each stage, us a picture, in a Loader with one thread."""
    found: list[dict[str, float]] = []

    def watched(child: Child) -> float:
        found.append(child.ask({"do": "stages"})["us"])
        return sum(us for name, us in found[-1].items() if name != "batch")

    with ExitStack() as stack:
        # Two processes: what is watched stays so.
        runs: dict[str, Callable[[], float]] = {
            "watched": partial(watched, _ours(stack, place, args)),
            "unwatched": partial(_rate, _ours(stack, place, args), "loader", 1),
        }
        for run in runs.values():
            run()
        found.clear()
        figures, others = _interleave(runs, args)
    return {
        "others_took": others,
        "us": {name: harness.spread([item[name] for item in found]) for name in found[0]},
        "us_watched": harness.spread(figures["watched"]),
        "us_unwatched": harness.spread([1e6 / rate for rate in figures["unwatched"]]),
    }


MEASURES = {"decoders": measure_decoders, "loader": measure_loader, "stages": measure_stages}


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Decoding", ""]
    for name, part in report["sections"].items():
        host, data = part["machine"], part["data"]
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s, "
            f"{part['rounds']} rounds.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, Python "
            f"{host['python']}, load {host['load_1min']} at the end. Pictures: "
            f"{data['bytes_per_picture'] / 1000:.0f} KB each.",
            harness.disturbance(list(part["others_took"].values())),
            "",
            *TABLES[name.split()[0]](part),
            "",
        ]
    return "\n".join(lines)


def decoders_table(part: dict[str, Any]) -> list[str]:
    """Return decoders beside each other."""
    rows = part["decoders"].values()
    lines = harness.table(
        ("decoder", "1 thread, images/s", "2 threads", "2 / 1", "ours is", "levels from Pillow"),
        (
            (
                row["title"],
                _spread(row["images_per_s"]["1"]),
                _spread(row["images_per_s"]["2"]),
                f"{row['scaling']['ratio']:.2f}",
                f"{row['ours_is']['ratio']:.2f}x",
                f"{row['difference']['mean']:.3f}, worst {row['difference']['worst']:.2f}",
            )
            for row in rows
        ),
    )
    lines += [""]
    for row in rows:
        versions = ", ".join(f"{key} {value}" for key, value in row["versions"].items())
        lines.append(f"- {row['title']}: {versions}")
    lines += [f"- not measured: {DECODERS[k][0]}: {v}" for k, v in part["not_measured"].items()]
    return lines


def loader_table(part: dict[str, Any]) -> list[str]:
    """Return the Loader beside decoding alone."""
    return harness.table(
        ("threads", "Loader, images/s", "decoding alone", "share reached", "of one thread"),
        (
            (
                threads,
                _spread(row["loader_images_per_s"]),
                _spread(row["limit_images_per_s"]),
                f"{row['share_of_limit']['ratio']:.2f} ({row['share_of_limit']['low']:.2f} to "
                f"{row['share_of_limit']['high']:.2f})",
                f"{row['scaling']['ratio']:.2f}x ({row['scaling']['low']:.2f} to "
                f"{row['scaling']['high']:.2f})",
            )
            for threads, row in part["threads"].items()
        ),
    )


def stages_table(part: dict[str, Any]) -> list[str]:
    """Return the stages of one picture."""
    total = sum(row["median"] for name, row in part["us"].items() if name != "batch")
    rows = []
    for name, what in STAGES.items():
        us = part["us"][name]["median"]
        share = "" if name == "batch" else f"{100 * us / total:.1f} %"
        rows.append((name, what, f"{us:.1f}", share))
    return [
        *harness.table(("stage", "what", "us a picture", "share"), rows),
        "",
        f"Together {total:.1f} us a picture in one thread, the clocks included; "
        f"{part['us_unwatched']['median']:.1f} us in a Loader that nobody watches.",
    ]


TABLES = {"decoders": decoders_table, "loader": loader_table, "stages": stages_table}


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median']:.0f} ({row['p10']:.0f} to {row['p90']:.0f})"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("What decoding costs, and what the Loader makes of it.", rounds=7)
    cores = ",".join(str(n) for n in range(1, (os.cpu_count() or 1) + 1))
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CLASS/PICTURE.jpg")
    parser.add_argument("--sizes", default="originals,256", help="of originals,256")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--samples", type=int, default=2048, help="packed; default 2048")
    parser.add_argument("--pictures", type=int, default=512, help="for decoders; default 512")
    parser.add_argument("--threads", default=cores, help=f"of the Loader; default {cores}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--add", action="store_true", help="add the sections to those in --json")
    args = parser.parse_args(words)
    args.words, args.edge, args.voc = list(words), 4, None
    if args.quick:
        args.rounds, args.samples, args.pictures, args.batch, args.edge = 3, 128, 32, 16, 1
        args.sizes = "originals"
    for value, allowed in ((args.sizes, ("originals", "256")), (args.parts, PARTS)):
        if unknown := set(value.split(",")) - set(allowed):
            raise ValueError(f"{sorted(unknown)[0]!r} is none of {', '.join(allowed)}")
    if not all(word.isdigit() and int(word) > 0 for word in args.threads.split(",")):
        raise ValueError(f"--threads {args.threads}; it takes numbers like 1,2,4")
    if args.rounds < 1 or args.samples % args.batch or args.samples < 3 * args.edge * args.batch:
        raise ValueError(
            f"--samples {args.samples} must be a multiple of --batch {args.batch}, at least "
            f"{3 * args.edge} times it, and --rounds {args.rounds} at least 1"
        )
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("decode", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
