"""Training under the launchers people use, and what happens when something is wrong."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import command_line, environment, run_mbv3dist
from safetensors.torch import load_file


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
@pytest.mark.parametrize("processes", [0, 2])
def test_a_request_to_stop_is_heard_at_once_and_writes_a_checkpoint(
    classification_recipe, tmp_path, processes
):
    """Far from any record, validation or checkpoint; of two ranks one is told."""
    flags = ["--out", tmp_path / "runs", "--epochs", "100000", "--checkpoint.every_steps", "0"]
    flags += ["--eval.every_epochs", "999999", "--tracking.log_every_steps", "999999"]
    process = subprocess.Popen(
        command_line(["train", classification_recipe, *flags], processes=processes),
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        lines = iter(output.readline, "")
        assert any("decode: cpu" in line for line in lines)  # said before the first step
        time.sleep(1)
        if processes:
            family = psutil.Process(process.pid).children(recursive=True)
            told = next(p for p in family if p.environ().get("RANK") == "1")
            told.send_signal(signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
        said = next(line for line in lines if "stopped on request after step" in line)
        assert process.wait(timeout=60) == 0
    stopped_at = int(said.partition("after step ")[2].partition(";")[0])
    run = tmp_path / "runs" / "tiny_classifier"
    assert 0 < stopped_at < 99_000
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{stopped_at:08d}"]
    assert not (run / "last").exists()
    # Nothing of the steps since the last record is lost.
    record = json.loads((run / "metrics.jsonl").read_text())
    assert record["step"] == stopped_at


@pytest.mark.slow
def test_losses_and_weights_do_not_depend_on_ranks_or_accumulation(detection_recipe, tmp_path):
    """With BatchNorm frozen nothing in a step depends on how the batch is divided."""
    results = {}
    for processes, accumulation in ((0, 1), (0, 3), (3, 1)):
        name = f"p{processes}a{accumulation}"
        flags = ["--name", name, "--out", tmp_path, "--model.freeze_bn", "true", "--epochs", "2"]
        flags += ["--optim.accumulation_steps", accumulation, "--optim.lr", "0.001"]
        done = run_mbv3dist("train", detection_recipe, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in rows if r["kind"] == "train"]
        weights = load_file(tmp_path / name / "last" / "model.safetensors")
        results[name] = (losses, weights)
    reference_losses, reference = results.pop("p0a1")
    assert len(reference_losses) == 4
    for losses, weights in results.values():
        assert losses == pytest.approx(reference_losses, rel=1e-4)
        for name, value in reference.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_eval_on_two_ranks_prints_one_answer(classification_recipe, classification_data, tmp_path):
    flags = ["--out", tmp_path, "--epochs", "1", "--name", "model"]
    assert run_mbv3dist("train", classification_recipe, *flags).returncode == 0
    words = ["eval", tmp_path / "model" / "last", classification_data, "--split", "train", "--json"]
    alone, together = (run_mbv3dist(*words, processes=count) for count in (0, 2))
    assert together.returncode == 0, together.stderr
    one, two = json.loads(alone.stdout), json.loads(together.stdout)
    assert two["samples"] == one["samples"] == 21
    assert two["top1"] == one["top1"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_lower_rate_takes_effect_on_resume_and_early_stop_stays(classification_recipe, tmp_path):
    words = ["train", classification_recipe, "--out", tmp_path, "--name", "run"]
    first = [*words, "--eval.every_epochs", "1", "--eval.early_stop", "1", "--optim.lr", "1e-9"]
    assert run_mbv3dist(*first).returncode == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_text()
    steps = [json.loads(line)["step"] for line in before.splitlines()]
    assert max(steps) < 11  # of 11: it stopped early, having learnt nothing
    again = run_mbv3dist(*first, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert "the run is complete" in again.stdout
    assert metrics.read_text() == before
    on = [*words, "--resume", "auto", "--optim.lr", "0.002", "--optim.schedule", "constant"]
    done = run_mbv3dist(*on)
    assert done.returncode == 0, done.stderr
    last = [json.loads(line) for line in metrics.read_text().splitlines()][-2]
    assert (last["step"], last["lr"]) == (11, 0.002)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_wandb_offline(classification_recipe, tmp_path, processes):
    flags = ["--out", tmp_path / "runs", "--tracking.wandb", "true", "--epochs", "1"]
    env = {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home")}
    words = ["train", classification_recipe, *flags]
    done = run_mbv3dist(*words, processes=processes, env=env)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny_classifier"
    assert len(list((run / "wandb").glob("offline-run-*"))) == 1
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_wandb_without_an_account_is_one_line(classification_recipe, tmp_path):
    flags = ["--out", tmp_path / "runs", "--tracking.wandb", "true", "--epochs", "1"]
    env = {"WANDB_API_KEY": "", "HOME": str(tmp_path / "home")}
    done = run_mbv3dist("train", classification_recipe, *flags, env=env)
    assert done.returncode == 2
    assert "WANDB_MODE=offline" in done.stderr.splitlines()[-1]
