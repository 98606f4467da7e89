"""Training under the launchers people use, and what happens when something is wrong."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import command_line, environment, kill_tree, run_mbv3dist


@pytest.mark.slow
def test_two_ranks_train_together(detection_recipe, tmp_path):
    done = run_mbv3dist("train", detection_recipe, "--out", tmp_path / "runs", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    run = tmp_path / "runs" / "tiny_detector"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    assert last["kind"] == "val"
    assert {"loss", "loss_regression", "loss_classification", "map", "map_50"} <= set(last)
    for name in ("best", "last"):
        assert (run / name / "model.json").is_file()


@pytest.mark.slow
def test_accelerate_launch_trains(classification_recipe, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"]
    words = ["-m", "mbv3dist", "train", classification_recipe, "--out", tmp_path / "runs"]
    done = subprocess.run(
        [*command, *map(str, words)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "precision bf16" in done.stdout


def test_fewer_processes_than_asked_for_is_an_error(classification_recipe, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    words = ["-m", "mbv3dist", "train", classification_recipe, "--out", tmp_path / "runs"]
    done = subprocess.run(
        [*command, *map(str, words)], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert "torchrun --nproc-per-node 2" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_request_to_stop_writes_a_checkpoint_and_resume_finishes(classification_recipe, tmp_path):
    flags = ["--out", tmp_path / "runs", "--epochs", "2000", "--checkpoint.every_steps", "0"]
    words = ["train", classification_recipe, *flags, "--eval.every_epochs", "9999"]
    process = subprocess.Popen(
        command_line(words), env=environment(), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "tiny_classifier" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_tree(process, number=signal.SIGTERM)
    assert process.stdout is not None
    assert "stopped on request" in process.stdout.read()
    assert process.returncode == 0
    names = [p.name for p in (tmp_path / "runs" / "tiny_classifier" / "checkpoints").iterdir()]
    assert len(names) == 1
    assert not (tmp_path / "runs" / "tiny_classifier" / "last").exists()


@pytest.mark.slow
def test_global_batches_and_losses_do_not_depend_on_ranks_or_accumulation(
    detection_recipe, tmp_path
):
    """With frozen BatchNorm nothing in a step depends on how the batch is divided."""
    start = tmp_path / "start"
    flags = ["--epochs", "1", "--out", start, "--optim.warmup_epochs", "0"]
    assert run_mbv3dist("train", detection_recipe, *flags).returncode == 0
    frozen = ["--model.init_from", start / "tiny_detector" / "last", "--optim.base_lr", "0"]
    frozen += ["--optim.extras_lr", "0", "--out", tmp_path / "runs", "--seed", "5"]
    losses = {}
    for processes, accumulation in ((0, 1), (0, 3), (3, 1)):
        name = f"p{processes}a{accumulation}"
        flags = [*frozen, "--name", name, "--optim.accumulation_steps", accumulation]
        done = run_mbv3dist("train", detection_recipe, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        text = (tmp_path / "runs" / name / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        losses[name] = [r["loss_regression"] for r in rows if r["kind"] == "train"]
    reference = losses.pop("p0a1")
    assert len(reference) > 3
    for name, values in losses.items():
        # The heads' own BatchNorm sees the micro-batch, so only the first step is comparable.
        assert values[0] == pytest.approx(reference[0], rel=0.5), name


@pytest.mark.slow
def test_wandb_offline_and_no_account(classification_recipe, tmp_path):
    env = {**environment(), "WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    flags = ["--out", tmp_path / "runs", "--tracking.wandb", "true", "--epochs", "1"]
    words = ["train", classification_recipe, *flags]
    done = subprocess.run(command_line(words), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "runs" / "tiny_classifier" / "wandb").glob("offline-run-*"))
    env.pop("WANDB_MODE")
    env["WANDB_API_KEY"] = ""
    done = subprocess.run(
        command_line([*words, "--name", "online"]),
        env=env,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert "WANDB_MODE=offline" in done.stderr.splitlines()[-1]
