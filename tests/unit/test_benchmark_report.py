"""RESULTS.md, plots and the README's tables: what report.py makes of the committed results."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest
import report_samples as samples
from conftest import environment
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402
from reporting.document import REGIONS  # noqa: E402
from reporting.questions import our_system  # noqa: E402
from reporting.results import load, shown_command, times  # noqa: E402

EMPTY_README = "# Title\n\n" + "\n\n".join(
    f"Above.\n<!-- {name}: begin -->\n<!-- {name}: end -->" for name in REGIONS
)


@pytest.fixture
def copied(tmp_path):
    """A repository with the committed results and a README without figures."""
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    (tmp_path / "README.md").write_text(EMPTY_README + "\nBelow.\n")
    return tmp_path


def save(root, name, content):
    path = root / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def snapshot(root):
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def main(root, *words):
    return report.main([*words, "--root", str(root)])


def test_committed_documents_are_what_the_committed_results_make():
    said = report.differences(report.documents(ROOT), ROOT)
    # Another matplotlib draws other bytes; which one drew them stands in each plot.
    assert [line for line in said if "was drawn by matplotlib" not in line] == []


def test_written_once_then_the_same_in_another_process(copied, capsys):
    assert main(copied) == 0
    changed = json.loads(capsys.readouterr().out)["changed"]
    assert {"README.md", "benchmarks/RESULTS.md", "benchmarks/plots/headline.svg"} <= set(changed)
    before = snapshot(copied)
    (copied / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.grid: True\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py", "--check", "--root", copied],
        env=environment() | {"MATPLOTLIBRC": str(copied / "matplotlibrc"), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["different"] == []
    (copied / "matplotlibrc").unlink()
    assert snapshot(copied) == before
    readme = (copied / "README.md").read_text()
    assert readme.startswith("# Title\n\nAbove.\n") and readme.endswith("\nBelow.\n")
    assert readme.count("Above.") == len(REGIONS)


# Benchmark, section, where in it, and the plots that show it.
CHANGES = [
    ("loader", "originals", "systems torchvision_pil ours_is", "headline loader"),
    ("decode", "decoders 256", "decoders pillow ours_is", "headline"),
    ("convert", "copy", "ratios|ours / webdataset", "headline"),
    ("train_step", "detectors", "BESIDE", ""),
    ("nms", "", "cases 1 ours_is torchvision", "headline postprocess"),
    ("latency", "", "latency 1 systems onnx faster_than_torchvision", "headline latency"),
]


def test_changed_numbers_change_documents_and_plots(copied):
    before = report.documents(copied)
    results = load(copied / "benchmarks" / "results")
    for number, (benchmark, name, keys, _) in enumerate(CHANGES):
        section = next(x for x in results.of(benchmark, name) if not x.is_gpu)
        path = copied / "benchmarks" / "results" / section.file
        content = json.loads(path.read_text())
        found = content["sections"][name] if name else content
        ours = our_system(section) if keys == "BESIDE" else ""
        best = f"systems|{ours}|times_base"
        if "best_ratio" in section.data:
            best = "best_ratio|torchvision"
        keys = best if keys == "BESIDE" else keys
        for key in keys.split("|" if "|" in keys else " "):
            found = found[int(key) if isinstance(found, list) else key]
        found |= {"ratio": 4.3 + number / 100, "low": 4.123, "high": 4.567}
        path.write_text(json.dumps(content))
    after = report.documents(copied)
    plots = copied / "benchmarks" / "plots"
    for number, (*_, names) in enumerate(CHANGES):
        text = re.compile(rf"4\.3{number}(\*\*)? \(4\.12 to 4\.57\)")
        for document in (copied / "README.md", copied / "benchmarks" / "RESULTS.md"):
            assert text.search(after[document]) and not text.search(before[document])
        for name in names.split():
            path = plots / f"{name}.svg"
            assert f"4.3{number}\u00d7" in after[path] and f"4.3{number}\u00d7" not in before[path]


def test_check_names_what_somebody_edited_and_writes_nothing(copied, capsys):
    main(copied)
    readme = copied / "README.md"
    text = readme.read_text()
    head, begin, rest = text.partition("<!-- loaders: begin -->")
    readme.write_text(head + begin + rest.replace(" | ", " | 9.99 ", 1))
    plots = copied / "benchmarks" / "plots"
    (plots / "loader.svg").unlink()
    (plots / "old.svg").write_text("<svg/>")
    latency = (plots / "latency.svg").read_text()
    (plots / "latency.svg").write_text(latency + "<!-- by hand -->\n")
    before = snapshot(copied)
    capsys.readouterr()
    assert main(copied, "--check") == 1
    said = capsys.readouterr()
    lines = [line.partition(";")[0] for line in said.err.splitlines()]
    assert lines == [
        "report: benchmarks/plots/loader.svg is missing",
        "report: benchmarks/plots/latency.svg differs",
        "report: README.md differs in region loaders",
        "report: benchmarks/plots/old.svg has no results",
    ]
    assert snapshot(copied) == before
    assert main(copied) == 0
    assert readme.read_text() == text and not (plots / "old.svg").exists()
    assert (plots / "latency.svg").read_text() == latency


def test_a_plot_of_another_matplotlib_is_said_to_be_one(tmp_path):
    plot = tmp_path / "a.svg"
    said = {version: f"<dc:title>Matplotlib v{version}, x</dc:title>" for version in ("1.0", "2.0")}
    plot.write_text(said["1.0"])
    (line,) = report.differences({plot: said["2.0"]}, tmp_path)
    assert line == f"a.svg was drawn by matplotlib 1.0, this is {matplotlib.__version__}"


def test_plots_are_small_well_formed_and_undated():
    made = report.draw(load(ROOT / "benchmarks" / "results"))
    assert {"headline", "loader", "train_step", "postprocess", "latency"} <= set(made)
    for name, text in made.items():
        ElementTree.fromstring(text)
        assert len(text) < 100_000, name
        assert "<dc:date>" not in text, name
        fonts = set(re.findall(r"font(?:-family)?: [^;\"]*'DejaVu Sans'[^;\"]*", text))
        assert fonts and all(font.endswith("Verdana, sans-serif") for font in fonts), name


def test_kinds_of_results_that_no_run_has_left_yet(copied):
    for name, make in samples.ALL.items():
        save(copied, name, make())
    made = report.documents(copied)
    plots = {path.stem: text for path, text in made.items() if path.suffix == ".svg"}
    assert {"roofline", "scaling", "end_to_end"} <= set(plots)
    for text in plots.values():
        ElementTree.fromstring(text)
    assert "Roofline, NVIDIA H200" in plots["roofline"] and "51 %" in plots["roofline"]
    assert "predicted, mobilenetv3_small: ranks like this machine's" in plots["scaling"]
    # The CPU's and the GPU's figures of a section stand beside each other.
    readme = made[copied / "README.md"]
    assert "training step, MobileNetV3-Large, 224 px, CPU |" in readme
    assert "training step, MobileNetV3-Large, 224 px, H200, bf16 |" in readme
    assert "timm, channels_last, bf16, compiled: **1.13** (1.03 to 1.23)" in readme
    # Where ours is behind, it is not in bold, and has its own colour.
    assert "torchvision, PIL: 0.95 (0.94 to 0.96) | timm: 0.80" in readme
    assert "#d55e00" in plots["headline"]
    results = made[copied / "benchmarks" / "RESULTS.md"]
    for text in (
        "| classifier large | training | ours channels_last bf16 compiled | 51.4 % |",
        "Not measured: timm graph: out of memory",
        "1980 MHz under load, throttled by power cap",
        "| `depthwise` | 31.0 % | 12 |",
        "+22.0 % (+17.0 to +26.0) | **no**",
        "ssdlite_mobilenetv3_small: not checked: one GPU",
        "![More ranks: scaling](plots/scaling.svg)",
        "| mobilenetv3_small | 2 | 0.92 (0.89 to 0.95) |",
    ):
        assert text in results, text


DATES = st.builds("2026-{:02d}-{:02d}".format, st.integers(1, 12), st.integers(1, 28))


@settings(max_examples=40, deadline=None)
@given(
    files=st.dictionaries(
        st.tuples(DATES, st.integers(1, 12)),
        st.sets(st.sampled_from(["originals", "256", "detection"]), min_size=1),
        min_size=1,
        max_size=6,
    )
)
def test_a_section_comes_from_the_newest_file_that_has_it(files):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for (date, number), sections in files.items():
            content = samples.report("loader", {name: {"of": [date, number]} for name in sections})
            tail = f"-{number}" if number > 1 else ""
            save(root, f"{date}-loader{tail}.json", content)
        results = load(root / "benchmarks" / "results")
    newest = {}
    for (date, number), sections in sorted(files.items()):
        newest |= {name: [date, number] for name in sections}
    assert {section.name: section.data["of"] for section in results.sections} == newest
    order = [section.name for section in results.sections]
    assert order == sorted(order, key=["originals", "256", "detection"].index)


@given(value=st.floats(0.05, 9999))
def test_ratios_keep_three_digits(value):
    assert float(times(value)) == pytest.approx(value, rel=0.006, abs=0.006)
    assert len(times(value)) <= 4


def test_commands_are_shown_as_somebody_else_types_them():
    ran = "python benchmarks/loader.py --data bcd --rounds 5 --work W --add --json a.json"
    assert shown_command(ran) == ("python benchmarks/loader.py --data FOLDER --rounds 5")
    ran = "python benchmarks/latency.py --model m --data d --markdown x.md --quiet 0.1"
    assert shown_command(ran) == (
        "python benchmarks/latency.py --model MODEL --data DATA --quiet 0.1"
    )


LOADER = "2999-12-24-loader.json"
QUICK = samples.report("loader", {"originals": {}}, command="python benchmarks/loader.py --quick")
MISTAKES = {
    "no JSON": ({LOADER: "{"}, "2999-12-24-loader.json is no JSON"),
    "a list": ({LOADER: "[]"}, "holds no report"),
    "a name": ({"loader.json": "{}"}, "results are called YYYY-MM-DD-NAME.json"),
    "quick": ({LOADER: QUICK}, "is of a --quick run"),
    "no sections": ({LOADER: {"benchmark": "loader"}}, "loader is not of the form"),
    "no systems": (
        {LOADER: samples.report("loader", {"originals": {}})},
        "2999-12-24-loader.json: originals is not of the form that report.py knows (KeyError",
    ),
}


@pytest.mark.parametrize(("files", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_bad_result_is_one_line(copied, capsys, files, says):
    for name, content in files.items():
        save(copied, name, content)
    before = snapshot(copied)
    assert main(copied) == 2
    said = capsys.readouterr()
    assert said.out == "" and says in said.err and len(said.err.splitlines()) == 1
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    "text",
    [
        "# No regions\n",
        EMPTY_README.replace("<!-- loaders: end -->", ""),
        EMPTY_README + "\n<!-- loaders: begin -->\n<!-- loaders: end -->\n",
        EMPTY_README + "\n<!-- more: begin -->\n<!-- more: end -->\n",
        EMPTY_README.replace("detector: end", "detectors: end"),
    ],
)
def test_a_readme_with_other_regions_is_refused(copied, capsys, text):
    (copied / "README.md").write_text(text)
    assert main(copied) == 2
    said = capsys.readouterr().err
    assert "README.md must have one line <!-- NAME: begin -->" in said
    assert len(said.splitlines()) == 1


def test_no_results_are_one_line(tmp_path, capsys):
    (tmp_path / "README.md").write_text(EMPTY_README)
    assert main(tmp_path) == 2
    os.makedirs(tmp_path / "benchmarks" / "results")
    assert main(tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "is no folder of results" in lines[0]
    assert "nothing beside a peer" in lines[1]
