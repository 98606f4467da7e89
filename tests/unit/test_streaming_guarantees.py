"""The comparison's counting, its child processes, its document, and its quick form (ours alone)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from peers import damage, scoring, table  # noqa: E402
from peers.traffic import traffic  # noqa: E402


def entries(batches, *, epoch=0, first=0):
    return [
        {"step": [epoch, n], "ids": ids, "epochs": epoch} for n, ids in enumerate(batches, first)
    ]


def run_script(*words):
    return subprocess.run(
        [sys.executable, BENCHMARKS / "streaming_guarantees.py", *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@given(
    num_samples=st.integers(1, 30),
    dropped=st.sets(st.integers(0, 29)),
    again=st.lists(st.integers(0, 29), max_size=9),
    num_ranks=st.integers(1, 4),
    data=st.data(),
)
def test_once_per_epoch_counts_what_is_missing_and_doubled(
    num_samples, dropped, again, num_ranks, data
):
    dropped = {n for n in dropped if n < num_samples}
    again = [n for n in again if n < num_samples and n not in dropped]
    ids = data.draw(st.permutations([n for n in range(num_samples) if n not in dropped] + again))
    run = [entries([ids[rank::num_ranks]]) for rank in range(num_ranks)]
    counts = scoring.once_per_epoch(run, num_samples=num_samples, epochs=1)
    assert counts["missing"] == [len(dropped)]
    assert counts["doubled"] == [len(again)]


def test_padding_counts_for_no_epoch_and_uneven_ranks_show():
    ours = [{"step": [0, 0], "ids": [2, 0, 1, 2], "epochs": [0, 0, 0, -1]}]
    counts = scoring.once_per_epoch([ours], num_samples=3, epochs=1)
    assert counts == {"missing": [0], "doubled": [0], "batches": [1, 1]}
    run = [entries([[0], [1]]), entries([[2]])]
    assert scoring.once_per_epoch(run, num_samples=3, epochs=1)["batches"] == [1, 2]
    failed = scoring.once_per_epoch([None, entries([[0]])], num_samples=3, epochs=1)
    assert failed["missing"] == [2]


def test_equal_batches_tells_sets_from_sequences():
    one = [entries([[0, 1, 2, 3], [4, 5, 6, 7], [8]])]
    two = [entries([[0, 1], [5, 4], [8]]), entries([[2, 3], [6, 7], [9]])]
    assert scoring.equal_batches(one, two) == (2 / 3, 1 / 3)
    assert scoring.equal_batches(one, one) == (1, 1)
    shorter = [entries([[0, 1, 2, 3]])]
    assert scoring.equal_batches(one, shorter) == (1 / 3, 1 / 3)


def test_same_order_compares_ranks_and_workers_apart():
    def row(world_size, workers, ids):
        return {"world_size": world_size, "workers": workers, "ranks": [entries(ids)]}

    runs = [row(1, 0, [[0, 1]]), row(2, 0, [[1, 0]]), row(1, 2, [[0, 1]]), row(2, 2, [[3, 4]])]
    shares = scoring.same_order(runs)
    assert shares["world_sizes"] == [0.5, 0]  # [0, 1] beside [1, 0], and beside [3, 4]
    assert shares["workers"] == [0.5, 0.5]


def test_resumed_alike_and_read_again():
    whole = [entries([[0], [1], [2]])]
    assert scoring.resumed_alike(whole, [entries([[0]])], [entries([[1], [2]], first=1)])
    assert not scoring.resumed_alike(whole, [entries([[0]])], [entries([[2], [1]], first=1)])
    assert not scoring.resumed_alike(whole, [entries([[0]])], [None])
    rest = [entries([[1], [2]])]
    assert scoring.read_again(rest, [[1, 2]]) == 0
    assert scoring.read_again(rest, [[0, 0, 1, 2]]) == 2
    counts = scoring.over_legs([[entries([[0]])], [entries([[2], [2]])]], whole, num_samples=3)
    assert counts["missing"] == 1 and counts["repeated"] == 1
    assert counts["whole_missing"] == 0 and counts["equal"] == [round(2 / 3, 4)] * 2


TRUTH = {0: "a", 1: "b", 2: "c"}


def outcome(**report):
    report = {
        "delivered": [[key, value] for key, value in TRUTH.items()],
        "error": None,
        "decoder": False,
        "epochs": 1,
        "log": [],
        "files": ["000007.tar"],
        "key": 1,
        "position": 0,
        "span": [512, 2000],
    } | report
    return {"value": report, "error": None, "signal": None, "timed_out": False}


@pytest.mark.parametrize(
    ("given_outcome", "cell"),
    [
        (None, "-"),
        (outcome(), "no harm"),
        (
            outcome(delivered=[[0, "a"], [1, "x"], [1, "b"]]),
            "**silent**: 1 lost, 1 wrong, 1 doubled",
        ),
        (outcome(error="bad", epochs=0), "error, names nothing"),
        (outcome(error="bad", decoder=True, epochs=0), "error (decoder), names nothing"),
        (
            outcome(error="d/000007.tar: sample 000000001 at byte 512", epochs=0),
            "error, names file, sample, offset",
        ),
        (outcome(error="sample index 0, offset 3000", epochs=0), "error, names sample"),
        (outcome(error="sample index 1", epochs=0), "error, names sample"),
        (outcome(error="sample index 2", epochs=0), "error, names nothing"),
        (outcome(error="000007.tar: sample 2", epochs=0), "error, names file"),
        (outcome(log=["oh: 000007.tar"], delivered=[]), "**log only**, names file: 3 lost"),
        (
            outcome(error="thread died", delivered=[[0, "a"]]),
            "epoch ends early, 2 lost; error at the next one, names nothing",
        ),
        (outcome(error="late"), "epoch ends whole; error at the next one, names nothing"),
        (outcome() | {"value": None, "signal": "SIGBUS"}, "**crash** (SIGBUS)"),
        (outcome() | {"value": None, "timed_out": True}, "**hang** (time limit)"),
    ],
)
def test_judgement_of_damage(given_outcome, cell):
    assert table.damage_cell(scoring.judge(given_outcome, TRUTH)) == cell


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    nodes=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_traffic_counts_shards(sizes, nodes, seed):
    total = sum(sizes)
    rows = -(-total // (2 * nodes))
    order = np.full(rows * 2 * nodes, -1)
    order[:total] = np.random.default_rng(seed).permutation(total)
    order = order.reshape(rows, 2 * nodes)
    if (order < 0).any(axis=1).all():
        return  # no full batch to take a mean of
    found = traffic(order, sizes, nodes=nodes)
    home = np.repeat(np.arange(len(sizes)), sizes)
    steps = [
        [{int(home[i]) for i in row[2 * n : 2 * n + 2] if i >= 0} for row in order]
        for n in range(nodes)
    ]
    fetched = sum(len(set().union(*mine)) for mine in steps)
    held = max(
        sum(
            any(shard in used for used in mine[: at + 1]) and any(shard in u for u in mine[at:])
            for shard in range(len(sizes))
        )
        for mine in steps
        for at in range(rows)
    )
    full = [len({int(home[i]) for i in row}) for row in order if (row >= 0).all()]
    assert found["fetched_per_shard"] == round(fetched / len(sizes), 3)
    assert found["held_max"] == held
    assert found["shards_per_batch"] == round(float(np.mean(full)), 1)


CHILDREN = """
import json, os, sys, time
from pathlib import Path
from peers.protocol import Delivery, Request, run_children, run_ranks

def deliver(request):
    if request.rank == 1:
        raise ValueError("no data")
    return Delivery([{"step": [0, 0], "ids": [int(os.environ["RANK"])], "epochs": 0}])

here = Path(sys.argv[1])
request = Request(here, "", world_size=3, workers=0, global_batch=6, epochs=1)
ranks = run_ranks(deliver, request, limit_s=20)
assert [item.value and item.value["entries"][0]["ids"] for item in ranks] == [[0], None, [2]]
assert ranks[1].error == "ValueError: no data" and ranks[1].error_type == "ValueError"
calls = [(lambda: os.kill(os.getpid(), 7), {}), (lambda: time.sleep(60), {}), (lambda: 5, {})]
bus, slow, good = run_children(calls, scratch=here, limit_s=0.5)
assert (bus.signal, bus.value) == ("SIGBUS", None)
assert slow.timed_out and slow.value is None
assert good.value == 5
print("leftovers:", list(here.iterdir()))
"""


def test_ranks_are_processes_that_may_fail_crash_or_hang(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, tmp_path],
        cwd=BENCHMARKS,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leftovers: []\n"


def test_a_flipped_bit_that_no_decoder_notices():
    from io import BytesIO

    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    encoded = BytesIO()
    Image.fromarray(noise).save(encoded, "JPEG")
    data = encoded.getvalue()
    place = damage.flip_that_decodes(data + b"more of the file")
    changed = bytearray(data)
    changed[place] ^= 1
    assert (
        Image.open(BytesIO(changed)).convert("RGB").tobytes()
        != Image.open(BytesIO(data)).convert("RGB").tobytes()
    )


@pytest.mark.slow
def test_quick_form_and_its_documents(tmp_path):
    saved, document = tmp_path / "saved.json", tmp_path / "report.md"
    done = run_script("--quick", "--json", saved, "--markdown", document)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads(saved.read_text())
    assert list(report["results"]) == ["ours"]
    ours = report["results"]["ours"]
    runs = ours["order"]["default"]["runs"]
    assert {(run["world_size"], run["workers"]) for run in runs} == {
        (ranks, threads) for ranks in (1, 2, 3) for threads in (1, 2, 5)
    }
    for run in runs:
        assert run["problem"] is None
        assert run["missing"] == run["doubled"] == [0, 0]
    assert ours["order"]["default"]["equal"] == {"world_sizes": [1, 1], "workers": [1, 1]}
    assert ours["resume"]["alike_after_steps"] == {"3": True}
    assert ours["resume"]["read_again"] == 0
    assert [(walk["missing"], walk["repeated"]) for walk in ours["elastic"]] == [(0, 0)]
    assert [(row["missing"], row["doubled"]) for row in ours["evaluation"]] == [(0, 0), (0, 0)]
    for case, row in ours["damage"]["default"].items():
        if case == "replaced during":  # the file that is open stays the old one
            assert row["result"] == "unharmed"
        else:
            assert row["result"] == "error" and "file" in row["names"], (case, row)
    assert str(tmp_path) not in done.stdout

    assert report["command"] == (
        "python benchmarks/streaming_guarantees.py --quick --json saved.json --markdown report.md"
    )
    text = document.read_text()
    assert table.markdown(report) in text and f"`{report['command']}`" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "ours,webdatset"], "no system 'webdatset'; --only takes ours, webdataset"),
        (["--only", "litdata", "--peers-python", "nowhere/python"], "run `make bench-peers`"),
    ],
)
def test_mistakes_are_one_line(words, says):
    done = run_script(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr and len(done.stderr.splitlines()) == 1
