"""The benchmark of scaling on real processes: its report, and that it sees what is made slow."""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling
from scale.figures import LIMIT, Measured, scaling_model
from scale.pool import Pool

MODEL = "mobilenetv3_small"
DELAY_S = 0.1


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Two ranks for the tests of this file."""
    with Pool(2, device="cpu", threads=1, work=tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def communication(pool, *words):
    """What the report would say, from three rounds of weak scaling alone."""
    words = ["--quick", "--device", "cpu", "--models", MODEL, "--steps", "1", *words]
    args = scaling.parse(words)
    batch = args.default_batch
    build = {"job": "build", "architecture": MODEL, "size": 32, "batch": batch, "amp": "no"}
    facts = pool.ask({**build, "delay_s": args.delay_s})[0]
    jobs = scaling.make_jobs({2: pool}, batch, args)
    runs = {name: [] for name in jobs if name == "alone" or " weak " in name}
    for _ in range(3):
        for name, answers in runs.items():
            answers.append(jobs[name]())
    found = Measured(
        size=32,
        batch=batch,
        worlds=(2,),
        facts=facts,
        runs=runs,
        others={},
        sweep_bytes=(),
    )
    return scaling_model(found, "weak")["ranks"]["2"]["communication"]


def test_a_slowed_all_reduce_is_seen_as_communication(pool):
    plain = communication(pool)
    slowed = communication(pool, "--delay-s", str(DELAY_S))
    assert slowed["share"]["share"] > plain["share"]["share"] + 0.1
    for name in ("exposed", "transfer"):
        more = slowed["traced_ms"][name]["median"] - plain["traced_ms"][name]["median"]
        assert more > 500 * DELAY_S  # at least half of one bucket's delay
    assert slowed["exposed_share"]["median"] > plain["exposed_share"]["median"] + 0.1


@pytest.mark.parametrize("architecture", [MODEL, "ssdlite_mobilenetv3_small"])
def test_ranks_in_ddp_stay_equal(pool, architecture):
    """What is timed does train together: the same weights, and not those of ranks apart."""
    build = {"job": "build", "architecture": architecture, "size": 64, "batch": 4, "amp": "no"}
    facts = pool.ask(build)
    assert facts[0] == facts[1]
    assert facts[0]["backend"] == "gloo"
    job = {"job": "steps", "batch": 2, "steps": 1}
    for form in ("apart", "together", "traced"):
        answers = pool.ask({**job, "form": form})
        assert all(len(answer["steps_s"]) == 1 for answer in answers)
    first, second = pool.ask({"job": "digest"})
    assert first["together"] == second["together"]
    assert first["traced"] == second["traced"]
    assert first["traced"] == first["together"]  # timing changes no bit
    assert first["apart"] != second["apart"]
    assert first["apart"] != first["together"]
    # Every gradient is sent, and in the order in which the backward pass makes them.
    (answer, _) = pool.ask({**job, "form": "traced"})
    (trace,) = answer["traces"]
    assert sum(size for size, _, _ in trace["buckets"]) == 4 * facts[0]["parameters"]
    ready = [at for _, at, _ in trace["buckets"]]
    assert 0 < trace["normalizer"][0] < trace["normalizer"][1] < ready[0]
    assert ready == sorted(ready)
    assert all(at < end for _, at, end in trace["buckets"])


def test_the_report(tmp_path, pool, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "Pool", lambda *world, **options: nullcontext(pool))
    page, file = tmp_path / "scaling.md", tmp_path / "scaling.json"
    words = ["--quick", "--device", "cpu", "--curve-ranks", "8,64", "--given-rate", "30000"]
    assert scaling.main([*words, "--json", str(file), "--markdown", str(page)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text() + page.read_text()
    sections = report["sections"]
    assert set(sections) == {"weak", "strong", "prediction", "curve"}
    for kind in ("weak", "strong"):
        rows = sections[kind]["models"][MODEL]["ranks"]
        batches = [rows[ranks]["batch_per_rank"] for ranks in ("1", "2")]
        assert batches == ([4, 4] if kind == "weak" else [4, 2])
        assert rows["1"]["efficiency"]["ratio"] == rows["1"]["speedup"]["ratio"] == 1
        traced = rows["2"]["communication"]["traced_ms"]
        for busy, *parts in zip(
            *(traced[name]["rounds"] for name in ("busy", "overlapped", "exposed")), strict=True
        ):
            assert busy == pytest.approx(sum(parts), abs=0.002)
        assert traced["waiting"]["median"] >= 0
    model = sections["prediction"]["models"][MODEL]
    assert [(check["kind"], check["ranks"]) for check in model["checks"]] == [
        ("weak", 2),
        ("strong", 2),
    ]
    for check in model["checks"]:
        measured, predicted = check["measured_ms"]["value"], check["predicted_ms"]["value"]
        error = check["error"]["error"]
        assert error == pytest.approx(predicted / measured - 1, abs=1e-3)
        assert check["within"] == (abs(error) <= LIMIT)
        assert all(ms >= 0 for ms in check["parts_ms"].values())
    measured, supposed = sections["curve"]["models"][MODEL]["curves"]
    assert supposed["images_per_s_one"] == 30_000
    for curve in (measured, supposed):
        points = curve["points"]["weak"]
        assert [(point["ranks"], point["nodes"] * curve["links"]["ranks_per_node"]) for point in
                points] == [(8, 8), (64, 64)]  # fmt: skip
        assert points[0]["efficiency"] >= points[1]["efficiency"] > 0
    text = page.read_text()
    for name, section in sections.items():
        assert f"## {name}" in text
        assert all(words in text for words in section.get("assumptions", []))


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_rank_that_dies_is_one_line_and_nothing_stays(tmp_path, capsys, monkeypatch):
    before = children()

    def kill_one(architecture, pools, args):
        """As if the second rank ran out of memory while the first one waits for it."""
        (ours,) = pools.values()
        ours.ask({"job": "sweep", "sizes": [4, 8], "repeats": 1})
        ranks = [psutil.Process(pid) for pid in children() - before]
        victim = max(ranks, key=lambda rank: rank.pid)  # forked last
        os.kill(victim.pid, signal.SIGKILL)
        ours.ask({"job": "sweep", "sizes": [4, 8], "repeats": 1})
        raise AssertionError("nobody noticed")

    monkeypatch.setattr(scaling, "measure_model", kill_one)
    assert scaling.main(["--quick", "--device", "cpu", "--work", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("scaling: rank 1 of 2 died")
    assert children() == before
    assert list(tmp_path.iterdir()) == []
