"""What all benchmarks measure with: spreads, ratios, interleaved rounds, measured processes."""

import json
import statistics
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402
from child import Child, missing_modules  # noqa: E402

FIGURES = st.lists(st.floats(1, 1e4), min_size=1, max_size=12)


@given(values=FIGURES)
def test_a_spread_holds_its_median_between_its_ends(values):
    row = harness.spread(values, digits=9)
    assert row["p10"] <= row["median"] <= row["p90"]
    assert row["median"] == pytest.approx(statistics.median(values), abs=1e-6)
    assert row["rounds"] == pytest.approx(values)


@given(values=FIGURES, factor=st.floats(0.1, 10))
def test_a_ratio_is_the_factor_when_every_round_has_it(values, factor):
    row = harness.ratio([factor * value for value in values], values)
    assert row["ratio"] == pytest.approx(factor, abs=1e-3)
    if len(set(values)) == 1:
        assert row["low"] == row["ratio"] == row["high"]


@given(values=FIGURES, others=st.data())
def test_the_interval_of_a_ratio_holds_it(values, others):
    base = others.draw(st.lists(st.floats(1, 1e4), min_size=len(values), max_size=len(values)))
    row = harness.ratio(values, base)
    assert row["low"] - 1e-3 <= row["ratio"] <= row["high"] + 1e-3


def test_rounds_are_interleaved_and_a_failure_is_told():
    calls = []

    def run(name):
        calls.append(name)
        if name == "b" and calls.count("b") == 2:
            raise RuntimeError("broke")
        return len(calls)

    failed = {}
    runs = {name: lambda name=name: run(name) for name in "abc"}
    figures = harness.interleave(runs, rounds=3, failed=failed, errors=(RuntimeError,))
    assert calls == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert figures == {"a": [1, 4, 7], "c": [3, 6, 8]}
    assert failed == {"b": "broke"}
    calls.clear()
    with pytest.raises(RuntimeError, match="broke"):
        harness.interleave(runs, rounds=2)


def test_a_disturbed_run_is_done_again(monkeypatch):
    # Before and after each run; the machine has one core, and a run takes a second.
    others = iter([0.0, 0.9, 1.0, 1.5, 2.0, 2.05, 9.0, 9.0])
    seconds = iter(range(100))
    monkeypatch.setattr(harness, "_others_cpu_s", lambda: next(others))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(seconds)))
    monkeypatch.setattr(harness.os, "cpu_count", lambda: 1)
    figures = iter("abcd")
    assert harness.quietest(lambda: next(figures), quiet=0.1) == ("c", pytest.approx(0.05))
    assert harness.quietest(lambda: next(figures), quiet=0.1) == ("d", 0)


def start_child(tmp_path, code):
    (tmp_path / "answering.py").write_text(code)
    return Child(Path(sys.executable), "answering", work=tmp_path / "logs")


ANSWERING = """
import os, sys, time
from pixel_peers.serve import answer_jobs
print("a library says hello")
def handle(job):
    print("and speaks while it works")
    if job["do"] == "die":
        sys.stderr.write("out of memory\\n"); sys.stderr.flush(); os._exit(3)
    if job["do"] == "sleep":
        time.sleep(job["seconds"])
    if job["do"] == "fail":
        raise KeyError("what")
    return {"echo": job["do"]}
answer_jobs(handle)
"""


def test_a_measured_process_answers_fails_and_dies_whatever_it_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with start_child(tmp_path, ANSWERING) as child:
        assert child.ask({"do": "one"}) == {"echo": "one"}
        with pytest.raises(RuntimeError, match="KeyError: 'what'"):
            child.ask({"do": "fail"})
        assert child.ask({"do": "two"}) == {"echo": "two"}
        with pytest.raises(RuntimeError, match="it ended: out of memory"):
            child.ask({"do": "die"})
        with pytest.raises(RuntimeError, match="it ended"):
            child.ask({"do": "three"})


def test_a_process_that_does_not_answer_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("child.END_LIMIT_S", 0.2)
    with start_child(tmp_path, ANSWERING) as child:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"no answer within 0\.5 s"):
            child.ask({"do": "sleep", "seconds": 60}, limit_s=0.5)
        assert time.monotonic() - started < 30


def test_an_interpreter_that_is_not_there_has_nothing(tmp_path):
    assert missing_modules(tmp_path / "python", ["json"]) == {"json"}
    own = missing_modules(Path(sys.executable), ["json", "no_such_thing", "no.such"])
    assert own == {"no_such_thing", "no.such"}


def test_sections_are_added_to_a_saved_report(tmp_path):
    path = tmp_path / "report.json"
    report = {"benchmark": "loader", "sections": {"a": 1, "b": 2}}
    assert harness.merged(report, path) == report
    path.write_text(json.dumps({"benchmark": "loader", "sections": {"b": 0, "c": 3}}))
    assert harness.merged(report, path)["sections"] == {"a": 1, "b": 2, "c": 3}
    path.write_text(json.dumps({"benchmark": "resume"}))
    with pytest.raises(ValueError, match="no report of loader"):
        harness.merged(report, path)


def test_figures_for_wandb_are_numbers_by_their_place():
    report = {
        "benchmark": "x",
        "machine": {"cores": 2},
        "sections": {"a": {"ms": {"median": 1.5, "rounds": [1.0, 2.0]}, "equal": True}},
    }
    assert dict(harness.flat_figures(report)) == {"sections/a/ms/median": 1.5}


def test_a_report_is_logged_to_wandb(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = harness.parser("x", rounds=1).parse_args(["--wandb", "speed"])
    report = {"benchmark": "x", "commit": "abc", "sections": {"a": {"ratio": 2.0}}}
    harness.finish(report, "# x", args)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wanted = (b"sections/a/ratio", b"abc", b"speed")
    deadline = time.monotonic() + 60
    while missing := [word for word in wanted if word not in run.read_bytes()]:
        assert time.monotonic() < deadline, missing  # wandb's own process writes it
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("", "is a folder; give a file"), ("none/out.json", "does not exist; make it first")],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    name, reason, tmp_path, capsys
):
    parse = harness.parser("x", rounds=1).parse_args
    place = f"{tmp_path}/{name}"
    with pytest.raises(SystemExit) as stopped:
        harness.run("x", ["--json", place], parse=parse, measure=pytest.fail, report_text=str)
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_report_that_cannot_be_saved_is_printed_all_the_same(tmp_path, capsys):
    args = harness.parser("x", rounds=1).parse_args(["--json", str(tmp_path / "out.json")])
    args.json = tmp_path  # became unwritable while it was measured
    words = {"parse": lambda _: args, "measure": lambda _: {"benchmark": "x"}, "report_text": str}
    assert harness.run("x", [], **words) == 2
    assert json.loads(capsys.readouterr().out) == {"benchmark": "x"}
