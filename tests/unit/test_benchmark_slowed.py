"""Benchmarks can fail: a path of ours that is made slower on purpose is seen as slower.

The loader's own quick form holds a delayed pipeline too (test_benchmarks_pixels.py), the all-reduce
of scaling.py has its test beside it.
"""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import end_to_end
import nms
from end_to_end_systems import DELAY_S


def nms_ratios(capsys):
    words = ["--quick", "--rounds", "2", "--devices", "cpu", "--batch", "1"]
    assert nms.main(words) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    return [case["ours_is"]["torchvision"]["ratio"] for case in report["cases"]]


def test_a_slower_post_process_is_seen(monkeypatch, capsys):
    as_it_is = nms_ratios(capsys)
    ours = nms.postprocess

    def slowed(*args, **options):
        time.sleep(1.0)
        return ours(*args, **options)

    monkeypatch.setattr(nms, "postprocess", slowed)
    for before, after in zip(as_it_is, nms_ratios(capsys), strict=True):
        assert after < before / 2


@pytest.mark.slow
def test_a_slower_loader_is_seen_from_end_to_end(tmp_path, capsys):
    path, text = tmp_path / "report.json", tmp_path / "report.md"
    words = ["--quick", "--rounds", "1", "--json", str(path), "--markdown", str(text)]
    assert end_to_end.main([*words, "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(path.read_text())
    part = report["sections"]["small"]
    assert list(part["systems"]) == ["ours", "ours_delayed", "torchvision"]
    ours, delayed = part["systems"]["ours"], part["systems"]["ours_delayed"]
    assert delayed["ours_is"]["ratio"] > 1
    assert delayed["data_wait"]["median"] > ours["data_wait"]["median"]
    batch = part["settings"]["batch"]
    waited_s = delayed["data_wait"]["median"] * batch / delayed["images_per_s"]["median"]
    assert waited_s == pytest.approx(DELAY_S, rel=0.2)  # in a step
    assert "mbv3dist train, delayed" in text.read_text()


def test_wrong_words_are_one_line(capsys):
    assert end_to_end.main(["--parts", "medium"]) == 2
    assert capsys.readouterr().err == (
        "end_to_end: --parts medium: choose of small, large, detector\n"
    )
