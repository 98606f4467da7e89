"""How much faster than what somebody uses now: one answer per question, from the results.

Each answer stands beside two peers: the one that most people have (torchvision, Pillow,
webdataset's writer), and the fastest that was measured. A ratio above 1 says that ours is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import harness
from peers import table

from reporting.results import Results, Section, of_form

FORMS = {"originals": "photographs as they are", "256": "photographs of 256 px"}
USUAL_LOADERS = ("torchvision_pil", "detection_pil")
KINDS = {"sparse": "trained", "dense": "untrained"}
MODELS = {  # the sections of end_to_end.py
    "small": "MobileNetV3-Small",
    "large": "MobileNetV3-Large",
    "detector": "SSDLite-Large",
}
STEPS = {"detectors": "training step", "classifiers": "training step", "inference": "forward"}


@dataclass(frozen=True)
class Figure:
    """Ours is `ratio` times a peer, between `low` and `high`."""

    peer: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Answer:
    """What a question's newest results say."""

    question: str
    figures: tuple[Figure, ...]  # beside the usual peer, and the fastest where that is another
    section: Section
    # Where counts answer: ours, and the peers'.
    counts: tuple[str, str] | None = None
    spans: str = "rounds"  # what low and high are of


def answers(results: Results) -> list[Answer]:
    """Return the answers that the results have, in the order of the README."""
    makers: Sequence[tuple[str, str, Callable[[Section], Iterator[Answer]]]] = (
        ("loader", "", _loader),
        ("decode", "decoders ", _decode),
        ("convert", "", _convert),
        ("train_step", "", _train_step),
        ("end_to_end", "", _end_to_end),
        ("nms", "", _postprocess),
        ("latency", "", _latency),
        ("streaming_guarantees", "", _guarantees),
    )
    found = []
    for benchmark, prefix, make in makers:
        for section in results.of(benchmark, prefix):
            with of_form(section.file, section.name or benchmark):
                found += list(make(section))
    return found


def figure(peer: str, found: Mapping[str, float]) -> Figure:
    """Return a ratio of a result beside a peer."""
    return Figure(peer, found["ratio"], found["low"], found["high"])


def pair(usual: Figure, every: Sequence[Figure]) -> tuple[Figure, ...]:
    """Return the usual peer's figure, and the fastest peer's if that is another."""
    fastest = min(every, key=lambda item: item.ratio, default=usual)
    return (usual,) if fastest.ratio >= usual.ratio else (usual, fastest)


def peers_of(section: Section) -> dict[str, dict[str, Any]]:
    """Return the systems of a section that are not ours."""
    systems: dict[str, dict[str, Any]] = section.data["systems"]
    return {name: row for name, row in systems.items() if not name.startswith("ours")}


def our_system(section: Section) -> str:
    """Return the name of the best of our systems, by the result itself or the fastest."""
    if "ours" in section.data.get("best", {}):
        return str(section.data["best"]["ours"])
    rows: dict[str, dict[str, Any]] = section.data["systems"]
    mine = [name for name in rows if name.startswith("ours")]
    return max(mine, key=lambda name: rows[name]["images_per_s"]["median"])


def beside(section: Section, ours: str, peer: str) -> dict[str, float]:
    """Return the ratio of two systems of a section.

    Of whole steps where they were timed, else from the result where it says the ratio itself.
    """
    rows = section.data["systems"]
    if all("step_images_per_s" in rows[name] for name in (ours, peer)):
        return _ratio(rows[ours], rows[peer], "step_images_per_s")
    if peer == section.data["base"]:
        return dict(rows[ours]["times_base"])
    same = {"ratio": 1.0, "low": 1.0, "high": 1.0}
    kinds = (ours.partition(" ")[2], peer.partition(" ")[2])
    if kinds[0] == kinds[1] and rows[peer].get("times_same") == same:
        return dict(rows[ours]["times_same"])
    return _ratio(rows[ours], rows[peer], "images_per_s")


def _ratio(ours: dict[str, Any], peer: dict[str, Any], what: str) -> dict[str, float]:
    return harness.ratio(ours[what]["rounds"], peer[what]["rounds"])


def _loader(section: Section) -> Iterator[Answer]:
    rows = {name: figure(row["title"], row["ours_is"]) for name, row in peers_of(section).items()}
    usual = next((rows[name] for name in USUAL_LOADERS if name in rows), None)
    if usual is None:
        return  # a run of ours alone
    size = section.data["data"]["bytes_per_picture"] / 1000
    form = FORMS.get(section.name)
    what = (
        f"{form} ({size:.0f} KB) to a classifier"
        if form
        else f"pictures to an SSD {_canvas(section)}"
    )
    yield Answer(f"loading {what}", pair(usual, list(rows.values())), section)


def _canvas(section: Section) -> str:
    return f"with its augmentation at {section.data['settings']['size']} px"


def _decode(section: Section) -> Iterator[Answer]:
    rows = {
        name: figure(row["title"], row["ours_is"])
        for name, row in section.data["decoders"].items()
        if name != "ours"
    }
    if "pillow" in rows:
        form = FORMS[section.name.removeprefix("decoders ")]
        yield Answer(f"decoding alone, {form}", pair(rows["pillow"], list(rows.values())), section)


def _convert(section: Section) -> Iterator[Answer]:
    prefixes = {"copy": "ours / ", "resize": "a core / "}
    if section.name not in prefixes:
        return
    rows = {
        key.removeprefix(prefixes[section.name]): found
        for key, found in section.data["ratios"].items()
        if key.startswith(prefixes[section.name]) and not key.endswith("one worker")
    }
    if section.name == "copy":
        what, usual = "packing files into tar shards", "webdataset"
    else:
        what, usual = f"resizing files to {section.data['side']} px, one core", "pillow"
    if usual in rows:
        titles = {"pillow": "Pillow", "webdataset": "webdataset's ShardWriter"}
        every = {
            name: figure(titles.get(name, name.replace("webdataset", "ShardWriter")), row)
            for name, row in rows.items()
        }
        yield Answer(what, pair(every[usual], list(every.values())), section)


def _train_step(section: Section) -> Iterator[Answer]:
    kind, _, variant = section.name.partition(" ")
    if kind not in STEPS:
        return  # counts, and what has no systems beside each other
    data, peers = section.data, peers_of(section)
    base = data["base"]
    if base not in peers:
        return
    ours = our_system(section)
    usual = figure(as_it_comes(peers[base]["title"]), beside(section, ours, base))
    if "best_ratio" in data:
        every = [
            figure(peers[data["best"][name]]["title"], found)
            for name, found in data["best_ratio"].items()
        ]
    else:
        every = [figure(row["title"], beside(section, ours, name)) for name, row in peers.items()]
    model = f"MobileNetV3-{variant.capitalize()}, 224 px" if variant else "SSDLite-Large, 320 px"
    question = f"{STEPS[kind]}, {model}, {_place(section)}"
    yield Answer(question, pair(usual, every), section)


def as_it_comes(title: str) -> str:
    """Return the title of a peer that is measured with its own defaults, or in another format."""
    if "channels_last" in title:
        return title
    return f"{title}, as it comes" if "," in title else f"{title} as it comes"


def _place(section: Section) -> str:
    data = section.data
    amp = data.get("amp", data.get("settings", {}).get("amp", "no"))
    if not section.is_gpu:
        return "CPU"
    return section.device.removeprefix("NVIDIA ") + ("" if amp == "no" else f", {amp}")


def _end_to_end(section: Section) -> Iterator[Answer]:
    peers = peers_of(section)
    base = section.data["base"]
    if base not in peers:
        return
    ours = our_system(section)
    every = {name: figure(row["title"], beside(section, ours, name)) for name, row in peers.items()}
    yield Answer(
        f"files to trained steps, {MODELS.get(section.name, section.name)}, {_place(section)}",
        pair(every[base], list(every.values())),
        section,
    )


def _postprocess(section: Section) -> Iterator[Answer]:
    for case in section.data["cases"]:
        if case["kind"] != "sparse":
            continue  # an untrained model's outputs are in the detector's table
        found = case["ours_is"]
        every = [
            figure("torchvision", found["torchvision"]),
            figure("one batched_nms", found["one_call"]),
        ]
        yield Answer(
            f"post-process, {case['batch']} pictures, {case['columns'] - 1} classes, "
            f"{_place(section)}",
            pair(every[0], every),
            section,
        )


def _latency(section: Section) -> Iterator[Answer]:
    rows = section.data["latency"]["1"]["systems"]
    for name, what in (("onnx", "exported to ONNX"), ("torch", "in torch")):
        if name in rows:
            found = figure("torchvision", rows[name]["faster_than_torchvision"])
            yield Answer(f"one picture to detections, {what}, one thread", (found,), section)


def _guarantees(section: Section) -> Iterator[Answer]:
    report = section.data
    systems = report["results"]
    planning = _planning(report)
    if planning:  # the first is MosaicML's: the peer whose order, too, is shuffled and exact
        total = report["settings"]["scale"]["num_samples"] / 1e6
        yield Answer(
            f"planning a resume in {total:.2f} M samples",
            pair(planning[0], planning),
            section,
            spans="points",
        )
    if "ours" not in systems or len(systems) == 1:
        return
    rows = table.count_rows(report)
    for title, cell in (rows[0], next(row for row in rows if "ranks in an epoch:" in row[0])):
        yield Answer(title, (), section, _counts(report, cell))

    def silent(result: dict[str, Any]) -> str:
        cases = next(iter(result["damage"].values()), None)
        if cases is None:
            return "-"
        return str(sum(row is not None and row["result"] == "silent" for row in cases.values()))

    number = len(report["settings"]["damage"])
    yield Answer(
        f"kinds of damage, of {number}, that lose or change samples unsaid",
        (),
        section,
        _counts(report, silent),
    )


def _counts(report: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> tuple[str, str]:
    cells = {name: cell(result) for name, result in report["results"].items()}
    titles = {name: report["names"][name].rpartition(" ")[0] for name in cells}
    said = [f"{titles[name]} {text}" for name, text in cells.items() if name != "ours"]
    return cells["ours"], "<br>".join(text for text in said if not text.endswith(" -"))


def _planning(report: dict[str, Any]) -> list[Figure]:
    """Return how much sooner a resume is planned: the middle, least and most of its points."""
    ours = report["results"].get("ours", {}).get("scale", {}).get("resume_ms")
    found = []
    for name, result in sorted(report["results"].items(), key=lambda item: item[0] != "mosaicml"):
        kinds = result["scale"].get("resume_ms")
        if name == "ours" or not kinds or not ours:
            continue
        if not isinstance(next(iter(kinds.values())), dict):
            kinds = {"": kinds}
        for kind, row in kinds.items():
            ratios = sorted(row[point] / ours[point] for point in ours)
            title = report["names"][name].rpartition(" ")[0] + (f", {kind}" if kind else "")
            found.append(Figure(title, statistics.median(ratios), ratios[0], ratios[-1]))
    return found
