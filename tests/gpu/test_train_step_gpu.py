"""The benchmark of training steps on a GPU: our loss never waits, steps are graphs and compile."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import train_step
from steps import device_state, matrix
from steps.systems import Setting, classifier, our_detector, their_detector

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # Inductor's own
]


def run(capsys, *words):
    assert train_step.main(["--quick", "--rounds", "2", "--steps", "2", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["sections"]


@pytest.mark.parametrize(
    "amp",
    ["bf16", *(pytest.param(amp, marks=pytest.mark.slow) for amp in ("no", "fp16"))],
)
def test_steps_and_counts(amp, capsys):
    words = ["--batch", "4", "--amp", amp, "--parts", "detectors,counts", "--compile"]
    found = run(capsys, *words, "--cuda-graphs")
    detectors, counts = found["detectors"], found["counts"]
    names = {name.replace(f" {amp}", "") for name in detectors["systems"]}
    assert {"ours channels_last graph", "ours channels_last compiled graph"} <= names
    # Torchvision's loss waits, so that it cannot be a graph; nothing else may fail.
    assert {name.partition(" ")[0] for name in detectors["failed"]} <= {"torchvision"}
    assert all("graph" in name and "waits" in why for name, why in detectors["failed"].items())
    assert counts["systems"]["ours"]["loss"]["syncs_seen"] == 0
    assert counts["systems"]["ours"]["step"]["syncs_seen"] == 0
    assert counts["systems"]["torchvision"]["step"]["syncs_seen"] > 0
    assert 100 < found["roofline"]["bandwidth"]["copy"]["best_gb_s"] < 20_000


@pytest.mark.slow  # compiles twelve times
def test_classifiers_in_every_library(capsys, tmp_path):
    words = ["--classifier-batch", "8", "--amp", "bf16"]
    words += ["--parts", "classifiers,inference,layers"]
    words += ["--variants", "small", "--compile", "default,reduce-overhead", "--cuda-graphs"]
    found = run(capsys, *words, "--trace", str(tmp_path / "t.json.gz"))
    for section in ("classifiers small", "inference small"):
        assert not found[section]["failed"]
        assert set(found[section]["best_ratio"]) == {"timm", "torchvision"}
        assert found[section]["trace"]["kernels"]
        kinds = {row["kind"] for row in found[section]["systems"].values()}
        assert "channels_last bf16 compiled graph" in kinds
        assert "channels_last bf16 compiled reduce-overhead" in kinds
    assert found["layers small"]["kinds"]["depthwise 5x5"]["of_floor"] > 0


def gradients(system) -> list[torch.Tensor]:
    groups = system.optimizer.param_groups
    return [p.grad.clone() for group in groups for p in group["params"]]


def test_a_graph_computes_the_steps_gradients():
    """Two graphs in one pool, replayed in turns: neither disturbs the other."""
    device = torch.device("cuda")
    make = partial(our_detector, batch=4, num_classes=5)
    plain = make(Setting(device, channels_last=True))
    expected = plain.step(matrix.no_mark).item()
    wanted = gradients(plain)
    pool = torch.cuda.graph_pool_handle()
    graph = Setting(device, channels_last=True, graph=True)
    first = matrix.captured(make(graph), pool)
    second = matrix.captured(classifier("ours", "small", graph, batch=4), pool)
    for _ in range(3):
        second.step(matrix.no_mark)
        assert first.step(matrix.no_mark).item() == pytest.approx(expected, rel=1e-3)
        found, want = (
            torch.cat([g.flatten() for g in all_]) for all_ in (gradients(first), wanted)
        )
        assert (found - want).norm() < 0.05 * want.norm()


def test_what_waits_is_refused_and_leaves_the_device_usable():
    device = torch.device("cuda")
    setting = Setting(device, channels_last=True, graph=True)
    with pytest.raises(RuntimeError, match="it waits for the device"):
        matrix.captured(their_detector(setting, batch=2, num_classes=5))
    fine = matrix.captured(classifier("ours", "small", setting, batch=2))
    assert fine.whole_step(matrix.no_mark).isfinite()
    assert torch.nn.functional.dropout(torch.ones(8, device=device)).shape == (8,)


def test_the_device_tells_its_clocks():
    found = device_state.state(torch.device("cuda"), torch.cuda.synchronize)
    if found is None:
        pytest.skip("nvidia-smi does not answer here")
    assert found["sm_mhz"] is None or found["sm_mhz"] > 0
