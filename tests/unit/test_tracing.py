"""Traces of benchmarks: a file that a viewer reads, and a table of what took the time."""

import argparse
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tracing

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["trace.json", "deep/er/trace.json.gz"])
def test_a_trace_is_written_and_its_rows_add_up(tmp_path, name):
    x = torch.randn(64, 64)
    path = tmp_path / name

    def action():
        for _ in range(3):
            x @ x
        x.sigmoid()

    rows = tracing.traced(action, path, device=CPU)
    saved = path.read_bytes()
    events = json.loads(gzip.decompress(saved) if name.endswith(".gz") else saved)["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    calls = {row.name: row.calls for row in rows}
    assert calls["aten::mm"] == 3
    assert calls["aten::sigmoid"] == 1
    assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    again = tracing.from_dicts(json.loads(json.dumps(tracing.as_dicts(rows))))
    assert [row.name for row in again] == [row.name for row in rows]


def entry(key, device, device_us, cpu_us):
    return SimpleNamespace(
        key=key,
        count=2,
        device_type=device,
        self_device_time_total=device_us,
        self_cpu_time_total=cpu_us,
    )


def test_on_a_gpu_kernels_count_and_not_the_operations_that_launch_them():
    averages = [
        entry("aten::conv2d", DeviceType.CPU, 300, 20),
        entry("kernel a", DeviceType.CUDA, 100, 0),
        entry("kernel b", DeviceType.CUDA, 300, 0),
    ]
    on_gpu = tracing.rows_of(averages, on_gpu=True)
    assert [(row.name, row.ms) for row in on_gpu] == [("kernel b", 0.3), ("kernel a", 0.1)]
    assert [row.share for row in on_gpu] == pytest.approx([0.75, 0.25])
    assert [row.name for row in tracing.rows_of(averages, on_gpu=False)] == ["aten::conv2d"]
    assert tracing.rows_of([], on_gpu=True) == []


def test_a_table_names_the_longest_and_sums_up_the_rest():
    rows = [tracing.Row(f"k|{n} " + "x" * 200, 2, 4.0 - n, (4.0 - n) / 10) for n in range(4)]
    lines = tracing.kernel_table(rows, top=2)
    assert len(lines) == 2 + 2 + 1
    assert lines[2].startswith("| k/0 ") and lines[2].count("|") == 5
    assert lines[2].endswith("| 2 | 4.000 | 40.0 % |")
    assert lines[-1] == "| 2 others | 4 | 3.000 | 30.0 % |"
    assert all(len(line) < 140 for line in lines)
    assert len(tracing.kernel_table(rows, top=4)) == 2 + 4


def test_names_of_files(tmp_path, capsys):
    assert tracing.named(Path("a/t.json.gz"), "classifiers large") == Path(
        "a/t-classifiers-large.json.gz"
    )
    assert tracing.named(Path("t.json"), "nms") == Path("t-nms.json")
    parser = argparse.ArgumentParser()
    tracing.add_option(parser)
    assert parser.parse_args([]).trace is None
    assert parser.parse_args(["--trace", "t.json"]).trace == Path("t.json")
    with pytest.raises(SystemExit):
        parser.parse_args(["--trace", "t.txt"])
    assert "t.txt: its name must end in .json or .json.gz" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"must end in \.json"):
        tracing.traced(lambda: None, tmp_path / "t.txt", device=CPU)


def test_a_place_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "t.json").mkdir()
    ran = []
    with pytest.raises(OSError, match=r"t\.json"):
        tracing.traced(lambda: ran.append(1), tmp_path / "t.json", device=CPU)
    assert not ran
