"""What the bar and dot plots show: rows of the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reporting.plots import OURS, PEER, Panel, Row, standing
from reporting.questions import FORMS, KINDS, MODELS, STEPS, as_it_comes
from reporting.results import Section, number, times

SYSTEMS = {  # of latency.py
    "torchvision": "torchvision",
    "torch": "ours, torch",
    "folded": "ours, torch, batch norms folded",
    "onnx": "ours, ONNX",
    "int8": "ours, ONNX, 8 bits",
}
MOST_SETTINGS = 3  # of a library in the plot of training steps; the table has all


def loaders(sections: Sequence[Section]) -> list[Panel]:
    """Speed of every loader, ours being 1: the longer the bar, the faster."""
    panels = []
    for section in sections:
        rows = []
        for name, row in section.data["systems"].items():
            ours = name.startswith("ours")
            found = row["ours_is"]
            text = times(1 / found["ratio"]) if ours else f"ours {times(found['ratio'])}\u00d7"
            rows.append(
                Row(
                    row["title"],
                    1 / found["ratio"],
                    1 / found["high"],
                    1 / found["low"],
                    text,
                    OURS if ours else PEER,
                )
            )
        rows.sort(key=lambda row: -row.value)
        size = section.data["data"]["bytes_per_picture"] / 1000
        form = FORMS.get(section.name, "pictures with boxes, SSD's augmentation")
        panels.append(Panel(f"{form}, {size:.0f} KB", rows, "pictures a second, ours = 1"))
    return panels


def postprocess(sections: Sequence[Section]) -> list[Panel]:
    """How many times as long the peers take as ours."""
    panels = []
    for section in sections:
        rows = []
        for case in section.data["cases"]:
            for peer, title in (("torchvision", "torchvision"), ("one_call", "one batched_nms")):
                found = case["ours_is"][peer]
                color, marker = standing(found["low"], found["high"])
                label = f"{case['columns'] - 1} classes, {KINDS[case['kind']]}: {title}"
                text = f"{times(found['ratio'])}\u00d7"
                rows.append(
                    Row(label, found["ratio"], found["low"], found["high"], text, color, marker)
                )
        batch = section.data["cases"][0]["batch"]
        title = f"Post-process of {batch} pictures, {place(section)}"
        panels.append(Panel(title, rows, "ours is ... times as fast", log=True))
    return panels


def place(section: Section) -> str:
    """Return where a section was measured, in words."""
    return section.device if section.is_gpu else "CPU"


def beside_base(
    title: str, systems: Mapping[str, dict[str, Any]], peer: str, *, gpu: bool
) -> Panel:
    """Speed of systems, that of `peer` being 1; on a GPU with pictures a second."""
    rows = []
    for name, row in systems.items():
        found = row["times_base"]
        text = f"{times(found['ratio'])}\u00d7"
        if gpu:
            text += f", {number(row['images_per_s']['median'])}/s"
        if "data_wait" in row:
            text += f", waits {100 * row['data_wait']['median']:.0f} %"
        color = OURS if name.startswith("ours") else PEER
        rows.append(Row(row["title"], found["ratio"], found["low"], found["high"], text, color))
    rows.sort(key=lambda row: -row.value)
    return Panel(title, rows, f"pictures a second, {peer} = 1")


def train_steps(sections: Sequence[Section]) -> list[Panel]:
    """Training steps and forwards beside torchvision's."""
    panels = []
    for section in sections:
        kind, _, variant = section.name.partition(" ")
        if kind in STEPS:
            model = f"MobileNetV3-{variant.capitalize()}" if variant else "SSDLite-Large"
            data = section.data
            panels.append(
                beside_base(
                    f"{STEPS[kind].capitalize()}, {model}, batch {data['batch']}, {place(section)}",
                    _fastest(data["systems"], data["base"]),
                    as_it_comes(data["systems"][data["base"]]["title"]),
                    gpu=section.is_gpu,
                )
            )
    return panels


def _fastest(systems: dict[str, dict[str, Any]], base: str) -> dict[str, dict[str, Any]]:
    """Return the base and each library's fastest settings: what a plot has room for."""
    shown = {base}
    order = sorted(systems, key=lambda name: -systems[name]["images_per_s"]["median"])
    for library in {name.partition(" ")[0] for name in systems}:
        own = [name for name in order if name.partition(" ")[0] == library]
        shown |= set(own[:MOST_SETTINGS])
    return {name: row for name, row in systems.items() if name in shown}


def end_to_end(sections: Sequence[Section]) -> list[Panel]:
    """Files to trained steps, and how long the device waits for data."""
    return [
        beside_base(
            f"Files to trained steps, {MODELS.get(section.name, section.name)}, {place(section)}",
            section.data["systems"],
            section.data["systems"][section.data["base"]]["title"],
            gpu=section.is_gpu,
        )
        for section in sections
    ]


def latency(sections: Sequence[Section]) -> list[Panel]:
    """One picture to detections beside torchvision."""
    panels = []
    for section in sections:
        for threads, part in section.data["latency"].items():
            rows = []
            for name, row in part["systems"].items():
                found = row["faster_than_torchvision"]
                color = PEER if name == "torchvision" else OURS
                text = f"{times(found['ratio'])}\u00d7"
                label = SYSTEMS.get(name, name)
                rows.append(Row(label, found["ratio"], found["low"], found["high"], text, color))
            threads_said = f"{threads} thread" + ("" if threads == "1" else "s")
            title = f"One picture to detections, {place(section)}, {threads_said}"
            panels.append(Panel(title, rows, "times torchvision's speed"))
    return panels
