"""The tables of RESULTS.md, a function per kind of section: ratios first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import harness
from peers import table

from reporting.panels import SYSTEMS
from reporting.questions import KINDS
from reporting.results import Section, number, ratio_text, spread_cells, times

RANGE = "p10 to p90"
STAGES = ("input", "forward", "loss", "backward", "graph", "optimizer")


def loader(section: Section) -> list[str]:
    """Every pipeline beside ours."""
    rows = sorted(section.data["systems"].values(), key=lambda r: -r["images_per_s"]["median"])
    lines = harness.table(
        ("pipeline", "ours is ... times", "images/s, median", RANGE, "output"),
        (
            (r["title"], ratio_text(r["ours_is"]), *spread_cells(r["images_per_s"]), r["output"])
            for r in rows
        ),
    )
    absent = section.data.get("not_measured", {}).values()
    return [*lines, *(f"\nNot measured: {item['title']}: {item['reason']}" for item in absent)]


def decode(section: Section) -> list[str]:
    """Decoders, the loader beside its decoding, or the stages of a picture."""
    data = section.data
    if "decoders" in data:
        return harness.table(
            ("decoder", "ours is ... times", "2 threads / 1", "images/s, one thread", RANGE),
            (
                (
                    row["title"],
                    ratio_text(row["ours_is"]),
                    ratio_text(row["scaling"]),
                    *spread_cells(row["images_per_s"]["1"]),
                )
                for row in data["decoders"].values()
            ),
        )
    if "threads" in data:
        return harness.table(
            ("threads", "Loader / decoding alone", "/ one thread", "Loader, images/s", RANGE),
            (
                (
                    name,
                    ratio_text(row["share_of_limit"]),
                    ratio_text(row["scaling"]),
                    *spread_cells(row["loader_images_per_s"]),
                )
                for name, row in data["threads"].items()
            ),
        )
    total = sum(row["median"] for name, row in data["us"].items() if name != "batch")
    return harness.table(
        ("stage", "share of a picture's time", "us", RANGE),
        (
            (
                name,
                "beside the rest" if name == "batch" else f"{100 * row['median'] / total:.1f} %",
                *spread_cells(row),
            )
            for name, row in data["us"].items()
        ),
    )


def convert(section: Section) -> list[str]:
    """Packing, resizing, what JPEG quality costs, what raw pixels bring."""
    data = section.data
    if section.name == "quality":
        return harness.table(
            ("stored as", "PSNR, dB", "mean difference, levels", "KB"),
            (
                (
                    f"JPEG {name}",
                    number(row["psnr_db"]),
                    number(row["mean_absolute_difference"]),
                    number(row["bytes"] / 1000),
                )
                for name, row in data["by_quality"].items()
            ),
        )
    if section.name == "raw":
        return harness.table(
            ("pixels", "raw / JPEG, pictures a second", "raw / JPEG, bytes"),
            (
                (side, ratio_text(row["ratio"]), times(row["bytes_ratio"]))
                for side, row in data["sizes"].items()
            ),
        )
    unit = "megabytes_per_s" if "megabytes_per_s" in data else "images_per_s"
    lines = harness.table(
        ("speed of", "ratio"), ((name, ratio_text(row)) for name, row in data["ratios"].items())
    )
    lines += [
        "",
        *harness.table(
            ("system", "MB/s" if unit == "megabytes_per_s" else "images/s", RANGE),
            ((name, *spread_cells(row)) for name, row in data[unit].items()),
        ),
    ]
    return lines


def train_step(section: Section) -> list[str]:
    """Steps beside each other, counts of operations, or shares of the byte floor."""
    data = section.data
    if section.name == "counts":
        return harness.table(
            ("system", "what", "operations", "that wait for the device"),
            (
                (name, what, str(row["ops"]), str(row["waits"]))
                for name, counts in data["systems"].items()
                for what, row in counts.items()
            ),
        )
    if section.name == "roofline":
        return _roofline(data)
    rows = data["systems"].values()
    stages = [stage for stage in STAGES if any(stage in row.get("ms", {}) for row in rows)]
    base = data["systems"][data["base"]]["title"]
    head = ("system", f"times {base}", "times torchvision, same setting", "images/s, median", RANGE)
    lines = harness.table(
        (*head, *(f"{stage}, ms" for stage in stages)),
        (
            (
                row["title"],
                ratio_text(row["times_base"]),
                ratio_text(row["times_same"]) if "times_same" in row else "",
                *spread_cells(row["images_per_s"]),
                *(
                    number(row["ms"][stage]["median"]) if stage in row["ms"] else ""
                    for stage in stages
                ),
            )
            for row in rows
        ),
    )
    if "best_ratio" in data:
        best = ", ".join(
            f"{ratio_text(found)} times {peer}" for peer, found in data["best_ratio"].items()
        )
        lines += ["", f"Whole steps, each library in its fastest setting: ours is {best}."]
    return [*lines, *_kernels(data), *_failed(data)]


def _failed(data: dict[str, Any]) -> list[str]:
    return [f"\nNot measured: {name}: {why}" for name, why in data.get("failed", {}).items()]


def _kernels(data: dict[str, Any]) -> list[str]:
    """Return where a traced step spent its time."""
    found = data.get("trace") or {}
    if not found.get("kernels"):
        return []
    rows = (
        (f"`{row['name'][:80]}`", f"{100 * row['share']:.1f} %", f"{row['calls']}")
        for row in found["kernels"][:10]
    )
    head = (f"kernel of a step, {found['system']}", "share", "calls")
    return ["", *harness.table(head, rows)]


def _roofline(data: dict[str, Any]) -> list[str]:
    return harness.table(
        ("model", "what", "system", "share of the byte floor", "images/s", "at the floor"),
        (
            (
                point["model"],
                point["what"],
                point["system"],
                f"{100 * point['fraction']:.1f} %",
                number(point["images_per_s"]),
                number(point["limit_images_per_s"]),
            )
            for point in data["points"]
        ),
    )


def nms(section: Section) -> list[str]:
    """Post-process of each kind of outputs."""
    return harness.table(
        (
            "outputs",
            "ours is ... times torchvision",
            "times one batched_nms",
            "pictures that differ",
            "ours, ms",
            RANGE,
        ),
        (
            (
                f"{case['batch']} pictures, {case['columns'] - 1} classes, {KINDS[case['kind']]}",
                ratio_text(case["ours_is"]["torchvision"]),
                ratio_text(case["ours_is"]["one_call"]),
                str(case["pictures_that_differ"]),
                *spread_cells(case["ms"]["ours"]),
            )
            for case in section.data["cases"]
        ),
    )


def latency(section: Section) -> list[str]:
    """One picture to detections, with one thread and more."""
    rows = []
    for threads, part in section.data["latency"].items():
        for name, row in part["systems"].items():
            cells = (ratio_text(row["faster_than_torchvision"]), *spread_cells(row["ms"]))
            rows.append((threads, SYSTEMS.get(name, name), *cells))
    return harness.table(("threads", "system", "times torchvision", "ms, median", RANGE), rows)


def end_to_end(section: Section) -> list[str]:
    """Files to trained steps."""
    data = section.data
    base = data["systems"][data["base"]]["title"]

    def wait(row: dict[str, Any]) -> str:
        if "data_wait" not in row:
            return "-"
        found = row["data_wait"]
        return (
            f"{100 * found['median']:.1f} % ({100 * found['p10']:.1f} to {100 * found['p90']:.1f})"
        )

    lines = harness.table(
        ("system", f"times {base}", "waits for data", "images/s, median", RANGE),
        (
            (
                row["title"],
                ratio_text(row["times_base"]),
                wait(row),
                *spread_cells(row["images_per_s"]),
            )
            for row in data["systems"].values()
        ),
    )
    return [*lines, *_failed(data)]


def guarantees(section: Section) -> list[str]:
    """The counts beside the peers'."""
    return [table.markdown(section.data), "", table.traffic_table(section.data)]


def resume(section: Section) -> list[str]:
    """The worst rows of a resume's planning."""
    rows = ((name, f"{value:g}") for name, value in section.data["verdict"].items())
    return harness.table(("worst of all", "value"), rows)


def parity(section: Section) -> list[str]:
    """How far imported models are from their libraries' answers."""
    verdict = section.data["verdict"]
    rows = [
        (name, f"{value:.1e}" if value else "0")
        for name, value in verdict["largest_difference"].items()
    ]
    rows.append(("labels at another place", str(verdict["wrong"])))
    return harness.table(("largest difference of all models", "value"), rows)


def scaling(section: Section) -> list[str]:
    """Ranks beside one rank; predictions beside measurements; predictions beyond them."""
    models = section.data["models"]
    if section.name == "prediction":
        return _predictions(section.data)
    if section.name == "curve":
        return _curve(models)
    rows = []
    for model, found in models.items():
        for ranks, row in found["ranks"].items():
            share = row.get("communication", {}).get("share")
            said = (
                "-"
                if share is None
                else (
                    f"{100 * share['share']:.1f} % ({100 * share['low']:.1f} to "
                    f"{100 * share['high']:.1f})"
                )
            )
            cells = (ratio_text(row["efficiency"]), ratio_text(row["speedup"]), said)
            rows.append((model, ranks, *cells, *spread_cells(row["step_ms"])))
    head = ("model", "ranks", "efficiency", "speed-up", "communication", "step, ms", RANGE)
    return harness.table(head, rows)


def _predictions(data: dict[str, Any]) -> list[str]:
    rows = []
    for model, found in data["models"].items():
        for check in found["checks"]:
            error = check["error"]
            rows.append(
                (
                    f"{model}, {check['kind']}, {check['ranks']} ranks",
                    f"{100 * error['error']:+.1f} % ({100 * error['low']:+.1f} to "
                    f"{100 * error['high']:+.1f})",
                    "yes" if check["within"] else "**no**",
                    number(check["predicted_ms"]["value"]),
                    number(check["measured_ms"]["value"]),
                )
            )
    limit = f"within {100 * data['limit']:.0f} %"
    head = ("step", "predicted / measured - 1", limit, "predicted, ms", "measured, ms")
    lines = harness.table(head, rows)
    for model, found in data["models"].items():
        if not found["checks"]:
            lines.append(
                f"\n{model}: not checked: {found.get('reason', 'no ranks to check it on')}"
            )
    return [*lines, "", "Assumed:", "", *(f"- {text}" for text in data["assumptions"])]


def _curve(models: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for kind in ("weak", "strong"):
        every: Sequence[tuple[str, str, dict[int, float]]] = [
            (
                model,
                curve["title"],
                {p["ranks"]: p["efficiency"] for p in curve["points"].get(kind) or []},
            )
            for model, found in models.items()
            for curve in found["curves"]
        ]
        ranks = sorted({count for *_, points in every for count in points})
        if ranks:
            rows = (
                (
                    model,
                    title,
                    *(f"{points[n]:.2f}" if n in points else "-" for n in ranks),
                )
                for model, title, points in every
                if points
            )
            head = (f"{kind}: predicted efficiency", "with", *(f"{n} ranks" for n in ranks))
            lines += ["", *harness.table(head, rows)]
    return lines[1:]


TABLES = {
    "loader": loader,
    "decode": decode,
    "convert": convert,
    "train_step": train_step,
    "nms": nms,
    "latency": latency,
    "end_to_end": end_to_end,
    "scaling": scaling,
    "streaming_guarantees": guarantees,
    "resume": resume,
    "parity": parity,
}
