"""From raw deliveries to counts, and from counts to Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peers import scoring
from peers.damage import CASES


def summarise(
    raw: dict[str, Any], *, truth: dict[int, str], epochs: int, mean_bytes: float
) -> dict[str, Any]:
    """Return the counts of one system's raw results.

    Args:
        raw: What its adapter printed.
        truth: Digest of each sample's picture.
        epochs: Passes of the runs that were read to the end.
        mean_bytes: Size of a picture, to say in bytes what was read again.
    """
    num_samples = len(truth)
    order: dict[str, Any] = {}
    for variant in raw["variants"]:
        runs = [run for run in raw["order"] if run["variant"] == variant]
        if runs:
            rows = [
                {
                    "world_size": run["world_size"],
                    "workers": run["workers"],
                    "problem": run["problem"],
                    **scoring.once_per_epoch(run["ranks"], num_samples=num_samples, epochs=epochs),
                }
                for run in runs
            ]
            order[variant] = {"runs": rows, "equal": scoring.same_order(runs)}
    return {
        "versions": raw["versions"],
        "settings": raw["settings"],
        "seconds": raw["seconds"],
        "seconds_by_part": raw["seconds_by_part"],
        "order": order,
        "resume": _resume(raw["resume"], mean_bytes),
        "elastic": [_elastic(walk, num_samples) for walk in raw["elastic"]],
        "evaluation": [_evaluation(run, num_samples) for run in raw["evaluation"]],
        "scale": raw["scale"],
        "damage": {
            variant: {case: scoring.judge(row, truth) for case, row in rows.items()}
            for variant, rows in raw["damage"].items()
        },
    }


def _resume(raw: dict[str, Any] | None, mean_bytes: float) -> dict[str, Any] | None:
    if raw is None or "whole" not in raw:
        return raw
    cuts = {
        str(cut["stop"]): scoring.resumed_alike(
            raw["whole"]["ranks"], cut["before"]["ranks"], cut["after"]["ranks"]
        )
        for cut in raw["cuts"]
    }
    after = raw["alone"]["after"]
    again = scoring.read_again(after["ranks"], after["touched"])
    extra = after["extra"][0] or {}
    return {
        "alike_after_steps": cuts,
        "read_again": again,
        "read_again_bytes": round(again * mean_bytes),
        **extra,
    }


def _elastic(walk: dict[str, Any], num_samples: int) -> dict[str, Any]:
    problem = next((leg["problem"] for leg in walk["legs"] if leg["problem"]), None)
    if len(walk["legs"]) < len(walk["worlds"]) or problem:
        return {"worlds": walk["worlds"], "problem": problem or "no state to go on from"}
    legs = [leg["ranks"] for leg in walk["legs"]]
    counts = scoring.over_legs(legs, walk["whole"]["ranks"], num_samples=num_samples)
    return {"worlds": walk["worlds"], "problem": None, **counts}


def _evaluation(run: dict[str, Any], num_samples: int) -> dict[str, Any]:
    counts = scoring.once_per_epoch(run["ranks"], num_samples=num_samples, epochs=1)
    gathered = next((item["gathered"] for item in run["extra"] if item), None)
    row = {
        "world_size": run["world_size"],
        "problem": run["problem"],
        "missing": counts["missing"][0],
        "doubled": counts["doubled"][0],
        "batches": counts["batches"],
        "gathered": None if gathered is None else len(gathered),
    }
    if gathered is not None:
        row["gathered_missing"] = num_samples - len(set(gathered))
        row["gathered_doubled"] = len(gathered) - len(set(gathered))
    return row


def markdown(report: dict[str, Any]) -> str:
    """Return both tables of a report, with what stands below them."""
    systems = report["results"]
    names = [report["names"][name] for name in systems]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for title, cell in count_rows(report):
        cells = " | ".join(cell(result) for result in systems.values())
        lines.append(f"| {title} | {cells} |")
    lines += ["", *_damage_lines(report)]
    return "\n".join(lines)


def count_rows(report: dict[str, Any]) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """Return the rows of the table of counts: a title, and what makes a system's cell."""
    settings = report["settings"]
    worlds = ", ".join(str(n) for n in settings["world_sizes"])
    walks = [" → ".join(str(n) for n in walk) for walk in settings["elastic"]]
    ranks = ", ".join(str(n) for n in settings["evaluation_world_sizes"])
    nodes = " / ".join(str(n) for n in settings["scale"]["nodes"])
    total = settings["scale"]["num_samples"] / 1e6
    batch = settings["scale"]["global_batch"]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        (f"missing / doubled in an epoch, worst of {worlds} ranks", _once),
        ("batches of the ranks in an epoch", _uneven),
        ("global batches equal on all numbers of ranks, as sets / in order", _equal("world_sizes")),
        ("the same, on all numbers of workers or threads", _equal("workers")),
        ("stopped in an epoch and resumed: the same batches", _alike),
        ("consumed samples that are read again to resume", _again),
        (f"planning a resume at 1, 50, 99 % of {total:.2f} M samples", _times),
    ]
    for number, walk in enumerate(walks):
        rows.append((f"{walk} ranks in an epoch: missing / repeated", _walk(number)))
    rows += [
        (f"evaluation on {ranks} ranks: missing / doubled", _counted),
        (f"shards in a batch of {batch}, {nodes} nodes", _traffic("shards_per_batch")),
        ("fetches of a shard in an epoch over all nodes", _traffic("fetched_per_shard")),
        ("shards that a node holds at a time", _traffic("held_max")),
    ]
    return rows


def _once(result: dict[str, Any]) -> str:
    cells: list[str] = []
    for number, (variant, runs) in enumerate(result["order"].items()):
        problems = [run["problem"] for run in runs["runs"] if run["problem"]]
        missing = max(max(run["missing"]) for run in runs["runs"])
        doubled = max(max(run["doubled"]) for run in runs["runs"])
        text = "fails" if problems else f"{missing} / {doubled}"
        if number == 0 or text != cells[0]:
            cells.append(text if number == 0 else f"{variant}: {text}")
    return "; ".join(cells)


def _uneven(result: dict[str, Any]) -> str:
    runs = next(iter(result["order"].values()))["runs"]
    wide = max(runs, key=lambda run: run["batches"][1] - run["batches"][0])
    low, high = wide["batches"]
    return "equal" if low == high else f"{low} to {high} on {wide['world_size']} ranks"


def _equal(what: str) -> Callable[[dict[str, Any]], str]:
    def cell(result: dict[str, Any]) -> str:
        texts = []
        for number, (variant, runs) in enumerate(result["order"].items()):
            shares = runs["equal"][what]
            if shares is not None:
                text = " / ".join(_percent(share) for share in shares)
                texts.append(text if number == 0 else f"{variant}: {text}")
        return "; ".join(dict.fromkeys(texts)) or "-"

    return cell


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.1f} %"


def _alike(result: dict[str, Any]) -> str:
    resume = result["resume"]
    if resume is None:
        return "none"
    if "alike_after_steps" not in resume:
        return "fails"
    return "yes" if all(resume["alike_after_steps"].values()) else "**no**"


def _again(result: dict[str, Any]) -> str:
    resume = result["resume"]
    if resume is None or "read_again" not in resume:
        return "none"
    text = str(resume["read_again"])
    if "stream_read_again" in resume:
        text += f"; of a stream all {resume['stream_read_again']}"
    return text


def _times(result: dict[str, Any]) -> str:
    times = result["scale"].get("resume_ms")
    if not times:
        return "none"
    if not isinstance(next(iter(times.values())), dict):
        times = {"": times}
    cells = []
    for kind, row in times.items():
        text = ", ".join(
            f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in row.values()
        )
        cells.append(f"{kind} {text} ms".strip())
    return "; ".join(cells)


def _walk(number: int) -> Callable[[dict[str, Any]], str]:
    def cell(result: dict[str, Any]) -> str:
        walk = result["elastic"][number]
        if walk["problem"]:
            return "none" if walk["problem"].startswith("no state") else "fails"
        text = f"{walk['missing']} / {walk['repeated']}"
        alone = f"{walk['whole_missing']} / {walk['whole_repeated']}"
        return text if text == alone else f"{text} (without a stop {alone})"

    return cell


def _counted(result: dict[str, Any]) -> str:
    rows = result["evaluation"]
    if any(row["problem"] for row in rows):
        return "fails"
    # What the documented way of counting sees, where a system has one of its own.
    kind = "" if rows[0]["gathered"] is None else "gathered_"
    missing = [row[f"{kind}missing"] for row in rows]
    doubled = [row[f"{kind}doubled"] for row in rows]
    text = f"{_span(missing)} / {_span(doubled)}"
    if rows[0]["gathered"] is not None:
        text += f" (before gathering {_span([row['doubled'] for row in rows])} doubled)"
    uneven = max(row["batches"][1] - row["batches"][0] for row in rows)
    return text + (f"; ranks differ by {uneven} batches" if uneven > 1 else "")


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _traffic(what: str) -> Callable[[dict[str, Any]], str]:
    def cell(result: dict[str, Any]) -> str:
        kinds = result["scale"].get("traffic")
        if not kinds:
            return "-"
        first = next(iter(kinds.values()))  # the default
        return _by_nodes(first, what)

    return cell


def _by_nodes(nodes: dict[str, dict[str, float]], what: str) -> str:
    return " / ".join(f"{row[what]:g}" for row in nodes.values())


def traffic_table(report: dict[str, Any]) -> str:
    """Return the shards behind each way of shuffling, not only the default one."""
    nodes = " / ".join(str(n) for n in report["settings"]["scale"]["nodes"])
    lines = [
        f"| order, {nodes} nodes | shards in a batch | fetches of a shard | shards held |",
        "| --- | --- | --- | --- |",
    ]
    for name, result in report["results"].items():
        for kind, rows in result["scale"].get("traffic", {}).items():
            cells = (
                _by_nodes(rows, what)
                for what in ("shards_per_batch", "fetched_per_shard", "held_max")
            )
            lines.append(f"| {report['names'][name]}, {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _damage_lines(report: dict[str, Any]) -> list[str]:
    columns = [
        (report["names"][name] + (f", {variant}" if number else ""), rows)
        for name, result in report["results"].items()
        for number, (variant, rows) in enumerate(result["damage"].items())
    ]
    if not columns:
        return []
    lines = ["| damage | " + " | ".join(title for title, _ in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for case in report["settings"]["damage"]:
        cells = " | ".join(damage_cell(rows[case]) for _, rows in columns)
        lines.append(f"| {CASES[case]} | {cells} |")
    return lines


def damage_cell(row: dict[str, Any] | None) -> str:
    """Return one cell of the damage table."""
    if row is None:
        return "-"
    if row["result"] == "unharmed":
        return "no harm"
    if row["result"] in ("hang", "crash"):
        return f"**{row['result']}** ({row['by']})"
    harm = ", ".join(f"{row[name]} {name}" for name in ("lost", "wrong", "doubled") if row[name])
    if row["result"] == "silent":
        return f"**silent**: {harm}"
    names = "names " + ", ".join(row["names"]) if row["names"] else "names nothing"
    if row["result"] == "log only":
        return f"**log only**, {names}: {harm}"
    if row["by"] == "next epoch":
        return f"epoch ends {f'early, {harm}' if harm else 'whole'}; error at the next one, {names}"
    place = "" if row["by"] == "reader" else f" ({row['by']})"
    before = ", ".join(f"{row[name]} {name}" for name in ("wrong", "doubled") if row[name])
    return f"error{place}, {names}" + (f", after {before}" if before else "")
