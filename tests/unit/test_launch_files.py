"""The launch files are read by those they are for, agree with each other, and pass signals on."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import kill_tree

LAUNCH = Path(__file__).parents[2] / "launch"
ACCELERATE_FILES = sorted(p for p in LAUNCH.glob("*.yaml") if p.name != "kubernetes.yaml")

# In torchrun's place: one worker, which answers SIGUSR1 as the training loop does.
TORCHRUN = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path

log = Path(os.environ["LOG"])
(log / "arguments").write_text(" ".join(sys.argv[1:]))
worker = os.fork()
if worker:
    signal.signal(signal.SIGTERM, lambda *_: (log / "disturbed").touch())
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
signal.signal(signal.SIGUSR1, lambda *_: ((log / "stopped").touch(), os._exit(0)))
(log / "ready").touch()
for _ in range(600):
    if (log / "finish").exists():
        os._exit(int((log / "finish").read_text()))
    time.sleep(0.05)
os._exit(9)
"""


@pytest.mark.parametrize("path", ACCELERATE_FILES, ids=lambda path: path.name)
def test_accelerate_reads_its_files_and_asks_for_nothing_more(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    complaints = []
    monkeypatch.setattr("accelerate.commands.launch.logger.warning", complaints.append)
    words = ["--config_file", str(path), "-m", "mbv3dist", "train", "recipe.yaml"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert complaints == []
    assert args.num_processes == config.num_processes
    assert args.mixed_precision == ("no" if config.use_cpu else "bf16")
    assert args.multi_gpu == (config.num_processes > 1)
    assert args.num_processes % args.num_machines == 0
    # What the file tells its readers to type is the file itself.
    assert f"--config_file launch/{path.name} " in path.read_text()


def test_accelerate_files_say_how_many_processes_they_start():
    counts = {p.name: load_config_from_file(str(p)).num_processes for p in ACCELERATE_FILES}
    assert counts == {
        "cpu.yaml": 1,
        "ddp_8gpu_bf16.yaml": 8,
        "multi_node.yaml": 16,
        "one_gpu.yaml": 1,
    }


def test_kubernetes_objects_agree():
    objects = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    service, claim, job = (
        next(o for o in objects if o["kind"] == kind)
        for kind in ("Service", "PersistentVolumeClaim", "Job")
    )
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(word[2:].split("=", 1) for word in container["args"] if word.startswith("--"))

    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(flags["nnodes"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(flags["nproc-per-node"]) == gpus
    assert int(flags["data.global_batch_size"]) % (gpus * spec["completions"]) == 0

    # Pod 0 is found by the name that Job, subdomain and Service give it.
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert flags["rdzv-endpoint"].split(":")[0] == f"{name}-0.{subdomain}"
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounts.keys()
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == (claim["metadata"]["name"])
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (run,) = (entry["value"] for entry in container["env"] if entry["name"] == "RUN")
    assert run.startswith(mounts["shared"]) and flags["data.path"].startswith(mounts["shared"])

    # Long enough for a checkpoint, and a stopped pod starts again.
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert pod["restartPolicy"] == "Never"
    rules = spec["podFailurePolicy"]["rules"]
    assert all(rule["action"] == "Ignore" for rule in rules)
    (codes,) = (rule["onExitCodes"] for rule in rules if "onExitCodes" in rule)
    assert codes["values"] == [75] and codes["containerName"] == container["name"]
    recipe = next(word for word in container["args"] if word.endswith(".yaml"))
    assert (LAUNCH.parent / recipe).is_file()


def test_slurm_asks_for_a_signal_with_time_to_spare():
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, flags=re.MULTILINE))
    who, _, seconds = options["signal"].partition("@")
    assert who == "B:USR1" and int(seconds) >= 60
    assert options["ntasks-per-node"] == "1"
    assert "#SBATCH --requeue" in text


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_valid_bash(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""


@pytest.fixture
def node(tmp_path) -> Iterator[subprocess.Popen[bytes]]:
    """launch/node.sh with the stand-in for torchrun, once its worker is ready."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "torchrun").write_text(TORCHRUN)
    (folder / "torchrun").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "LOG": str(tmp_path), "RUN": str(tmp_path / "runs/mine")}
    words = ["bash", str(LAUNCH / "node.sh"), "--nnodes", "2", "-m", "mbv3dist", "train", "r.yaml"]
    process = subprocess.Popen(words, env=env)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        kill_tree(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_node_asks_the_workers_and_leaves_torchrun_alone(node, tmp_path, number):
    node.send_signal(number)
    assert node.wait(timeout=30) == 75
    assert (tmp_path / "stopped").exists()
    assert not (tmp_path / "disturbed").exists()
    arguments = (tmp_path / "arguments").read_text().split()
    assert arguments[:6] == ["--nnodes", "2", "-m", "mbv3dist", "train", "r.yaml"]
    end = ["--out", str(tmp_path / "runs"), "--name", "mine", "--resume", "auto"]
    assert arguments[6:] == end


@pytest.mark.parametrize(
    ("code", "is_complete", "expected"),
    [(0, True, 0), (0, False, 75), (1, False, 1), (1, True, 1)],
)
def test_node_tells_a_complete_run_from_a_stopped_one(node, tmp_path, code, is_complete, expected):
    if is_complete:
        (tmp_path / "runs/mine/last").mkdir(parents=True)
    (tmp_path / "finish.tmp").write_text(str(code))
    (tmp_path / "finish.tmp").rename(tmp_path / "finish")
    assert node.wait(timeout=30) == expected


def test_the_doc_names_only_files_that_are_there():
    root = LAUNCH.parent
    text = (root / "docs" / "multi_node.md").read_text()
    named = set(re.findall(r"(?:launch|configs|docs|tests)/[\w./]+\.(?:yaml|sh|md|py)", text))
    assert named and all((root / name).is_file() for name in named)
    assert all(path.name in text for path in LAUNCH.iterdir())


def test_scripts_say_how_they_are_used():
    env = {k: v for k, v in os.environ.items() if k != "RUN"}
    for name in ("node.sh", "two_node_rehearsal.sh", "slurm.sh"):
        done = subprocess.run(
            ["bash", LAUNCH / name], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, name
        assert "usage: " in done.stderr and len(done.stderr.splitlines()) == 1, name
