"""What the delivered batches amount to: counts only, no system and no file is touched here.

An entry is one batch of one rank: {"step": [epoch, number], "ids": [...], "epochs": e or [...]}.
A run is a list of entries per rank; a rank that failed is None.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

Entry = dict[str, Any]
Run = Sequence[Sequence[Entry] | None]


def samples_by_epoch(run: Run) -> dict[int, Counter[int]]:
    """Return how often each sample came in each epoch; epoch -1 is padding and not counted."""
    counts: dict[int, Counter[int]] = {}
    for rank in run:
        for entry in rank or []:
            epochs = entry["epochs"]
            for place, index in enumerate(entry["ids"]):
                epoch = epochs if isinstance(epochs, int) else epochs[place]
                if epoch >= 0:
                    counts.setdefault(epoch, Counter())[index] += 1
    return counts


def once_per_epoch(run: Run, *, num_samples: int, epochs: int) -> dict[str, Any]:
    """Count samples that an epoch lacks or has more than once, and how uneven the ranks are.

    Returns:
        missing, doubled: A number per epoch.
        batches: The least and the most that a rank got in one turn of its loader.
    """
    counts = samples_by_epoch(run)
    missing, doubled = [], []
    for epoch in range(epochs):
        seen = counts.get(epoch, Counter())
        missing.append(num_samples - len(seen))
        doubled.append(sum(seen.values()) - len(seen))
    turns = {entry["step"][0] for rank in run for entry in rank or []}
    num_batches = [
        sum(entry["step"][0] == turn for entry in rank or []) for rank in run for turn in turns
    ]
    return {
        "missing": missing,
        "doubled": doubled,
        "batches": [min(num_batches, default=0), max(num_batches, default=0)],
    }


def global_batches(run: Run) -> list[list[int]]:
    """Return the samples of each step over all ranks, in the order of the ranks."""
    steps: dict[tuple[int, ...], list[int]] = {}
    for rank in run:
        for entry in rank or []:
            steps.setdefault(tuple(entry["step"]), []).extend(entry["ids"])
    return [steps[step] for step in sorted(steps)]


def equal_batches(run: Run, other: Run) -> tuple[float, float]:
    """Return the shares of global batches that are equal as sets, and as sequences."""
    mine, its = global_batches(run), global_batches(other)
    total = max(len(mine), len(its), 1)
    pairs = list(zip(mine, its, strict=False))
    sets = sum(Counter(a) == Counter(b) for a, b in pairs)
    return sets / total, sum(a == b for a, b in pairs) / total


def same_order(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Compare runs of one variant with that of the fewest ranks and workers.

    Returns:
        world_sizes, workers: The mean shares [sets, sequences] of equal global batches where only
            the number of ranks, or only that of workers, differs.
    """
    good = [run for run in runs if None not in run["ranks"]]
    shares: dict[str, list[tuple[float, float]]] = {"world_sizes": [], "workers": []}
    for run in good:
        for other in good:
            same_workers = run["workers"] == other["workers"]
            same_ranks = run["world_size"] == other["world_size"]
            if same_workers and run["world_size"] < other["world_size"]:
                if run["world_size"] == min(item["world_size"] for item in good):
                    shares["world_sizes"].append(equal_batches(run["ranks"], other["ranks"]))
            elif same_ranks and run["workers"] < other["workers"]:
                shares["workers"].append(equal_batches(run["ranks"], other["ranks"]))
    return {name: _means(pairs) for name, pairs in shares.items()}


def _means(pairs: list[tuple[float, float]]) -> list[float] | None:
    if not pairs:
        return None
    return [round(sum(column) / len(pairs), 4) for column in zip(*pairs, strict=True)]


def resumed_alike(whole: Run, before: Run, after: Run) -> bool:
    """Say whether stopping and going on gave every rank the batches of the run without a stop."""
    for complete, first, rest in zip(whole, before, after, strict=True):
        if complete is None or first is None or rest is None:
            return False
        if [item["ids"] for item in complete] != [item["ids"] for item in [*first, *rest]]:
            return False
    return True


def read_again(run: Run, touched: Sequence[Sequence[int] | None]) -> int:
    """Return how many samples the ranks of a resumed run read beyond those they delivered."""
    delivered = Counter(index for rank in run for entry in rank or [] for index in entry["ids"])
    read = Counter(index for rank in touched for index in rank or [])
    return (read - delivered).total()


def over_legs(legs: Sequence[Run], whole: Run, *, num_samples: int) -> dict[str, Any]:
    """Count what one epoch lacks and repeats when its legs ran on different world sizes.

    Returns:
        missing, repeated: Over all legs.
        whole_missing, whole_repeated: The same of the run without a stop.
        equal: Shares [sets, sequences] of the global batches that are those of that run.
    """
    seen: Counter[int] = Counter()
    batches: list[list[int]] = []
    for leg in legs:
        seen += samples_by_epoch(leg).get(0, Counter())
        batches += global_batches(leg)
    alone = samples_by_epoch(whole).get(0, Counter())
    steps = [{"step": [0, n], "ids": ids, "epochs": 0} for n, ids in enumerate(batches)]
    return {
        "missing": num_samples - len(seen),
        "repeated": sum(seen.values()) - len(seen),
        "whole_missing": num_samples - len(alone),
        "whole_repeated": sum(alone.values()) - len(alone),
        "equal": [round(share, 4) for share in equal_batches([steps], whole)],
    }


def judge(outcome: dict[str, Any] | None, truth: dict[int, str]) -> dict[str, Any] | None:
    """Say what became of a damaged data set.

    Args:
        outcome: What `damage.read_damaged` returned; None where the case does not exist.
        truth: Each sample's digest.

    Returns:
        result: "error", "log only", "crash", "hang" or "silent"; "unharmed" if every sample came
            intact and nothing was said.
        by: What said it: the reader, the decoder, the next epoch, the log, a signal.
        names: Which of file, sample and offset its message names.
        lost, wrong, doubled: Samples that did not come, came with other bytes, came again.
        message: The message.
    """
    if outcome is None:
        return None
    if outcome["timed_out"] or outcome["signal"]:
        kind = "hang" if outcome["timed_out"] else "crash"
        return {"result": kind, "by": outcome["signal"] or "time limit", "names": [], "message": ""}
    report = outcome["value"]
    if report is None:
        raise RuntimeError(f"the reading process failed: {outcome['error']}")
    came = Counter(key for key, _ in report["delivered"])
    harm = {
        "lost": len(truth.keys() - came.keys()),
        "wrong": sum(truth.get(key) != digest for key, digest in report["delivered"]),
        "doubled": sum(came.values()) - len(came),
    }
    log = " | ".join(report["log"])
    if report["error"]:
        result = "error"
        source = "decoder" if report["decoder"] else "next epoch" if report["epochs"] else "reader"
    else:
        result, source = ("log only", "log") if log else ("silent", "")
        if not any(harm.values()):
            result = "unharmed"
    message = (report["error"] or "") + (f" [log: {log}]" if log else "")
    return {
        "result": result,
        "by": source,
        "names": named(message, report),
        **harm,
        "message": message,
    }


def named(message: str, damage: dict[str, Any]) -> list[str]:
    """Return which of file, sample and offset a message names.

    Args:
        message: What the system said.
        damage: Where the damage is: `files`, names of files; `key` and `position` (in its shard)
            of the sample, -1 if any sample of the shard will do; `span`, the first and the last
            byte that an offset may name.
    """
    names = []
    if any(file in message for file in damage["files"]):
        names.append("file")
    for file in damage["files"]:
        message = message.replace(file, "")
    keys = [int(key) for key in re.findall(r"\bsample (\d+)\b", message)]
    positions = [int(key) for key in re.findall(r"\bsample index (\d+)\b", message)]
    any_will_do = damage["key"] < 0
    # An entry of a shard's table ends one sample and begins the next.
    near = any(abs(place - damage["position"]) <= 1 for place in positions)
    hit = near or damage["key"] in keys
    if hit or (any_will_do and keys + positions):
        names.append("sample")
    offsets = re.findall(r"\b(?:offset|byte|position)s?\b[^0-9]{0,12}(\d+)", message)
    low, high = damage["span"]
    if any(low <= int(offset) <= high for offset in offsets):
        names.append("offset")
    return names
