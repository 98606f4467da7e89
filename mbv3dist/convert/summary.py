"""What ``mbv3dist convert`` prints when it is done."""

from __future__ import annotations

from mbv3dist.convert.records import ConvertReport
from mbv3dist.data.urls import redact


def summary_lines(report: ConvertReport, out: str) -> list[str]:
    """Return a line for each split, each thing left out and what comes next.

    Args:
        report: What the conversion made.
        out: The data set as the user named it.
    """
    lines = []
    for name, split in report.splits.items():
        notes = [f"{count} {what}" for what, count in split.counts.items() if count]
        boxes = f", {split.boxes} boxes" if report.task == "detection" else ""
        whole = "this part has " if report.waiting else ""
        place = f"{redact(out)}/{name}"
        lines.append(
            f"{place}: {whole}{split.samples} samples{boxes}, {split.shards} shard(s), "
            f"{split.bytes / 1e6:.1f} MB" + (f"; {', '.join(notes)}" if notes else "")
        )
        lines += [f"left out: {problem}" for problem in split.problems]
        if not report.waiting:
            lines.append(f"report: {split.report}")
    if report.waiting:
        first = ", ".join(map(str, report.waiting[:20]))
        more = ", ..." if len(report.waiting) > 20 else ""
        lines.append(
            f"not visible yet: {len(report.waiting)} part(s) to go ({first}{more}); the last one "
            "to end publishes"
        )
    if report.reused:
        lines.append(
            "nothing to do: made before with these settings from files of the same names and sizes"
        )
    return lines
