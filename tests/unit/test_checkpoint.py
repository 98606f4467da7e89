"""Checkpoints are whole or absent."""

import os

import pytest
import torch

from mbv3dist.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def save(folder, step, *, keep_last=2):
    parameter = torch.nn.Parameter(torch.full((3,), float(step)))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return save_checkpoint(
        folder,
        step,
        model={"w": parameter.detach()},
        ema={"w": parameter.detach() * 2},
        optimizer={"optimizer": optimizer.state_dict()},
        state={"best_score": 0.5},
        keep_last=keep_last,
    )


def test_round_trip(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 7))
    assert loaded.step == 7
    assert loaded.state["best_score"] == 0.5
    assert loaded.ema is not None
    assert torch.equal(loaded.ema["w"], 2 * loaded.model["w"])
    momentum = loaded.optimizer["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(3))


def test_the_last_k_stay(tmp_path):
    for step in (5, 10, 15, 100_000_000):
        save(tmp_path, step, keep_last=3)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000010", "step-00000015", "step-100000000"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("kind", ["cut", "flip", "gone"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, kind):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "flip":
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :])
    else:
        file.unlink()
    found, complaints = find_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"
    assert len(complaints) == 1
    assert name in complaints[0]


def test_leftovers_of_a_killed_run_are_cleaned(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000002"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert find_checkpoint(tmp_path)[0].name == "step-00000001"
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000003"]


def test_a_failed_write_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"step-00000002 .*No space left.*--resume auto"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_pickled_code_is_not_run(tmp_path):
    path = save(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"optimizer": Evil()}, path / "optimizer.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()
