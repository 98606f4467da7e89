"""The report of scaling.py as a document."""

from __future__ import annotations

from typing import Any

import harness

SCALING_HEAD = (
    "model",
    "ranks",
    "batch a rank",
    "step, ms",
    "images/s",
    "speed-up",
    "efficiency",
    "beside each other",
    "communication",
)
TRACED_HEAD = (
    "model",
    "ranks",
    "transfer, ms",
    "waiting for ranks, ms",
    "under way, ms",
    "beside the backward pass, ms",
    "exposed, ms",
    "exposed share",
)


def report_text(report: dict[str, Any]) -> str:
    """Return all sections in tables, with the assumptions."""
    sections = report["sections"]
    lines = ["# Scaling", ""]
    for name, part in sections.items():
        found = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
        host = part["machine"]
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s for all "
            f"sections. {found}.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {part['threads']} thread(s) a rank, "
            f"device {part['device']}, {part['backend']}, autocast {part['amp']}, load "
            f"{host['load_1min']} at the end.",
            "",
            *SECTIONS[name](part),
            "",
        ]
    return "\n".join(lines)


def _ratio(row: dict[str, float], digits: int = 2) -> str:
    return f"{row['ratio']:.{digits}f} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median']:.1f} ({row['p10']:.1f} to {row['p90']:.1f})"


def scaling_lines(part: dict[str, Any]) -> list[str]:
    """Steps on 1 to n ranks, and what of them is communication."""
    rows: list[tuple[str, ...]] = []
    traced: list[tuple[str, ...]] = []
    shares: list[list[float]] = []
    for name, model in part["models"].items():
        shares += model["others_took"].values()
        for ranks, row in model["ranks"].items():
            talk = row.get("communication")
            share = talk and talk["share"]
            rows.append(
                (
                    f"{name}, {model['size']} px",
                    ranks,
                    str(row["batch_per_rank"]),
                    _spread(row["step_ms"]),
                    f"{row['images_per_s']['median']:.1f}",
                    _ratio(row["speedup"]),
                    _ratio(row["efficiency"]),
                    _ratio(row["contention"]) if "contention" in row else "",
                    f"{_percent(share['share'])} ({_percent(share['low'])} to "
                    f"{_percent(share['high'])})"
                    if share
                    else "",
                )
            )
            if talk:
                ms = talk["traced_ms"]
                keys = ("transfer", "waiting", "busy", "overlapped", "exposed")
                traced.append(
                    (
                        name,
                        ranks,
                        *(f"{ms[key]['median']:.2f}" for key in keys),
                        _percent(talk["exposed_share"]["median"]),
                    )
                )
    lines = harness.table(SCALING_HEAD, rows)
    lines += [
        "",
        "Efficiency: images/s of a rank against one alone. Beside each other: the step of n ranks "
        "that send nothing against one alone. Communication: what the step in DDP is longer by "
        "than that, as a share of it; below 0 within the noise.",
    ]
    if traced:
        lines += ["", "With everything timed that is sent:", ""]
        lines += harness.table(TRACED_HEAD, traced)
    return [*lines, "", harness.disturbance(shares)]


def prediction_lines(part: dict[str, Any]) -> list[str]:
    """The model against what was measured."""
    rows: list[tuple[str, ...]] = []
    lines: list[str] = []
    for name, model in part["models"].items():
        for check in model["checks"]:
            measured, predicted, error = (
                check[key] for key in ("measured_ms", "predicted_ms", "error")
            )
            parts = ", ".join(f"{key} {ms:.2f}" for key, ms in check["parts_ms"].items() if ms)
            rows.append(
                (
                    name,
                    check["kind"],
                    str(check["ranks"]),
                    *(
                        f"{row['value']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
                        for row in (predicted, measured)
                    ),
                    f"{100 * error['error']:+.1f} % ({100 * error['low']:+.1f} to "
                    f"{100 * error['high']:+.1f})",
                    "yes" if check["within"] else "NO",
                    parts,
                )
            )
        if "reason" in model:
            lines.append(f"{name}: not checked: {model['reason']}.")
            continue
        link = model["link"]
        sizes = ", ".join(
            f"{size} B {took:.0f} ({fit:.0f})"
            for size, took, fit in zip(
                link["sizes_bytes"], link["measured_us"], link["fitted_us"], strict=True
            )
        )
        buckets = ", ".join(
            f"{b['bytes'] / 1e6:.2f} MB at {_percent(b['ready'])}" for b in model["buckets"]
        )
        lines.append(
            f"{name}: latency {link['latency_us']['value']:.0f} us and "
            f"{link['gbytes_per_s']['value']:.2f} GB/s between {link['ranks']} ranks; all-reduces "
            f"in us, fitted in brackets: {sizes}. Gradients: {buckets} of the step. Share of an "
            f"all-reduce that takes nothing from computation: {model['overlap']:.2f}."
        )
    limit = f"within {100 * part['limit']:.0f} %"
    head = ("model", "scaling", "ranks", "predicted, ms", "measured, ms", "error", limit, "parts")
    table = harness.table(head, rows) if rows else []
    if rows:
        lines.append("Parts: of the predicted step, in ms.")
    return [*table, "", *lines, "", "Assumptions:", "", *(f"- {x}" for x in part["assumptions"])]


def curve_lines(part: dict[str, Any]) -> list[str]:
    """Predictions for many ranks."""
    lines: list[str] = []
    for name, model in part["models"].items():
        for curve in model["curves"]:
            intra, inter = curve["links"]["intra"], curve["links"]["inter"]
            lines += [
                f"{name}, {curve['title']}: {curve['images_per_s_one']:.0f} images/s of one alone.",
                f"Nodes of {curve['links']['ranks_per_node']}; in a node {_link(intra)}; among "
                f"nodes {_link(inter)}.",
                "",
                *harness.table(CURVE_HEAD, _curve_rows(curve)),
                "",
            ]
    feed = part["data_rate"]
    lines.append(f"A node loads {feed:.0f} images/s." if feed else "Data comes in time.")
    return [*lines, "", "Assumptions:", "", *(f"- {x}" for x in part["assumptions"])]


CURVE_HEAD = (
    "scaling",
    "ranks",
    "batch a rank",
    "step, ms",
    "images/s",
    "efficiency",
    "sent, ms",
    "of it exposed, ms",
    "waiting for the slowest, ms",
    "largest bucket by",
    "images/s a node must load",
)


def _curve_rows(curve: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            kind,
            str(point["ranks"]),
            str(point["batch_per_rank"]),
            f"{point['step_ms']:.2f}",
            f"{point['images_per_s']:.0f}",
            _percent(point["efficiency"]),
            f"{point['communication_ms']:.3f}",
            f"{point['exposed_ms']:.3f}",
            f"{point['stragglers_ms']:.3f}",
            point["algorithm"],
            f"{point['node_images_per_s']:.0f}",
        )
        for kind, points in curve["points"].items()
        for point in points
    ]


def _link(link: dict[str, Any]) -> str:
    return (
        f"{link['title']}, {link['gbytes_per_s']:.2f} GB/s and {link['latency_us']:.1f} us "
        f"({link['source']})"
    )


SECTIONS = {
    "weak": scaling_lines,
    "strong": scaling_lines,
    "prediction": prediction_lines,
    "curve": curve_lines,
}
