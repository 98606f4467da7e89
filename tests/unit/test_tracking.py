"""Records of a run, and the processes' agreements."""

import json
import os
import signal

import pytest
import torch

from mbv3dist.training.processes import (
    StopRequest,
    check_devices,
    check_launch,
    on_main_process,
    step_seed,
)
from mbv3dist.training.tracking import drop_records_after


def test_records_beyond_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"kind": "tra')  # killed in the middle of a record
    drop_records_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    drop_records_after(tmp_path / "none.jsonl", 3)  # a fresh run has none


def test_one_process_where_several_were_asked_for():
    check_launch({})
    check_launch({"MASTER_ADDR": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="torchrun"):
        check_launch({"MASTER_ADDR": "127.0.0.1"})


def test_more_processes_than_gpus():
    alone = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    check_devices(0, alone)  # torchrun on CPUs
    check_devices(2, alone)
    with pytest.raises(ValueError, match="2 processes on this node and 1 GPU"):
        check_devices(1, alone)
    check_devices(1, {**alone, "ACCELERATE_USE_CPU": "True"})
    with pytest.raises(ValueError, match="for GPUs, and this machine shows none"):
        check_devices(0, {**alone, "ACCELERATE_MIXED_PRECISION": "bf16"})


@pytest.mark.parametrize("number", StopRequest.signals)
def test_a_stop_request_is_noted_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.heard()
        os.kill(os.getpid(), number)
        assert stop.heard()
    assert signal.getsignal(number) is before


def test_seeds_of_steps_differ_and_fit_torch():
    seeds = {
        step_seed(seed, step, rank)
        for seed in (0, 1, 20_240_101, 2**63 - 1)
        for step in (0, 1, 10**9)
        for rank in (0, 1)
    }
    assert len(seeds) == 24
    for seed in seeds:
        torch.manual_seed(seed)


def test_on_main_process_alone_is_a_plain_call():
    assert on_main_process(lambda: 3) == 3
    with pytest.raises(OSError, match="full"):
        on_main_process(lambda: (_ for _ in ()).throw(OSError("full")))
