"""Turn results/ into RESULTS.md, plots/ and the generated regions of the README.

    python benchmarks/report.py            # writes what changed
    python benchmarks/report.py --check    # writes nothing; exit code 1 and a line for what differs

Nothing of it is typed by hand: a number that is not in results/ cannot get into a table. Files
depend on the results alone (plots on the version of matplotlib too, which stands in them).
The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from reporting import panels, plots
from reporting.curves import roofline, scaling
from reporting.document import REGIONS, results_document
from reporting.questions import answers
from reporting.results import Results, load, of_form

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- ([a-z-]+): (begin|end) -->$", re.MULTILINE)
CREATOR = re.compile(r"Matplotlib v([^,<]+)")


def documents(root: Path) -> dict[Path, str]:
    """Return every file that results make, and what is in it.

    Args:
        root: The repository: README.md and benchmarks/results/ are read.

    Raises:
        ValueError: When a result is of no known form, or the README's markers do not fit.
        OSError: When a file cannot be read.
    """
    home = root / "benchmarks"
    results = load(home / "results")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    check_regions(text, file=readme.name)
    plots = draw(results)
    made = {home / "plots" / f"{name}.svg": drawn for name, drawn in plots.items()}
    made[home / "RESULTS.md"] = results_document(results, list(plots))
    made[readme] = fill(text, results)
    return made


def draw(results: Results) -> dict[str, str]:
    """Return the plots that the results allow, by name."""
    stacked = {
        "loader": (panels.loaders, "loader", ""),
        "train_step": (panels.train_steps, "train_step", ""),
        "postprocess": (panels.postprocess, "nms", ""),
        "latency": (panels.latency, "latency", ""),
        "end_to_end": (panels.end_to_end, "end_to_end", ""),
    }
    drawn = {"headline": plots.headline(answers(results))}
    for name, (panels_of, benchmark, prefix) in stacked.items():
        sections = results.of(benchmark, prefix)
        if sections:
            with of_form(sections[0].file, benchmark):
                drawn[name] = plots.stacked(panels_of(sections))
    measured = [s for s in results.of("scaling") if s.name in ("weak", "strong")]
    curves = results.of("scaling", "curve")
    if measured or curves:
        with of_form((measured or curves)[0].file, "scaling"):
            drawn["scaling"] = scaling(measured, curves)
    roofs = results.of("train_step", "roofline")
    roofs = [section for section in roofs if section.data.get("points")]
    if roofs:
        with of_form(roofs[0].file, "roofline"):
            drawn["roofline"] = roofline(roofs)
    return drawn


def check_regions(text: str, *, file: str) -> None:
    """Check that a document has every region once, and no other.

    Raises:
        ValueError: With the regions that there must be.
    """
    found = MARKER.findall(text)
    wanted = [(name, end) for name, _ in found[::2] for end in ("begin", "end")]
    if found != wanted or sorted(name for name, _ in found[::2]) != sorted(REGIONS):
        raise ValueError(
            f"{file} must have one line <!-- NAME: begin --> and then one <!-- NAME: end --> for "
            f"each of {', '.join(REGIONS)}, and no other region"
        )


def fill(text: str, results: Results) -> str:
    """Return a document with its regions as the results make them."""
    for name, make in REGIONS.items():
        text = replaced(text, name, make, results)
    return text


def replaced(
    text: str, name: str, make: Callable[[Results, str], list[str]], results: Results
) -> str:
    """Return a document with one region made anew."""
    head, begin, rest = text.partition(f"<!-- {name}: begin -->\n")
    _, end, tail = rest.partition(f"<!-- {name}: end -->")
    return "".join((head, begin, "\n".join(make(results, "benchmarks/")), "\n", end, tail))


def differences(made: dict[Path, str], root: Path) -> list[str]:
    """Return a line for each file, or region of the README, that is not as results make it."""
    said = []
    for path, text in made.items():
        name = path.relative_to(root).as_posix()
        before = path.read_text(encoding="utf-8") if path.is_file() else None
        if before == text:
            continue
        if before is None:
            said.append(f"{name} is missing")
        elif path.name == "README.md":
            said += [f"{name} differs in region {region}" for region in _regions(before, text)]
        elif _drawn_by(before) != _drawn_by(text):
            said.append(
                f"{name} was drawn by matplotlib {_drawn_by(before)}, this is "
                f"{matplotlib.__version__}"
            )
        else:
            said.append(f"{name} differs")
    said += [f"{path.relative_to(root).as_posix()} has no results" for path in stale(made, root)]
    return said


def _regions(before: str, after: str) -> list[str]:
    """Return the regions in which two documents differ."""

    def of(text: str, name: str) -> str:
        return text.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]

    return [name for name in REGIONS if of(before, name) != of(after, name)]


def _drawn_by(text: str) -> str | None:
    match = CREATOR.search(text)
    return match[1] if match else None


def stale(made: dict[Path, str], root: Path) -> list[Path]:
    """Return plots that no result makes."""
    folder = root / "benchmarks" / "plots"
    return sorted(set(folder.glob("*.svg")) - set(made))


def write(made: dict[Path, str], root: Path) -> list[str]:
    """Write what changed, remove plots of which there are no results; return the names."""
    changed = []
    for path, text in made.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
            changed.append(path)
    for path in stale(made, root):
        path.unlink()
        changed.append(path)
    return [path.relative_to(root).as_posix() for path in changed]


def main(words: Sequence[str] | None = None) -> int:
    """Write or compare; return the exit code."""
    parser = argparse.ArgumentParser(description="RESULTS.md, plots and README from results/.")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="the repository (default: this one)"
    )
    args = parser.parse_args(words)
    try:
        made = documents(args.root)
        if args.check:
            said = differences(made, args.root)
            for line in said:
                print(f"report: {line}; run `python benchmarks/report.py`", file=sys.stderr)
            print(json.dumps({"files": len(made), "different": said}))
            return 1 if said else 0
        print(json.dumps({"files": len(made), "changed": write(made, args.root)}))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
