"""The saved results: which section of which file counts, and how figures are written.

A benchmark is measured in sections, and run again in parts. Of each section, on each kind of
device, the one in the newest file counts (`YYYY-MM-DD-NAME[-N].json`: by date, then by N).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = re.compile(r"(\d{4}-\d{2}-\d{2})-(.+?)(?:-(\d+))?\.json")
# What a benchmark's file is called where the report itself does not say.
BENCHMARKS = (
    "loader",
    "decode",
    "convert",
    "train_step",
    "nms",
    "latency",
    "end_to_end",
    "scaling",
    "streaming_guarantees",
    "resume",
    "parity",
)
WHOLE = ("latency", "streaming_guarantees", "resume", "parity")  # reports without sections
LOADED = ("originals", "256", "detection")  # loader.py's sections, in the order of the tables
OUTPUTS = ("--json", "--markdown", "--work", "--wandb", "--trace")  # options with a value


@dataclass(frozen=True)
class Section:
    """The newest results of one part of a benchmark on one kind of device."""

    benchmark: str
    name: str  # "" where a report has no sections
    device: str  # "cpu" or the GPU's name
    data: dict[str, Any]
    file: str  # in results/
    document: str  # the tables of that run, where they were saved; else the same file
    date: str

    @property
    def is_gpu(self) -> bool:
        """Whether it was measured on a GPU."""
        return self.device != "cpu"

    @property
    def command(self) -> str:
        """Return the command as it ran."""
        return str(self.data.get("command", f"python benchmarks/{self.benchmark}.py"))


@dataclass(frozen=True)
class Results:
    """All that results/ holds: sections, and documents of another form."""

    sections: tuple[Section, ...]
    others: tuple[str, ...]  # files that no section counts of

    def of(self, benchmark: str, prefix: str = "") -> list[Section]:
        """Return the sections of a benchmark whose names start with `prefix`, in their order."""
        found = [section for section in self.sections if section.benchmark == benchmark]
        return [section for section in found if section.name.startswith(prefix)]


def load(folder: Path) -> Results:
    """Read a folder of results.

    Raises:
        ValueError: For a file that is no result, or one of a `--quick` run.
        OSError: When a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of results; run the benchmarks with --json first")
    newest: dict[tuple[str, str, str], Section] = {}
    for path in sorted(folder.glob("*.json"), key=_age):
        for section in _sections(path):
            # Taken out first: the order is that of the newest file.
            newest.pop((section.benchmark, section.name, section.device), None)
            newest[section.benchmark, section.name, section.device] = section
    sections = sorted(newest.values(), key=_place)
    used = {section.file for section in sections} | {section.document for section in sections}
    names = (path.name for path in folder.iterdir() if path.suffix in (".json", ".md"))
    return Results(tuple(sections), tuple(sorted(name for name in names if name not in used)))


def _place(section: Section) -> tuple[int, int, bool]:
    number = LOADED.index(section.name) if section.name in LOADED else len(LOADED)
    return BENCHMARKS.index(section.benchmark), number, section.is_gpu


def _age(path: Path) -> tuple[str, int, str]:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: results are called YYYY-MM-DD-NAME.json; rename it")
    return match[1], int(match[3] or 1), path.name


def _sections(path: Path) -> Iterator[Section]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); measure again with --json") from None
    match = NAME.fullmatch(path.name)
    assert match is not None
    if not isinstance(report, dict):
        raise ValueError(f"{path} holds no report, which is a JSON object")
    benchmark = report.get("benchmark", match[2].replace("-", "_"))
    if benchmark not in BENCHMARKS:
        return
    with of_form(path.name, benchmark):
        for name, device, data in _parts(benchmark, report):
            if "--quick" in str(data.get("command", "")) or (data.get("settings", {}).get("quick")):
                raise ValueError(f"{path} is of a --quick run; results/ holds whole runs")
            document = path.with_suffix(".md")
            shown = document.name if document.is_file() else path.name
            yield Section(benchmark, name, device, data, path.name, shown, match[1])


def _parts(benchmark: str, report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, device and results of a report's sections."""
    if benchmark == "nms":  # one list of cases, of one or two devices
        for kind, device in (("cpu", "cpu"), ("cuda", report["gpu"])):
            cases = [case for case in report["cases"] if case["device"] == kind]
            if cases:
                yield "", device, {**report, "cases": cases}
    elif benchmark in WHOLE:
        yield "", str(report.get("device", "cpu")), report
    else:
        for name, part in report["sections"].items():
            yield name, str(part.get("device", "cpu")), part


@contextmanager
def of_form(file: str, name: str) -> Iterator[None]:
    """Turn what a result lacks into one line that names the file.

    Raises:
        ValueError: With file, section and what is missing.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(
            f"{file}: {name} is not of the form that report.py knows "
            f"({type(error).__name__}: {error}); measure again with --json"
        ) from error


def shown_command(command: str) -> str:
    """Return a command as somebody else types it: no outputs, folders by what they must be."""
    shards = "latency.py" in command
    places = {"--data": "DATA" if shards else "FOLDER", "--voc": "VOC", "--model": "MODEL"}
    words, shown = iter(shlex.split(command)), []
    for word in words:
        if word in OUTPUTS:
            next(words, None)
        elif word in places:
            next(words, None)
            shown += [word, places[word]]
        elif word != "--add":
            shown.append(shlex.quote(word))
    return " ".join(shown)


def times(value: float) -> str:
    """Return a ratio with three digits or so."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ratio_text(found: Mapping[str, float]) -> str:
    """Return a ratio with its interval."""
    return f"{times(found['ratio'])} ({times(found['low'])} to {times(found['high'])})"


def number(value: float) -> str:
    """Return a measured number with about three digits."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def spread_cells(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return the median, and the 10th and 90th percentile."""
    return number(found["median"]), f"{number(found['p10'])} to {number(found['p90'])}"
