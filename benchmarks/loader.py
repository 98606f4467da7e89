"""How many training pictures a second does a loader deliver, ours beside the peers'?

    python benchmarks/loader.py --data FOLDER            # class folder; drawn pictures without it
    python benchmarks/loader.py --task detection --voc FOLDER
    python benchmarks/loader.py --quick

Every pipeline is a process of its own that lives through the run and works when it is its turn,
with 2 workers or threads, on pictures in the page cache, for RandomResizedCrop to 224 and a flip
(detection: zoom-out, IoU crop, flip, 320), batches of 64 (32), as its documentation has it. Rounds
are interleaved; each runs an epoch to get warm, then whole epochs of which the middle is timed.
What came is counted: a pipeline that does not deliver every picture of an epoch has no figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
from child import Child, missing_modules
from pixel_peers import pictures
from pixel_peers.systems import (
    CHECKED,
    CLASSIFICATION,
    DELAYED,
    DELAYED_SYSTEM,
    DETECTION,
    OURS,
    QUICK,
    System,
)

SIZES = {"classification": 224, "detection": 320}
PIL_PEER = {"classification": "torchvision_pil", "detection": "detection_pil"}
WORKERS = 2
DELAY_S = 0.25  # a batch; more than ours takes for one
DRAWN = 256  # different pictures, where none are given


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the sections that were asked for."""
    choose_systems(args)  # a wrong name is told before anything is done
    sections = {}
    with ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ["detection"] if args.task == "detection" else args.sizes.split(","):
            place = work.resolve() / name
            data = prepare_pictures(place, name, args)
            sections[name] = measure_section(place, name, data, args)
    return {**harness.header("loader", args.words), "sections": sections}


def prepare_pictures(place: Path, section: str, args: argparse.Namespace) -> dict[str, Any]:
    """Make the folder that a section reads, unless --work has it, and return what it is."""
    source = args.voc if section == "detection" else args.data
    wanted = {
        "source": source.resolve().name if source else "drawn",
        "samples": args.samples,
        "quick": args.quick,
    }
    about = place / "about.json"
    if about.is_file():
        data: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
        if {key: data[key] for key in wanted} != wanted:
            raise ValueError(f"{place} holds other pictures ({data}); choose another --work")
        return data
    if place.is_dir() and any(place.iterdir()):
        raise ValueError(f"{place} is not empty and not of this benchmark; choose another --work")
    print(f"loader: preparing the pictures of {section}", file=sys.stderr)
    folder = place / "folder"
    if section == "detection":
        _prepare_voc(folder, args)
    else:
        _prepare_classes(folder, section, args)
    files = [p for p in folder.rglob("*.jpg") if p.is_file()]
    data = {**wanted, "bytes_per_picture": round(sum(p.stat().st_size for p in files) / len(files))}
    if section != "detection":
        data["labels"] = _count_labels(folder)
    about.write_text(json.dumps(data), encoding="utf-8")
    return data


def _prepare_classes(folder: Path, section: str, args: argparse.Namespace) -> None:
    drawn = folder.parent / "drawn"
    if args.data is None:
        width, height = (320, 240) if args.quick else (500, 375)
        pictures.write_pictures(drawn, 32 if args.quick else DRAWN, width=width, height=height)
    whole = folder if section == "originals" else folder.parent / "whole"
    pictures.copy_folder(pictures.list_folder(args.data or drawn), whole, samples=args.samples)
    if section == "256":
        pictures.resize_folder(whole, folder)


def _prepare_voc(folder: Path, args: argparse.Namespace) -> None:
    drawn = folder.parent / "drawn"
    if args.voc is None:
        width, height = (320, 240) if args.quick else (640, 480)
        pictures.write_voc(drawn, 32 if args.quick else DRAWN, width=width, height=height)
    pictures.copy_voc(args.voc or drawn, folder, samples=args.samples)


def _count_labels(folder: Path) -> list[list[int]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    return [[number, len(list(path.iterdir()))] for number, path in enumerate(classes)]


def choose_systems(args: argparse.Namespace) -> dict[str, System]:
    """Return what to measure.

    Raises:
        ValueError: For a name that is none.
    """
    systems = {**(DETECTION if args.task == "detection" else CLASSIFICATION)}
    if args.quick:
        systems = {OURS: systems[OURS], DELAYED: DELAYED_SYSTEM} | {
            name: system for name, system in systems.items() if name not in (OURS, CHECKED)
        }
    names = args.only.split(",") if args.only else list(systems)
    if unknown := sorted(set(names) - set(systems)):
        raise ValueError(f"no pipeline {unknown[0]!r}; --only takes {', '.join(systems)}")
    return {name: systems[name] for name in dict.fromkeys([OURS, *names])}


def find_python(
    systems: Mapping[str, System], peers: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the interpreter of each pipeline, and why the others have none.

    A peer may run in our interpreter too, if that has all it needs and the peers' has not.
    """
    own = Path(sys.executable)
    modules = {module for system in systems.values() for module in system.needs}
    missing = {python: missing_modules(python, modules) for python in (peers, own)}
    pythons, reasons = {}, {}
    for name, system in systems.items():
        found = [python for python in (peers, own) if not missing[python] & set(system.needs)]
        if not system.needs:
            pythons[name] = own
        elif found:
            pythons[name] = found[0]
        else:
            lacking = min((sorted(gone & set(system.needs)) for gone in missing.values()), key=len)
            reasons[name] = f"not installed here ({', '.join(lacking)}); see `make bench-peers`"
    return pythons, reasons


def measure_section(
    place: Path, section: str, data: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Measure all pipelines on one folder of pictures."""
    systems = choose_systems(args)
    pythons, reasons = find_python(systems, args.peers_python)
    if args.quick:
        left_out = [name for name in pythons if name not in QUICK]
        reasons |= dict.fromkeys(left_out, "installed, left out by --quick")
        pythons = {name: pythons[name] for name in pythons if name not in left_out}
    answers: dict[str, dict[str, Any]] = {}
    versions: dict[str, dict[str, str]] = {}
    others: dict[str, list[float]] = {}
    started = time.time()
    with ExitStack() as stack:
        runs = {}
        for name, python in pythons.items():
            try:
                child = stack.enter_context(_child(name, systems[name], python, place))
                versions[name] = _open(child, name, systems[name], place, args)
            except RuntimeError as error:
                if name == OURS:
                    raise
                reasons[name] = f"failed: {error}"
                continue
            runs[name] = partial(_round, child, name, data, answers, args)
        figures = harness.interleave(
            runs,
            rounds=args.rounds,
            failed=reasons,
            errors=(RuntimeError,),
            quiet=args.quiet,
            others=others,
        )
    if OURS not in figures:
        raise RuntimeError(f"ours has no figure: {reasons[OURS]}")
    return {
        "data": {key: value for key, value in data.items() if key != "labels"},
        "settings": {
            "batch": args.batch,
            "workers": WORKERS,
            "size": SIZES[args.task],
            "rounds": min(len(values) for values in figures.values()),
            "seconds_a_round": args.seconds,
        },
        **harness.header("loader", args.words),
        "seconds": round(time.time() - started, 1),
        "systems": {
            name: {
                "title": systems[name].title,
                "images_per_s": harness.spread(values),
                "ours_is": harness.ratio(figures[OURS], values),
                "others_took": others[name],
                "output": answers[name]["output"],
                "settings": systems[name].settings,
                "versions": versions[name],
            }
            for name, values in figures.items()
        },
        "not_measured": {
            name: {"title": systems[name].title, "reason": text} for name, text in reasons.items()
        },
    }


def _child(name: str, system: System, python: Path, place: Path) -> Child:
    return Child(python, "pixel_peers.serve", system.module, name, work=place / "logs")


def _open(
    child: Child, name: str, system: System, place: Path, args: argparse.Namespace
) -> dict[str, str]:
    """Pack the pictures in the system's format, unless that was done, and open its loader."""
    print(f"loader: {system.title}", file=sys.stderr)
    packed = place / system.module
    if not (packed / "complete").is_file():
        packed.mkdir(exist_ok=True)
        child.ask({"do": "prepare", "folder": str(place / "folder"), "out": str(packed)})
        (packed / "complete").touch()
    job = {
        "do": "open",
        "folder": str(place / "folder"),
        "place": str(packed),
        "task": args.task,
        "size": SIZES[args.task],
        "batch": args.batch,
        "workers": WORKERS,
        "delay_s": DELAY_S,
    }
    versions: dict[str, str] = child.ask(job)["versions"]
    return versions


def _round(
    child: Child,
    name: str,
    data: dict[str, Any],
    answers: dict[str, dict[str, Any]],
    args: argparse.Namespace,
) -> float:
    """Run one round and return images/s.

    Raises:
        RuntimeError: When it failed, or did not deliver each picture once an epoch.
    """
    edge = args.edge * args.batch
    job = {"do": "round", "warm": edge, "tail": edge, "seconds": args.seconds}
    answer = answers[name] = child.ask(job)
    expected = data.get("labels") or [[number, 1] for number in range(data["samples"])]
    if answer["labels"] != [[number, count * answer["epochs"]] for number, count in expected]:
        got = sum(count for _, count in answer["labels"]) / answer["epochs"]
        raise RuntimeError(f"an epoch of {data['samples']} pictures delivered {got:g}, or others")
    return float(answer["samples"] / answer["seconds"])


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Loaders", ""]
    for name, part in report["sections"].items():
        data, settings, host = part["data"], part["settings"], part["machine"]
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {host['system']}, Python "
            f"{host['python']}, load {host['load_1min']} at the end.",
            f"Data: {data['samples']} samples, {data['bytes_per_picture'] / 1000:.0f} KB each, "
            f"page cache. Batch {settings['batch']}, {settings['workers']} workers or threads, "
            f"canvas {settings['size']}, {settings['rounds']} interleaved rounds of at least "
            f"{settings['seconds_a_round']:g} s.",
            harness.disturbance([row["others_took"] for row in part["systems"].values()]),
            "",
            *section_table(part),
            "",
            *comparison(name, part),
            *(f"- not measured: {item['title']}: {item['reason']}" for item in _absent(part)),
            "",
            "What was set:",
            "",
        ]
        for row in part["systems"].values():
            versions = ", ".join(f"{key} {value}" for key, value in row["versions"].items())
            lines.append(f"- {row['title']} ({versions}): {row['settings']}")
        lines.append("")
    return "\n".join(lines)


def _absent(part: dict[str, Any]) -> list[dict[str, str]]:
    return list(part["not_measured"].values())


def section_table(part: dict[str, Any]) -> list[str]:
    """Return the table of one section, the fastest first."""
    rows = sorted(part["systems"].values(), key=lambda row: -row["images_per_s"]["median"])
    return harness.table(
        ("pipeline", "output", "images/s", "p10 to p90", "ours is (95 % interval)"),
        (
            (
                row["title"],
                row["output"],
                f"{row['images_per_s']['median']:.0f}",
                f"{row['images_per_s']['p10']:.0f} to {row['images_per_s']['p90']:.0f}",
                f"{row['ours_is']['ratio']:.2f}x ({row['ours_is']['low']:.2f} to "
                f"{row['ours_is']['high']:.2f})",
            )
            for row in rows
        ),
    )


def comparison(section: str, part: dict[str, Any]) -> list[str]:
    """Return ours beside the best peer and beside torchvision's PIL pipeline, in words."""
    peers = {k: row for k, row in part["systems"].items() if not k.startswith(OURS)}
    if not peers:
        return []
    best = max(peers.values(), key=lambda row: row["images_per_s"]["median"])
    lines = [f"- ours is {best['ours_is']['ratio']:.2f}x the fastest peer, {best['title']}"]
    pil = peers.get(PIL_PEER["detection" if section == "detection" else "classification"])
    if pil is not None and pil is not best:
        lines.append(f"- ours is {pil['ours_is']['ratio']:.2f}x {pil['title']}")
    return lines


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For values that do not go together.
    """
    parser = harness.parser("Images/s of training loaders, ours beside the peers'.", rounds=7)
    parser.add_argument("--task", choices=("classification", "detection"), default="classification")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CLASS/PICTURE.jpg")
    parser.add_argument("--voc", type=Path, metavar="FOLDER", help="detection: VOC folder")
    parser.add_argument("--sizes", default="originals,256", help="of originals,256")
    parser.add_argument("--only", metavar="NAMES", help="pipelines; ours is always measured")
    parser.add_argument("--samples", type=int, help="of an epoch; default 2048, detection 640")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed in a round; default 2")
    parser.add_argument("--batch", type=int, help="default 64, detection 32")
    parser.add_argument("--add", action="store_true", help="add the sections to those in --json")
    args = parser.parse_args(words)
    args.words, args.edge = list(words), 4
    classification = args.task == "classification"
    args.samples = args.samples or (2048 if classification else 640)
    args.batch = args.batch or (64 if classification else 32)
    if args.quick:
        args.rounds, args.samples, args.seconds, args.batch, args.edge = 3, 96, 0.1, 16, 2
        args.sizes = "originals"
    if set(args.sizes.split(",")) - {"originals", "256"}:
        raise ValueError(f"--sizes {args.sizes}; it takes originals,256")
    if (
        args.rounds < 1
        or args.samples % args.batch
        or args.samples < 2 * (args.edge + 1) * args.batch
    ):
        raise ValueError(
            f"--samples {args.samples} must be a multiple of --batch {args.batch}, at least "
            f"{2 * (args.edge + 1)} times it, and --rounds {args.rounds} at least 1"
        )
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run("loader", words, parse=parse, measure=measure, report_text=report_text)


if __name__ == "__main__":
    sys.exit(main())
