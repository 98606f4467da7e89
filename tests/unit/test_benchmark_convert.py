"""`python benchmarks/convert.py --quick` runs, and its instruments measure the right thing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import environment

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import convert_stored  # noqa: E402
import convert_systems  # noqa: E402

from mbv3dist.convert.pictures import shrunk_size  # noqa: E402


def run_script(*words):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "convert.py", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_quick_form_answers_every_question(tmp_path):
    report, text = tmp_path / "report.json", tmp_path / "report.md"
    done = run_script("--quick", "--json", report, "--markdown", text)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == json.loads(report.read_text())
    assert {"benchmark", "command", "machine", "commit", "sections"} <= answer.keys()
    parts = answer["sections"]
    assert list(parts) == ["copy", "resize", "quality", "raw"]
    copied = parts["copy"]["megabytes_per_s"]
    assert set(copied) == {"ours", "ours, one worker", "webdataset", "webdataset, mtime=0"}
    assert all(row["median"] > 0 for row in copied.values())
    resized = parts["resize"]
    assert resized["images_per_s"].keys() == {"ours", "ours, one worker", "torchvision", "pillow"}
    assert all(row["median"] > 0 for row in resized["images_per_s_once_started"].values())
    assert parts["quality"]["largest_distance_to_pillow"] <= 1
    costs = parts["quality"]["by_quality"]
    order = [costs[f"{q}, 4:2:0"]["mean_absolute_difference"] for q in (95, 90, 80)]
    assert order == sorted(order)
    for row in parts["raw"]["sizes"].values():
        assert row["images_per_s"]["raw"]["median"] > 0 and row["bytes_ratio"] > 1
    for name in parts:
        assert f"## {name}" in text.read_text()


def test_wrong_words_are_one_line(tmp_path):
    for words in (["--parts", "speed"], ["--data", tmp_path], ["--rounds", "0"]):
        done = run_script("--parts", "quality", *words)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) <= 2
        assert "convert: " in done.stderr and "Traceback" not in done.stderr


def test_peers_resize_to_the_sizes_that_we_do():
    rng = np.random.default_rng(0)
    for size in rng.integers(1, 3000, (500, 2)).tolist():
        ours = shrunk_size((size[0], size[1]), shorter=convert_systems.SIDE)
        assert convert_systems.shrunk((size[0], size[1])) == ours


def test_every_system_writes_all_pictures(tmp_path):
    from pixel_peers import pictures

    pictures.write_pictures(tmp_path / "drawn", 5, width=60, height=40)
    folder = convert_stored.repeated(tmp_path, "copies", tmp_path / "drawn", 12)
    assert len(list(folder.glob("*/*.jpg"))) == 12
    jobs = {"ours": {"workers": 1}, "webdataset": {"mtime_0": True}, "pillow": {}}
    for name, job in jobs.items():
        where = {"folder": str(folder), "out": str(tmp_path / "out")}
        answer = convert_systems.handle(name, {**job, **where})
        assert answer["samples"] == 12 and answer["seconds"] > 0
        total = sum(path.stat().st_size for path in folder.glob("*/*"))
        assert answer["bytes_written"] > (total if name != "pillow" else 12 * 500)
    assert not (tmp_path / "out").exists()
