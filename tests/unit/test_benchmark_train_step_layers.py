"""Layers timed one by one, and the state of a GPU that is measured."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import roofline
from steps import device_state
from steps import layers as step_layers
from steps.layers import layers_table
from steps.systems import Setting, make_classifier

CPU = torch.device("cpu")
EAGER = Setting(CPU, channels_last=True)


def test_layers_alone_move_what_the_model_moves():
    model = make_classifier("ours", "small")
    layers = step_layers.layers_of(model, size=224)
    assert not any(module._forward_hooks for module in model.modules())
    traffic = roofline.count_traffic(model, size=224)
    sums = dict.fromkeys(step_layers.PASSES, 0)
    for layer in layers:
        sums[layer.rule] += layer.count * layer.elements
    linear = sum(
        m.in_features + m.out_features for m in model.modules() if hasattr(m, "in_features")
    )
    assert sums["convolution"] + linear == traffic.convolutions
    assert sums["batch norm"] == traffic.batch_norms
    assert sums["activation"] == traffic.activations
    kinds = {layer.kind: 0 for layer in layers}
    for layer in layers:
        kinds[layer.kind] += layer.count
    assert kinds["depthwise 3x3"] + kinds["depthwise 5x5"] == 11
    assert kinds["batch norm"] == 34 and kinds["first convolution"] == 1


@pytest.mark.parametrize("amp", ["no", "bf16"])
def test_a_layer_is_timed_both_ways(amp):
    found = step_layers.layers_of(make_classifier("ours", "small"), size=32)
    chosen = {layer.kind: layer for layer in found}.values()
    for layer in chosen:
        times = step_layers.time_layer(layer, replace(EAGER, amp=amp), batch=2, repeats=1)
        assert min(times) > 0


def test_the_kind_that_would_save_most_comes_first():
    def row(kind, count, forward, backward, floor):
        floors = [floor, 2 * floor]
        return {"kind": kind, "count": count, "ms": [forward, backward], "floor_ms": floors}

    rows = [row("a", 1, 2.0, 4.0, 1.0), row("b", 2, 4.0, 6.0, 1.0), row("b", 1, 1.0, 1.0, 0.5)]
    found = step_layers.by_kind(rows)
    assert list(found) == ["b", "a"]
    assert found["b"]["layers"] == 3
    assert found["b"]["forward_ms"] == 9.0 and found["b"]["backward_ms"] == 13.0
    assert found["b"]["floor_ms"] == 7.5 and found["b"]["saving_ms"] == 14.5
    assert found["a"]["share"] == pytest.approx(6 / 28, abs=1e-4)
    assert found["a"]["of_floor_forward"] == 0.5
    part = {"variant": "small", "setting": "channels_last", "kinds": found}
    assert any(line.startswith("| b | 3 | 9.00 | 13.00 |") for line in layers_table(part))


def test_the_state_of_a_gpu_is_read():
    found = device_state.parse_state("1980, 2619, 0x0000000000000044, 61, 412.35\n")
    assert found == {
        "sm_mhz": 1980.0,
        "mem_mhz": 2619.0,
        "throttle": ["software power cap", "hardware thermal slowdown"],
        "temperature_c": 61.0,
        "power_w": 412.35,
    }
    assert device_state.throttle_words(0) == []
    assert device_state.throttle_words(0x1001) == ["idle", "0x1000"]
    partly = device_state.parse_state("1980, [N/A], [N/A], 61, [Not Supported]")
    assert partly["mem_mhz"] is partly["throttle"] is partly["power_w"] is None
    assert device_state.parse_state("Field is not a valid field to query.") is None
    assert device_state.parse_state("") is None
    text = device_state.state_text({"before": None, "load": found, "after": partly})
    assert text.startswith("load: SM 1980.0 MHz")
    assert "software power cap, hardware thermal slowdown" in text
    assert device_state.state_text({"before": None}) == ""


def test_a_state_that_cannot_be_had_is_none():
    assert device_state.state(CPU) is None
    tried = device_state.commands("ab-12")
    assert [words[-1] == "GPU-ab-12" for words in tried] == [True, True, False, False]
    assert device_state.commands(None) == tried[2:]
    assert device_state._ask(["a-command-that-is-nowhere"], None) is None
    calls = []
    words = [sys.executable, "-c", "import time; time.sleep(0.2); print(7)"]
    assert device_state._ask(words, lambda: calls.append(time.sleep(0.01))) == "7\n"
    assert calls
