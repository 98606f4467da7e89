"""How fast are pictures brought into shards, what do smaller pictures cost, is raw worth it?

    python benchmarks/convert.py --data FOLDER           # CLASS/PICTURE.jpg; drawn without it
    python benchmarks/convert.py --quick

Four questions:

- copy: MB/s of clean JPEGs packed as they are, ours with all cores and with one beside
  webdataset's ShardWriter. Ours also looks at each picture's structure, writes an index, CRC-32s
  and SHA-256s, and waits until all of it is on the disk. `--work` on a tmpfs leaves the disk out;
- resize: images/s a core of decoding, resizing to 256 and encoding, beside Pillow and torchvision;
  and what a second core adds;
- quality: what JPEG at the final size costs, against the same pixels stored raw;
- raw: what training reads from raw members instead of JPEGs, at which size on disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
from child import Child, missing_modules
from convert_stored import (
    BATCH,
    measure_quality,
    measure_raw,
    quality_lines,
    raw_lines,
    repeated,
)
from convert_systems import QUALITY, SIDE, SYSTEMS
from pixel_peers import pictures

PARTS = ("copy", "resize", "quality", "raw")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts that were asked for."""
    sections: dict[str, Any] = {}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        work = work.resolve()
        folder = prepare_folder(work, args)
        for part in args.parts.split(","):
            print(f"convert: {part}", file=sys.stderr)
            started = time.time()
            result = MEASURES[part](work, folder, args)
            sections[part] = {
                "data": {
                    "source": "--data" if args.data else "drawn",
                    "filesystem": filesystem(work),
                    **facts(folder),
                },
                "rounds": args.rounds,
                **result,
                **harness.header("convert", args.words),
                "seconds": round(time.time() - started, 1),
            }
    return {**harness.header("convert", args.words), "sections": sections}


def prepare_folder(work: Path, args: argparse.Namespace) -> Path:
    """Make a class folder of upright RGB JPEGs; what is one already keeps its bytes."""
    folder, drawn = work / "different", work / "drawn"
    if not folder.is_dir():
        if args.data is None:
            pictures.write_pictures(drawn, args.drawn)
        found = pictures.list_folder(args.data or drawn)
        pictures.copy_folder(found, folder, samples=len(found))
    return folder


def facts(folder: Path) -> dict[str, Any]:
    """Return how many pictures a folder holds and how large they are."""
    sizes = [path.stat().st_size for path in folder.glob("*/*")]
    return {"pictures": len(sizes), "bytes_per_picture": round(sum(sizes) / len(sizes))}


def filesystem(folder: Path) -> str:
    """Return the kind of file system that a folder is on, where Linux tells."""
    mounts = Path("/proc/mounts")
    found = [(0, "unknown")]
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        place, kind = line.split()[1:3]
        if folder.is_relative_to(place):
            found.append((len(place), kind))
    return max(found)[1]


def open_system(stack: ExitStack, name: str, work: Path, args: argparse.Namespace) -> Child:
    """Start a system: ours in this interpreter, a peer in the peers' if that has it."""
    python = Path(sys.executable)
    if name != "ours" and not missing_modules(args.peers_python, SYSTEMS[name][1]):
        python = args.peers_python
    missing = missing_modules(python, SYSTEMS[name][1])
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} here; run `make bench-peers`")
    return stack.enter_context(Child(python, "convert_systems", name, work=work / "logs"))


def rates(
    names: dict[str, tuple[str, dict[str, Any]]],
    folder: Path,
    work: Path,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run all systems in turns and return their answers, round by round.

    Args:
        names: What is measured -> system and job.
        folder: The class folder to convert.
        work: For what is written.
        args: The command line.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        systems = sorted({system for system, _ in names.values()})
        children = {name: open_system(stack, name, work, args) for name in systems}
        versions = {name: child.ask({"versions": True}) for name, child in children.items()}

        def run(name: str) -> Callable[[], float]:
            system, job = names[name]

            def once() -> float:
                where = {"folder": str(folder), "out": str(work / "out" / system)}
                answers[name].append(children[system].ask({**job, **where}))
                return float(answers[name][-1]["seconds"])

            return once

        harness.interleave({name: run(name) for name in names}, rounds=args.rounds)
    return {"versions": versions, "answers": answers}


def measure_copy(work: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Pack pictures as they are."""
    size = facts(folder)["bytes_per_picture"]
    source = repeated(work, "copies", folder, max(args.copy_mb * 1_000_000 // size, 2))
    about = facts(source)
    megabytes = about["pictures"] * about["bytes_per_picture"] / 1e6
    found = rates(
        {
            "ours": ("ours", {"workers": args.workers}),
            "ours, one worker": ("ours", {"workers": 1}),
            "webdataset": ("webdataset", {"mtime_0": False}),
            "webdataset, mtime=0": ("webdataset", {"mtime_0": True}),
        },
        source,
        work,
        args,
    )
    speeds = {
        name: [megabytes / answer["seconds"] for answer in answers]
        for name, answers in found["answers"].items()
    }
    counts = found["answers"]["ours"][0]["counts"]
    assert counts.get("kept") == about["pictures"], counts
    return {
        "workers": args.workers,
        "pictures": about["pictures"],
        "megabytes": round(megabytes, 1),
        "versions": found["versions"],
        "megabytes_per_s": {name: harness.spread(values) for name, values in speeds.items()},
        "ratios": {
            f"ours / {name}": harness.ratio(speeds["ours"], values)
            for name, values in speeds.items()
            if name != "ours"
        },
    }


def measure_resize(work: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Decode, resize, encode."""
    source = repeated(work, "resizes", folder, args.resizes)
    many, one = {"workers": args.workers, "resize": SIDE}, {"workers": 1, "resize": SIDE}
    found = rates(
        {
            "ours": ("ours", many),
            "ours, one worker": ("ours", one),
            "torchvision": ("torchvision", {}),
            "pillow": ("pillow", {}),
        },
        source,
        work,
        args,
    )
    answers = found["answers"]
    speeds = {
        name: [answer["samples"] / answer["seconds"] for answer in answers[name]]
        for name in answers
    }
    # Without the start of the processes, which a large data set does not notice.
    steady = {
        name: [answer["prepared_per_s"] for answer in answers[name]]
        for name in ("ours", "ours, one worker")
    }
    core = "ours, one worker"
    return {
        "workers": args.workers,
        "pictures": args.resizes,
        "side": SIDE,
        "quality": QUALITY,
        "versions": found["versions"],
        "images_per_s": {name: harness.spread(values) for name, values in speeds.items()},
        "images_per_s_once_started": {n: harness.spread(values) for n, values in steady.items()},
        "ratios": {
            f"{args.workers} workers / 1": harness.ratio(speeds["ours"], speeds[core]),
            f"{args.workers} workers / 1, once started": harness.ratio(
                steady["ours"], steady[core]
            ),
            "a core / pillow": harness.ratio(speeds[core], speeds["pillow"]),
            "a core / torchvision": harness.ratio(speeds[core], speeds["torchvision"]),
        },
    }


MEASURES = {
    "copy": measure_copy,
    "resize": measure_resize,
    "quality": measure_quality,
    "raw": measure_raw,
}


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Conversion", ""]
    for name, part in report["sections"].items():
        host, data = part["machine"], part["data"]
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, Python "
            f"{host['python']}, load {host['load_1min']} at the end.",
            f"Data: {data['pictures']} different pictures ({data['source']}), "
            f"{data['bytes_per_picture'] / 1000:.0f} KB each, page cache warm, all on "
            f"{data['filesystem']}; "
            f"{part['rounds']} interleaved rounds.",
            "",
            *TABLES[name](part),
            "",
        ]
    return "\n".join(lines)


def _speed_table(part: dict[str, Any], key: str, unit: str, digits: int) -> list[str]:
    rows = [
        [name, f"{row['median']:.{digits}f}", f"{row['p10']:.{digits}f} to {row['p90']:.{digits}f}"]
        for name, row in part[key].items()
    ]
    return harness.table(["", unit, "10 % to 90 % of rounds"], rows)


def _ratio_lines(part: dict[str, Any]) -> list[str]:
    return [
        f"- {name}: {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        for name, row in part["ratios"].items()
    ]


def copy_lines(part: dict[str, Any]) -> list[str]:
    """Return what `measure_copy` found, as text."""
    head = f"{part['pictures']} files, {part['megabytes']:.0f} MB; {part['workers']} workers."
    table = _speed_table(part, "megabytes_per_s", "MB/s", 0)
    return [head, "", *table, "", *_ratio_lines(part)]


def resize_lines(part: dict[str, Any]) -> list[str]:
    """Return what `measure_resize` found, as text."""
    head = (
        f"{part['pictures']} files; shorter side {part['side']}, quality {part['quality']}; "
        f"{part['workers']} workers."
    )
    started = _speed_table(part, "images_per_s_once_started", "images/s once started", 0)
    table = _speed_table(part, "images_per_s", "images/s", 0)
    return [head, "", *table, "", *started, "", *_ratio_lines(part)]


TABLES = {
    "copy": copy_lines,
    "resize": resize_lines,
    "quality": quality_lines,
    "raw": raw_lines,
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: for values that do not go together.
    """
    parser = harness.parser("Conversion of pictures to shards, ours beside peers.", rounds=5)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CLASS/PICTURE.jpg")
    parser.add_argument("--small", type=Path, metavar="FOLDER", help="raw: such of 32 x 32 pixels")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--copy-mb", type=int, default=1000, help="to pack; default 1000")
    parser.add_argument("--resizes", type=int, default=2000, help="pictures; default 2000")
    parser.add_argument("--raw-samples", type=int, default=2048, help="of an epoch; default 2048")
    parser.add_argument("--add", action="store_true", help="add the sections to those in --json")
    args = parser.parse_args(words)
    args.words, args.drawn, args.raw_batches = list(words), 64, 48
    if args.quick:
        args.rounds, args.drawn, args.raw_batches = 1, 12, 4
        args.copy_mb, args.resizes, args.raw_samples = 4, 192, 2 * BATCH
    if set(args.parts.split(",")) - set(PARTS):
        raise ValueError(f"--parts {args.parts}; it takes {','.join(PARTS)}")
    if args.rounds < 1 or args.workers < 1 or args.raw_samples % BATCH:
        raise ValueError(f"--rounds and --workers from 1, --raw-samples a multiple of {BATCH}")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("convert", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
