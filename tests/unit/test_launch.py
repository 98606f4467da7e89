"""The launch files: Accelerate's own loader reads them, and their numbers agree."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ACCELERATE_FILES = ["cpu.yaml", "ddp_8gpu_bf16.yaml", "multi_node.yaml", "one_gpu.yaml"]


@pytest.mark.parametrize("name", ACCELERATE_FILES)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(LAUNCH / name))
    assert isinstance(config, ClusterConfig)
    processes = {"cpu": 1, "ddp_8gpu_bf16": 8, "multi_node": 16, "one_gpu": 1}[Path(name).stem]
    assert config.num_processes == processes
    assert config.num_processes % config.num_machines == 0
    assert config.use_cpu is (name == "cpu.yaml")
    assert config.mixed_precision == ("no" if name == "cpu.yaml" else "bf16")
    multi = processes > 1
    assert config.distributed_type.value == ("MULTI_GPU" if multi else "NO")


def test_no_launch_file_is_left_out():
    others = {"kubernetes.yaml"}
    assert {path.name for path in LAUNCH.glob("*.yaml")} == {*ACCELERATE_FILES, *others}


def test_kubernetes_numbers_agree():
    documents: list[Any] = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    service, job = documents
    assert [service["kind"], job["kind"]] == ["Service", "Job"]
    assert service["spec"]["clusterIP"] == "None", "headless"
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    flags = dict(word.split("=", 1) for word in container["command"] if "=" in word)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(flags["--nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(flags["--nproc-per-node"])
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert flags["--rdzv-endpoint"].startswith(f"{name}-0.{subdomain}:")
    assert subdomain == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    (shutdown,) = [e for e in container["env"] if e["name"].startswith("TORCH_ELASTIC")]
    assert int(shutdown["value"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("script", ["slurm.sh", "two_node_rehearsal.sh"])
def test_scripts_are_sound_and_say_how_they_are_used(script):
    path = LAUNCH / script
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    answer = subprocess.run([path], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: ") and answer.stderr.count("\n") == 1


def test_the_doc_names_only_files_that_are_there():
    text = (ROOT / "docs" / "multi_node.md").read_text()
    named = set(re.findall(r"(?:launch|configs|docs)/[\w.]+\.(?:yaml|sh|md)", text))
    assert named and all((ROOT / name).is_file() for name in named)
    for path in LAUNCH.iterdir():
        assert path.name in text or path.name == "cpu.yaml"
