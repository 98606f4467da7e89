"""The launch scripts, run for real: two rehearsed nodes; a stand-in plays SLURM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

LAUNCH = Path(__file__).parents[2] / "launch"

SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo localhost || echo "$@" >>"$FAKE_SLURM/scontrol.log"
"""
SRUN = """#!/bin/bash
echo $$ >"$FAKE_SLURM/step.pid"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
# As SLURM does: the signal reaches every process of the step.
SCANCEL = """#!%s
import os, pathlib, signal, psutil
pid = int(pathlib.Path(os.environ["FAKE_SLURM"], "step.pid").read_text())
step = psutil.Process(pid)
for process in [step, *step.children(recursive=True)]:
    process.send_signal(signal.SIGUSR1)
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment in which srun, scancel and scontrol exist; their traces lie in a folder."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {"scontrol": SCONTROL, "srun": SRUN, "scancel": SCANCEL % sys.executable}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    env = environment()
    return {
        **env,
        "PATH": f"{folder}:{env['PATH']}",
        "FAKE_SLURM": str(folder),
        "PYTHON": sys.executable,
        "GPUS_PER_NODE": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
    }


@pytest.mark.slow
def test_two_rehearsed_nodes_train_together(detection_recipe, tmp_path):
    answer = subprocess.run(
        [LAUNCH / "two_node_rehearsal.sh", detection_recipe, "--out", tmp_path / "runs"],
        env={**environment(), "PYTHON": sys.executable, "PORT": "29611"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "2 process(es)" in answer.stdout
    assert (tmp_path / "runs" / "tiny_detector" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_node_that_fails_ends_the_rehearsal(tmp_path):
    answer = subprocess.run(
        [LAUNCH / "two_node_rehearsal.sh", tmp_path / "missing.yaml"],
        env={**environment(), "PYTHON": sys.executable, "PORT": "29612"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 1
    assert "mbv3dist: error:" in answer.stderr and "missing.yaml" in answer.stderr


@pytest.mark.slow
def test_slurm_stops_before_the_limit_and_goes_on(detection_recipe, tmp_path, slurm):
    """SIGUSR1 to the batch script: a checkpoint, a requeue; the second start finishes the run."""
    run = tmp_path / "runs" / "tiny_detector"
    words = [LAUNCH / "slurm.sh", detection_recipe, "--out", tmp_path / "runs", "--epochs", "30"]
    with subprocess.Popen(
        words, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        assert job.stdout is not None
        output = ""
        for line in job.stdout:
            output += line
            if line.startswith("step "):
                break
        job.send_signal(10)  # SIGUSR1
        output += job.stdout.read()
        assert job.wait(timeout=120) == 0, output
    assert "stopped on request" in output and "requeueing job 4711" in output
    assert (Path(slurm["FAKE_SLURM"]) / "scontrol.log").read_text() == "requeue 4711\n"
    assert list((run / "checkpoints").iterdir()) and not (run / "last").exists()

    again = subprocess.run(words, env=slurm, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "requeueing" not in again.stdout
    assert (run / "last").is_dir()
    kinds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in kinds if record["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)), "no step lost or doubled"
