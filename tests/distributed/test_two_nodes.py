"""Runs on two nodes, played by two torchruns on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment

ROOT = Path(__file__).parents[2]

# In srun's place: a task per node, each in a session of its own. Signals go to the tasks and not to
# what these have started, as with SLURM's proctrack/cgroup.
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
tasks=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    setsid "$@" &
    tasks+=($!)
done
again=0
trap 'again=1; kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while :; do
        wait "$task"
        task_code=$?
        ((again)) || break
        again=0
    done
    ((task_code > code)) && code=$task_code
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1; echo 127.0.0.2 ;;
    requeue) echo "$@" >> "$SCONTROL_LOG" ;;
esac
"""


def node_environment(tmp_path: Path, **extra: str) -> dict[str, str]:
    """The commands of this Python and of `tmp_path/bin`; loopback only, no GPU."""
    path = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    network = {"GLOO_SOCKET_IFNAME": "lo", "PET_LOCAL_ADDR": "127.0.0.1"}
    return {
        **environment(),
        "CUDA_VISIBLE_DEVICES": "",
        **network,
        "PATH": os.pathsep.join(path),
        **extra,
    }


@pytest.mark.slow
def test_rehearsal_trains_on_two_nodes(classification_recipe, tmp_path):
    script = ROOT / "launch" / "two_node_rehearsal.sh"
    words = [classification_recipe, "--out", tmp_path / "runs", "--epochs", "1"]
    done = subprocess.run(
        ["bash", script, *map(str, words)],
        env=node_environment(tmp_path),
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es) on cpu" in done.stdout
    assert "node 0: exit code 0\nnode 1: exit code 0\n" in done.stdout
    assert (tmp_path / "runs" / "tiny_classifier" / "last" / "model.json").is_file()


@pytest.mark.slow
def test_slurm_stops_before_the_time_limit_queues_again_and_finishes(
    classification_recipe, tmp_path
):
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    run, log = tmp_path / "runs" / "mine", tmp_path / "scontrol.log"
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2"}
    job |= {"SLURM_GPUS_ON_NODE": "1", "SCONTROL_LOG": str(log), "RUN": str(run)}
    flags = ["--epochs", "12", "--eval.every_epochs", "99", "--checkpoint.every_steps", "0"]
    words = ["bash", "launch/slurm.sh", str(classification_recipe), *flags]
    env = node_environment(tmp_path, **job)

    batch = subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline and batch.poll() is None
        time.sleep(0.05)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(timeout=120) == 0
    assert log.read_text() == f"requeue {job['SLURM_JOB_ID']}\n"
    assert len(list((run / "checkpoints").iterdir())) == 1
    assert not (run / "last").exists()

    again = subprocess.run(
        words, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert "from step 0 " not in again.stdout
    assert (run / "last").is_dir()
    assert log.read_text().count("requeue") == 1
