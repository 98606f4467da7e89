"""Damaged samples in training on several ranks, and resuming with a changed data state."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CLASSIFICATION_RECIPE, kill_when
from ranks import run_commands

from mbv3dist.data.index import Split, open_split
from mbv3dist.data.plan import Plan

pytestmark = pytest.mark.slow

RANKS, BATCH = 2, 6
LAST_STEP = 11  # of three epochs of 21 samples


@pytest.fixture
def split(classification_data, tmp_path) -> Split:
    """A copy of the colours, to be damaged."""
    shutil.copytree(classification_data, tmp_path / "data")
    return open_split(tmp_path / "data", "train")


@pytest.fixture
def recipe(split, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(CLASSIFICATION_RECIPE % split.root)
    return path


def damage(split: Split, *indices: int) -> None:
    """Overwrites the pictures of samples, sizes unchanged."""
    for index in indices:
        picture = split.sample(index)["jpg"]
        shard = split.shards[split.locate(index)[0]].path
        content = shard.read_bytes()
        assert content.count(picture) == 1
        shard.write_bytes(content.replace(picture, b"\0" * len(picture)))


def readers(split: Split, epochs: int) -> dict[int, list[tuple[int, int]]]:
    """Where each sample is read in a run on two ranks: (step, rank), in order."""
    plan = Plan(split.shard_sizes, global_batch_size=BATCH, epochs=epochs)
    found: dict[int, list[tuple[int, int]]] = {index: [] for index in range(len(split))}
    for step in range(plan.num_steps):
        for rank in range(RANKS):
            for index in plan.step(step, rank=rank, world_size=RANKS).index.tolist():
                found[index].append((step, rank))
    return found


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (run / "checkpoints").glob("step-*"))


def saved_damage(run: Path, step: int) -> set[int]:
    state = json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    for index, reason in state["damaged"].items():
        assert f"sample {int(index):09d} (" in reason
    return {int(index) for index in state["damaged"]}


def listed(split: Split, run: Path) -> set[str]:
    """Keys in damaged.tsv; every line also names the source."""
    lines = (run / "damaged.tsv").read_text().splitlines()
    for line in lines:
        key, text = line.split("\t")
        assert f"sample {key} ({split.source(int(key))}): " in text
    return {line.split("\t")[0] for line in lines}


def test_within_the_budget_a_run_goes_on_and_counts_over_a_resume(split, recipe, tmp_path):
    run = tmp_path / "runs" / "run"
    places = readers(split, epochs=3)
    first = next(i for i, found in places.items() if found[0] == (0, 0))
    second = next(i for i, found in places.items() if found[0] == (1, 1))
    third = next(i for i, found in places.items() if found[0][0] == 3)  # behind the checkpoint
    whole = {path: path.read_bytes() for path in split.root.rglob("*.tar")}
    damage(split, first, second)
    words = ["train", recipe, "--out", tmp_path / "runs", "--name", "run", "--resume", "auto"]
    words += ["--data.prefetch", "1", "--data.error_budget"]
    kill_when([*words, "2"], run / "checkpoints" / "step-00000003", processes=RANKS)
    step = saved_steps(run)[-1]
    assert 3 <= step < LAST_STEP - 3 and not (run / "last").exists()
    keys = {split.key(first), split.key(second)}
    assert saved_damage(run, step) == {first, second}
    assert listed(split, run) == keys

    # They are mended, and another one is found: the third, though this process meets one only.
    for path, content in whole.items():
        path.write_bytes(content)
    damage(split, third)
    met = next(at for at, _ in places[third] if at >= step)
    ((stopped,),) = run_commands([[*words, "2"]], 1, tmp_path / "output 2")
    assert stopped.code == 2, stopped.stdout
    (line,) = stopped.stderr.splitlines()
    assert "3 samples are damaged and --data.error_budget allows 2; the last one: " in line
    assert f"sample {split.key(third)} ({split.source(third)})" in line
    assert step <= saved_steps(run)[-1] <= met
    assert not (run / "last").exists() and not (run / "best").exists()

    (ranks,) = run_commands([[*words, "3"]], 3, tmp_path / "output 3")
    assert [rank.code for rank in ranks] == [0, 0, 0], ranks
    assert ranks[0].stdout.count("goes with weight 0") == 1  # the others had been said before
    assert saved_damage(run, LAST_STEP) == {first, second, third}
    assert listed(split, run) == keys | {split.key(third)}
    assert (run / "last" / "model.safetensors").is_file()


@pytest.mark.parametrize("every_steps", [3, 0])
def test_above_the_budget_together_nothing_is_saved(split, recipe, tmp_path, every_steps):
    """Each rank alone is within the budget; together they are above it in step 3 of 4."""
    places = readers(split, epochs=1)
    first = next(i for i, found in places.items() if found == [(0, 0)])
    second = next(i for i, found in places.items() if found == [(2, 1)])
    damage(split, first, second)
    words = ["train", recipe, "--out", tmp_path / "runs", "--name", "run", "--epochs", "1"]
    words += ["--eval.every_epochs", "1", "--data.error_budget", "1"]
    words += ["--checkpoint.every_steps", every_steps, "--tracking.log_every_steps", "99"]
    (ranks,) = run_commands([words], RANKS, tmp_path / "output")
    assert [rank.code for rank in ranks] == [2, 2]
    run = tmp_path / "runs" / "run"
    assert saved_steps(run) == []
    assert not (run / "last").exists() and not (run / "best").exists()
    assert listed(split, run) == {split.key(first), split.key(second)}
    lines = [line for rank in ranks for line in rank.stderr.splitlines()]
    (line,) = lines
    assert line.startswith("mbv3dist: error: 2 samples are damaged and --data.error_budget allows")


def test_another_order_is_refused_on_resume_unless_accepted(recipe, tmp_path):
    run = tmp_path / "runs" / "run"
    words = ["train", recipe, "--out", tmp_path / "runs", "--name", "run", "--resume", "auto"]
    kill_when(words, run / "checkpoints" / "step-00000003")
    step = saved_steps(run)[-1]
    assert step < LAST_STEP
    kept = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    other = [*words, "--seed", "7", "--data.lanes", "2"]
    accept = [*other, "--data.accept_changes"]
    refused = [other, [*accept, "seed"], [*accept, "seed", "tail"]]
    ends = run_commands(refused, 1, tmp_path / "refused")
    assert [end.code for (end,) in ends] == [2, 2, 2]
    seed, lanes, tail = [end.stderr.removesuffix("\n") for (end,) in ends]
    for line, name, change in (
        (seed, "seed", "seed was 0 and is now 7"),
        (lanes, "lanes", "lanes was 6 and is now 2"),
    ):
        assert f"step-{step:08d}: cannot be continued: the data state does not fit: " in line
        assert change in line
        assert f"--data.accept_changes {name} (samples of the epoch under way may then be" in line
    assert "--data.accept_changes tail: cannot be accepted; what can: decode, decoder, " in tail
    assert all("\n" not in line for line in (seed, lanes, tail))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == kept

    # Accepted once, this is the run's order from now on: nothing has to be accepted again.
    ends = run_commands([[*accept, "seed", "lanes"], other], 1, tmp_path / "accepted")
    (done,), (again,) = ends
    assert (done.code, again.code) == (0, 0), ends
    for change in ("seed was 0 and is now 7", "lanes was 6 and is now 2"):
        assert f"warning: accepted: {change}: samples of the epoch under way may" in done.stdout
    assert f"from step {step} of {LAST_STEP}" in done.stdout
    state = json.loads((run / "checkpoints/step-00000011/state.json").read_text())["data"]
    assert (state["seed"], state["lanes"], state["step"]) == (7, 2, LAST_STEP)
    assert "the run is complete" in again.stdout and "accepted" not in again.stdout
