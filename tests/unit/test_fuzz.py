"""A short form of the fuzz run (tests/fuzz), and every past finding as a regression input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import findings, harness, mutate
from fuzz.sandbox import text_problem
from fuzz.seeds import RECIPES, Case, Seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
# Those of pure Python parsers, which are quick and need no torch.
QUICK = ("xml", "idx", "target", "url")

texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=12,
)
target_keys = st.sampled_from(["width", "height", "boxes", "labels", "difficult"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sandbox and the valid files."""
    folder = tmp_path_factory.mktemp("fuzz")
    return harness.make_box(folder / "box"), Seeds(folder)


def judge(case, world):
    result = harness.run_case(case, *world)
    assert result.outcome != "finding", f"{case.target}: {result.problem}"
    return result


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(target=st.sampled_from(QUICK), rng=st.randoms(use_true_random=False))
def test_mutated_text(world, target, rng):
    judge(harness.find_target(target).make(rng, world[1]), world)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=values | st.dictionaries(target_keys, values))
def test_any_json_as_a_target(world, tree):
    data = json.dumps(tree).encode("utf-8", "surrogatepass")
    judge(Case("target", {"input": data}, {"task": "detection"}), world)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.integers(0, 400), value=st.sampled_from(["!!", "&a ", "*a", "<<: ", "? "]) | texts)
def test_any_text_in_a_recipe(world, place, value):
    text = RECIPES[0][:place] + value + RECIPES[0][place:]
    data = text.encode("utf-8", "surrogatepass")
    judge(Case("recipe", {"recipe.yaml": data}, {}), world)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes(world, data):
    for target, options in (("xml", {}), ("idx", {}), ("target", {"task": "classification"})):
        judge(Case(target, {"input": data}, options), world)


def test_past_findings(world):
    cases = findings.past(world[1])
    assert len(cases) > 50
    results = [(what, harness.run_case(case, *world)) for what, case in cases]
    wrong = [
        (what, r.outcome, r.problem)
        for what, r in results
        if r.outcome != ("accepted" if what in findings.ACCEPTED else "refused")
    ]
    assert not wrong
    assert not [(what, r.seconds) for what, r in results if r.seconds > 20]


def test_attacks_are_refused(world):
    """Bombs, ways out of the folder, code, absurd sizes; that nothing else happens is watched."""
    for what, case in findings.attacks(world[1]):
        result = harness.run_case(case, *world)
        assert (result.outcome, result.problem) == ("refused", ""), what
        assert result.seconds < 20, what


def test_valid_files_are_accepted(world):
    """The other side: a target that refuses everything would find nothing."""

    class Unchanged(random.Random):
        def random(self):
            return 0.0  # `mutate` gives files back as they are

    for name in ("xml", "picture", "view", "idx", "recipe", "list", "spec", "weights"):
        for seed in range(3):
            case = harness.find_target(name).make(Unchanged(seed), world[1])
            assert judge(case, world).outcome == "accepted", name


def test_mutation_is_the_same_for_the_same_seed():
    for kind, data in (("xml", b"<a>1</a>"), ("json", b'{"a": 1}'), ("yaml", b"a: 1\n")):
        made = [mutate.mutate(random.Random(5), kind, [data]) for _ in range(2)]
        assert made[0] == made[1]
    changed = {mutate.mutate(random.Random(n), "lines", [b"cat\ndog\n"]) for n in range(50)}
    assert len(changed) > 30


def run(folder, *words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--findings", str(folder), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_three_hundred_inputs(tmp_path):
    code, result = run(tmp_path, "--inputs", "300", "--seed", "1")
    assert code == 0, result["findings_by_problem"]
    assert result["inputs"] == 300 and result["findings"] == 0
    assert result["inputs_through_commands"] > 30
    assert set(result["targets"]) == set(harness.TARGETS)
    assert sum(counts.get("accepted", 0) for counts in result["targets"].values()) > 30
    assert not list(tmp_path.iterdir())


PLANTED = {
    "traceback": "tracebacks",
    "library": "library_messages",
    "memory": "tracebacks",
    "write": "outside",
    "read": "others",
    "program": "others",
    "thread": "others",
    "hang": "hangs",
    "crash": "crashes",
}


def test_planted_faults_are_found(tmp_path):
    names = [f"planted_{name}" for name in PLANTED]
    words = ["--inputs", "14", "--seed", "37", "--limit-s", "1", "--targets", *names]
    code, result = run(tmp_path, *words)
    assert code == 1
    assert result["findings"] == 14 == len(list(tmp_path.iterdir()))
    assert set(result["targets"]) == set(names)
    for kind in set(PLANTED.values()):
        mine = [f"planted_{name}" for name, group in PLANTED.items() if group == kind]
        assert result[kind] == sum(result["targets"][name]["finding"] for name in mine), kind


@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[2J", "a\u202eb", "x" * 3000])
def test_what_is_no_message(text):
    assert text_problem(text)
    assert not text_problem("data/voc: no such folder (\u732b)")
