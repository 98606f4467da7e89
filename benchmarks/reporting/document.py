"""RESULTS.md, and the regions of the README, from the results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import harness
from peers import table

from reporting.questions import KINDS, Answer, Figure, answers, as_it_comes, beside, our_system
from reporting.results import Results, Section, of_form, ratio_text, shown_command
from reporting.sections import TABLES

MADE = "<!-- Made by `python benchmarks/report.py` from results/; edit nothing here. -->"
# Title, the question, and the plots that go with it.
CHAPTERS = {
    "loader": ("Loaders", "How many pictures a second does a training loader deliver?", ["loader"]),
    "decode": ("Decoding", "What does decoding cost, and where does a picture's time go?", []),
    "convert": ("Conversion", "How fast do pictures get into shards, at what loss?", []),
    "train_step": (
        "Training steps",
        "What does a step cost beside torchvision's and timm's, and beside the hardware's limit?",
        ["train_step", "roofline"],
    ),
    "end_to_end": (
        "From files to trained steps",
        "How fast is training as a whole, and how long does it wait for data?",
        ["end_to_end"],
    ),
    "nms": ("Post-process", "What do logits to detections cost?", ["postprocess"]),
    "latency": ("Exported detectors", "How long does one picture take?", ["latency"]),
    "scaling": (
        "More ranks",
        "What do more processes bring, and what would 8 to 1024?",
        ["scaling"],
    ),
    "streaming_guarantees": (
        "Streaming guarantees",
        "Does a sample get lost, doubled or moved, and is damage noticed?",
        [],
    ),
    "resume": ("Resuming", "What does it cost to go on in the middle of a run?", []),
    "parity": ("Parity", "Do imported models answer as torchvision's and timm's do?", []),
}


def results_document(results: Results, plots: Sequence[str]) -> str:
    """Return RESULTS.md.

    Args:
        results: What is in results/.
        plots: Names of the plots that are drawn, without ending.
    """
    lines = [
        "# Results",
        "",
        MADE,
        "",
        "Ratios are of medians of systems that took turns in one run, with a 95 % bootstrap "
        "interval over its rounds; above 1 ours is faster. Absolute figures of a CPU say little to "
        "others: they stand last. Of each section the newest run counts. How it is measured: "
        "[README.md](README.md).",
        "",
        *headline(results, ""),
    ]
    for benchmark, (title, question, drawn) in CHAPTERS.items():
        sections = results.of(benchmark)
        if not sections:
            continue
        lines += ["", f"## {title}", "", question]
        lines += [
            f"\n![{title}: {name.replace('_', ' ')}](plots/{name}.svg)"
            for name in drawn
            if name in plots
        ]
        for section in sections:
            with of_form(section.file, section.name or benchmark):
                body = TABLES[benchmark](section)
            name = ", ".join(filter(None, (section.name, section.device * section.is_gpu)))
            lines += ["", *([f"### {name}", ""] if name else []), *body, "", *provenance(section)]
    lines += ["", "## Others", "", "Results of another form, and runs that newer ones replace:", ""]
    lines += [f"- [{name}](results/{name})" for name in results.others]
    return "\n".join(lines) + "\n"


def provenance(section: Section) -> list[str]:
    """Return when, on what, from which commit, and how a section was measured."""
    host = section.data["machine"]
    head, plus = section.data["commit"].rstrip("+"), section.data["commit"].endswith("+")
    facts = [
        section.date,
        f"{host['cpu']}, {host['cores']} cores",
        *([section.device] if section.is_gpu else []),
        f"{host['system']}, Python {host['python']}",
        f"commit {head[:12]}{' with changes' if plus else ''}",
    ]
    if "seconds" in section.data:
        facts.append(f"{section.data['seconds']:.0f} s")
    load = (section.data.get("clocks") or {}).get("load")
    if load is not None:
        words = load["throttle"]
        throttled = "nobody knows" if words is None else " and ".join(words) or "nothing"
        facts.append(f"{load['sm_mhz']} MHz under load, throttled by {throttled}")
    versions = ", ".join(f"{name} {found}" for name, found in sorted(_versions(section).items()))
    return [
        f"`{section.command}`",
        "",
        f"{'; '.join(facts)}.{' ' if versions else ''}{versions}{'.' if versions else ''} "
        f"[Settings and all tables](results/{section.document})",
    ]


def _versions(section: Section) -> dict[str, str]:
    """Return the versions that a section names, of all its systems."""
    found: dict[str, str] = {}
    data = section.data
    groups = [data.get("versions", {})]
    for key in ("systems", "decoders", "results"):
        if isinstance(data.get(key), dict):
            groups += [row.get("versions", {}) for row in data[key].values()]
    for group in groups:
        for name, version in group.items():
            if isinstance(version, dict):  # by system
                found |= version
            else:
                found.setdefault(name, version.partition("+")[0].partition(",")[0])
    return found


def headline(results: Results, prefix: str) -> list[str]:
    """Return one table and one plot: how much faster, and how to check it.

    Args:
        results: What is in results/.
        prefix: From the document to the folder benchmarks/.
    """
    found = answers(results)
    head = ("question", "ours is ... times", "the fastest peer", "check it")
    hosts = sorted({_host(item.section) for item in found})
    dates = sorted({item.section.date for item in found})
    return [
        f"![How many times as fast as its peers ours is, per question]({prefix}plots/headline.svg)",
        "",
        *harness.table(head, (_answer_row(item, prefix) for item in found)),
        "",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {'; '.join(hosts)}. "
        "In brackets a 95 % interval (planning a resume: the least and most of three points of a "
        "run); one that holds 1 says that the two cannot be told apart. FOLDER has "
        "CLASS/PICTURE.jpg, VOC is a Pascal VOC folder, DATA a converted data set, MODEL a model "
        "directory; `make bench-peers` installs the peers first.",
    ]


def _host(section: Section) -> str:
    host = section.data["machine"]
    return section.device if section.is_gpu else f"{host['cpu']}, {host['cores']} cores"


def _figure_cell(found: Figure) -> str:
    text = ratio_text({"ratio": found.ratio, "low": found.low, "high": found.high})
    head, _, rest = text.partition(" ")
    return f"{found.peer}: {f'**{head}**' if found.low > 1 else head} {rest}"


def _answer_row(answer: Answer, prefix: str) -> tuple[str, ...]:
    if answer.counts is not None:
        cells = [f"ours: **{answer.counts[0]}**", answer.counts[1]]
    else:
        cells = [_figure_cell(found) for found in answer.figures] + ["the same"]
    section = answer.section
    link = f"[{section.date}]({prefix}results/{section.document})"
    return answer.question, *cells[:2], f"`{shown_command(section.command)}`, {link}"


def loaders(results: Results, prefix: str) -> list[str]:
    """Return the loaders' table: a row per pipeline, a column per form of the pictures."""
    sections = results.of("loader")
    if not sections:
        raise ValueError("results/ has nothing of loader.py; measure with --json")
    rows: dict[str, dict[str, str]] = {}
    order: dict[str, float] = {}
    titles = []
    for section in sections:
        data = section.data
        size = f"{data['data']['bytes_per_picture'] / 1000:.0f} KB"
        form = {"originals": "photographs", "256": "at 256 px"}.get(section.name, section.name)
        titles.append(f"[{form}, {size}]({prefix}results/{section.document})")
        for name, row in data["systems"].items():
            if name.startswith("ours"):
                continue
            version = next(iter(row["versions"].values())).partition("+")[0]
            title = f"{row['title']} ({version})"
            rows.setdefault(title, {})[titles[-1]] = ratio_text(row["ours_is"])
            order.setdefault(title, len(order) * 1e-6 + row["ours_is"]["ratio"])
    classification = {title for title, cells in rows.items() if titles[0] in cells}
    names = sorted(rows, key=lambda title: (title not in classification, order[title]))
    table_rows = ((name, *(rows[name].get(title, "-") for title in titles)) for name in names)
    return [
        *harness.table(("ours is ... times", *titles), table_rows),
        "",
        f"![Speed of every loader beside ours]({prefix}plots/loader.svg)",
    ]


def detector(results: Results, prefix: str) -> list[str]:
    """Return the detector beside torchvision's: post-process, training step, files, counts."""
    rows = [row for make in (_post, _steps, _files, _counts) for row in make(results, prefix)]
    if not rows:
        raise ValueError("results/ has nothing of nms.py, train_step.py or latency.py")
    return harness.table(("ours is ... times torchvision", "", ""), rows)


def _post(results: Results, prefix: str) -> Iterator[tuple[str, str, str]]:
    for section in results.of("nms"):
        for case in section.data["cases"]:
            what = (
                f"post-process, {case['batch']} pictures, {case['columns'] - 1} classes, "
                f"{KINDS[case['kind']]} outputs{_on(section)}"
            )
            yield what, ratio_text(case["ours_is"]["torchvision"]), _link(section, prefix)


def _steps(results: Results, prefix: str) -> Iterator[tuple[str, str, str]]:
    for section in results.of("train_step", "detectors"):
        systems = section.data["systems"]
        row, where, link = systems[our_system(section)], _on(section), _link(section, prefix)
        setting = row["title"].partition(", ")[2]
        base = as_it_comes(systems[section.data["base"]]["title"])
        found = beside(section, our_system(section), section.data["base"])
        yield f"training step, ours {setting}, {base}{where}", ratio_text(found), link
        if "times_same" in row:
            yield f"training step, {setting} both{where}", ratio_text(row["times_same"]), link
        if "torchvision" in section.data.get("best_ratio", {}):
            found = section.data["best_ratio"]["torchvision"]
            yield f"training step, each at its best{where}", ratio_text(found), link


def _files(results: Results, prefix: str) -> Iterator[tuple[str, str, str]]:
    for section in results.of("latency"):
        for name, what in (("torch", "torch"), ("onnx", "ONNX"), ("int8", "ONNX, 8 bits")):
            row = section.data["latency"]["1"]["systems"].get(name)
            if row is not None:
                found = ratio_text(row["faster_than_torchvision"])
                title = f"a picture to detections, {what}, one thread{_on(section)}"
                yield title, found, _link(section, prefix)


def _counts(results: Results, prefix: str) -> Iterator[tuple[str, str, str]]:
    for section in results.of("train_step", "counts"):
        ours, theirs = (section.data["systems"][name]["loss"] for name in ("ours", "torchvision"))
        link = _link(section, prefix)
        yield "operations of a loss: ours, torchvision's", f"{ours['ops']}, {theirs['ops']}", link
        waits = f"{ours['waits']}, {theirs['waits']}"
        yield "of them wait for the device: ours, torchvision's", waits, link
        return  # the counts are the same on every device


def _on(section: Section) -> str:
    return f", {section.device}" if section.is_gpu else ""


def _link(section: Section, prefix: str) -> str:
    return f"[{section.date}]({prefix}results/{section.document})"


def guarantees(results: Results, prefix: str) -> list[str]:
    """Return the tables of the guarantees."""
    sections = results.of("streaming_guarantees")
    if not sections:
        raise ValueError("results/ has nothing of streaming_guarantees.py; measure with --json")
    with of_form(sections[0].file, "streaming_guarantees"):
        return [table.markdown(sections[0].data)]


REGIONS = {
    "headline": headline,
    "loaders": loaders,
    "detector": detector,
    "streaming-guarantees": guarantees,
}
