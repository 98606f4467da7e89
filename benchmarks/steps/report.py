"""The report of training steps in tables."""

from __future__ import annotations

from typing import Any

import harness
import tracing

from steps.device_state import state_text
from steps.layers import layers_table
from steps.measure import STAGES


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document."""
    lines = ["# Training steps", ""]
    for name, part in report["sections"].items():
        host = part["machine"]
        found = ", ".join(f"{key} {value}" for key, value in part["versions"].items())
        batch = f", batch {part['batch']}" if "batch" in part else ""
        lines += [
            f"## {name}{batch}",
            "",
            f"`{part['command']}`, commit {part['commit']}, {part['seconds']:.0f} s. {found}.",
            f"Machine: {host['cpu']}, {host['cores']} cores, {part['threads']} thread(s), device "
            f"{part['device']}, autocast {part['amp']}, load {host['load_1min']} at the end.",
            "",
            *_table_of(name, part),
            "",
        ]
    return "\n".join(lines)


def _table_of(name: str, part: dict[str, Any]) -> list[str]:
    if name == "counts":
        return counts_table(part)
    if name.startswith("layers"):
        return layers_table(part)
    return roofline_table(part) if name == "roofline" else systems_table(part)


def systems_table(part: dict[str, Any]) -> list[str]:
    """Systems beside each other, with their stages."""
    rows = part["systems"].values()
    stages = [stage for stage in STAGES if any(stage in row["ms"] for row in rows)]
    floors = list(next(iter(rows))["floor"])
    base = part["systems"][part["base"]]["title"]
    head = (
        *("system", "images/s", f"times {base}", "same format", "whole step, images/s"),
        *(f"of floor {name}" for name in floors),
        *("first call, s", *(f"{stage}, ms" for stage in stages)),
    )
    lines = harness.table(
        head,
        (
            (
                row["title"],
                _spread(row["images_per_s"]),
                *(_ratio(row[key]) for key in ("times_base", "times_same")),
                _spread(row["step_images_per_s"]),
                *(f"{100 * row['floor'][name]:.1f} %" for name in floors),
                f"{row['first_call_s']:.1f}",
                *(
                    f"{row['ms'][stage]['median']:.2f}" if stage in row["ms"] else ""
                    for stage in stages
                ),
            )
            for row in rows
        ),
    )
    is_training = "backward" in stages or "optimizer" in stages
    counted = "forward + loss + backward" if is_training else "the forward pass"
    lines += [
        "",
        f"images/s and ratios are of {counted}; `same format`: times torchvision in the same "
        "setting, or the nearest to it that it has. First calls hold compilation, with the caches "
        "as they were found, and stand in no other figure.",
        *best_lines(part),
    ]
    if "first_losses" in part:
        values = ", ".join(f"{name} {value:.6f}" for name, value in part["first_losses"].items())
        lines.append(f"First losses: {values}.")
    clocks = state_text(part["clocks"])
    lines += [f"Clocks {clocks}"] if clocks else []
    lines.append(harness.disturbance(list(part["others_took"].values())))
    if part["failed"]:
        lines += ["", *(f"- not measured: {name}: {why}" for name, why in part["failed"].items())]
    if part.get("trace"):
        trace = part["trace"]
        lines += ["", f"One step of {trace['system']} ({trace['file'] or 'no trace'}):", ""]
        lines += tracing.kernel_table(tracing.from_dicts(trace["kernels"]))
    return lines


def best_lines(part: dict[str, Any]) -> list[str]:
    """Each library's best configuration, and how ours compares with it."""
    lines = []
    for library, name in part["best"].items():
        row = part["systems"][name]
        line = f"Best of {library}: {row['kind']}, {_spread(row['step_images_per_s'])} images/s"
        if library in part["best_ratio"]:
            line += f"; the best of ours is {_ratio(part['best_ratio'][library])} times that"
        lines += ["", line + "."]
    return [*lines, ""]


def counts_table(part: dict[str, Any]) -> list[str]:
    """Operations and synchronisations."""
    rows = []
    for name, counts in part["systems"].items():
        for what, row in counts.items():
            waits = ", ".join(f"{op} {number}" for op, number in row["waiting_ops"].items())
            seen = str(row.get("syncs_seen", "-"))
            rows.append((name, what, str(row["ops"]), str(row["waits"]), seen, waits or "none"))
    head = ("system", "what", "operations", "that wait", "seen on the GPU", "which")
    return harness.table(head, rows)


def roofline_table(part: dict[str, Any]) -> list[str]:
    """What the device gives, what a picture takes, and how near each library comes."""
    copy, triad = (part["bandwidth"][name] for name in ("copy", "triad"))
    products = ", ".join(f"{name} {rate:.2f}" for name, rate in part["matmul_tflop_s"].items())
    lines = [
        f"Copies of {part['bandwidth']['buffer_bytes'] / 2**20:.0f} MiB move {copy['best_gb_s']:g} "
        f"GB/s at best ({copy['median_gb_s']:g} in the median; a triad {triad['best_gb_s']:g}, "
        f"{triad['median_gb_s']:g}); TFLOP/s of a square matrix product: {products}.",
        "",
        *harness.table(
            ("model", "px", "GFLOP forward, train", "precision", "inference", "A", "B", "C, MB"),
            (
                (
                    name,
                    str(entry["input_size"]),
                    f"{entry['flop_forward'] / 1e9:.3f}, {entry['flop_train'] / 1e9:.2f}",
                    dtype,
                    *(f"{found[kind] / 1e6:.1f}" for kind in ("inference", "A", "B", "C")),
                )
                for name, entry in part["floors"].items()
                for dtype, found in entry["bytes"].items()
                if dtype != "fp16"  # as bf16
            ),
        ),
        "",
    ]
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for point in part["points"]:
        key = (point["model"], point["what"], point["library"])
        if key not in best or point["images_per_s"] > best[key]["images_per_s"]:
            best[key] = point
    rows = [
        (
            f"{point['model']}, {point['what']}",
            point["system"],
            f"{point['images_per_s']:.1f}",
            f"{point['limit_images_per_s']:.0f}",
            f"{100 * point['fraction']:.1f} %",
        )
        for point in best.values()
    ]
    head = ("each library's best", "system", "images/s", "the floor allows", "share")
    lines += harness.table(head, rows)
    return [*lines, "", "Training is judged by whole steps against floor B (roofline.py says how)."]


def _spread(found: dict[str, Any]) -> str:
    return f"{found['median']:.1f} ({found['p10']:.1f} to {found['p90']:.1f})"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
