"""The benchmark of training steps: what it counts, what it tries, and its quick form."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import roofline  # noqa: E402
import train_step  # noqa: E402
from steps import matrix, measure  # noqa: E402
from steps.counts import count_ops  # noqa: E402
from steps.inference import inference_system  # noqa: E402
from steps.report import systems_table  # noqa: E402
from steps.systems import (  # noqa: E402
    Clock,
    Setting,
    System,
    classifier,
    draw_boxes,
    our_detector,
)

CPU = torch.device("cpu")
EAGER = Setting(CPU, channels_last=True)


def test_operations_that_wait_are_named():
    x = torch.arange(6.0)

    def waits():
        (x > 2).any().item()
        x[x > 2]
        x.clone()[x > 2] = x[:3]
        torch.nonzero(x)

    found = count_ops(waits)["waiting_ops"]
    assert sum(found.values()) == 4, found
    assert any("index.Tensor with a mask" in name for name in found)
    assert any("index_put" in name for name in found)

    def never_waits():
        x[torch.tensor([1, 2])]
        x.masked_fill(x > 2, 0.0)
        torch.where(x > 2, x, 0.0).sum()

    quiet = count_ops(never_waits)
    assert quiet["waits"] == 0
    assert quiet["ops"] >= 5


def test_boxes_lie_on_the_canvas_and_some_pictures_have_none():
    boxes, labels = draw_boxes(64, 320, 20)
    real = labels >= 0
    assert not real.any(1).all()
    assert boxes[real].min() >= 0 and boxes[real].max() <= 320
    assert (boxes[real][:, 2:] > boxes[real][:, :2]).all()
    assert (boxes[~real] == 0).all()


def test_stages_add_up():
    clock = Clock(CPU)
    for name in ("forward", "loss", "forward"):
        clock(name)
    stages = clock.stages()
    assert list(stages) == ["forward", "loss"]
    assert all(took >= 0 for took in stages.values())
    assert clock.until_end_of(clock) == pytest.approx(sum(stages.values()))


def test_settings_stand_in_the_order_of_their_worth():
    def kinds(**words):
        options = {"amps": ["no"], "modes": [], "graphs": False, "both_formats": True}
        return [setting.kind for setting in matrix.settings_of(CPU, **{**options, **words})]

    assert kinds() == ["channels_last", "contiguous"]
    assert kinds(both_formats=False) == ["channels_last"]
    modes = list(train_step.COMPILE_MODES)
    everything = kinds(amps=["bf16", "fp16"], modes=modes, graphs=True)
    assert everything == [
        "channels_last bf16",
        "contiguous bf16",
        "channels_last bf16 compiled",
        "channels_last bf16 graph",
        "channels_last bf16 compiled graph",
        "channels_last fp16",
        "channels_last fp16 compiled",
        "channels_last bf16 compiled reduce-overhead",
        "channels_last bf16 compiled max-autotune-no-cudagraphs",
        "channels_last bf16 compiled max-autotune-no-cudagraphs graph",
    ]


def test_wrong_words_are_told():
    assert train_step.parse(["--compile", "--device", "cpu"]).settings[-1].compile == "default"
    for words, message in (
        (["--cuda-graphs", "--device", "cpu"], "needs a GPU"),
        (["--parts", "all"], "choose of detectors"),
        (["--amp", "bf16,int8"], "--amp bf16,int8: choose of no, bf16, fp16"),
        (["--compile", "fast"], "--compile fast: choose of default"),
        (["--variants", "huge"], "choose of small, large"),
        (["--add"], "--add needs --json"),
    ):
        with pytest.raises(ValueError, match=message):
            train_step.parse(words)


def tiny_system(library, setting, *, sleep_s=0.0):
    weight = torch.nn.Parameter(torch.ones(4, 4))

    def step(mark):
        time.sleep(sleep_s)
        mark("forward")
        loss = (weight**2).sum()
        mark("loss")
        loss.backward()
        mark("backward")
        return loss

    optimizer = torch.optim.SGD([weight], lr=0.1)
    return System(library, setting, step, None, optimizer)


def test_what_fails_says_why_and_the_others_go_on():
    def broken(setting):
        raise RuntimeError("no room\nfor this\nand more")

    def breaks_when_compiled(setting):
        if setting.compile:
            raise torch.OutOfMemoryError("8 GB are missing")
        return tiny_system("timm", setting)

    makes = {
        "ours": lambda setting: tiny_system("ours", setting),
        "timm": breaks_when_compiled,
        "torchvision": broken,
    }
    built = matrix.build_all(makes, [EAGER, replace(EAGER, compile="default")])
    ours, compiled = "ours channels_last", "ours channels_last compiled"
    assert list(built.systems) == [ours, "timm channels_last", compiled]
    assert built.failed == {
        "torchvision channels_last": "RuntimeError: no room for this",
        "timm channels_last compiled": "OutOfMemoryError: 8 GB are missing",
        "torchvision channels_last compiled": "RuntimeError: no room for this",
    }
    assert set(built.first_call_s) == set(built.first_losses) == set(built.systems)
    assert built.first_losses[ours] == 16.0


def test_a_budget_that_is_spent_ends_with_whole_settings():
    def slow(library):
        def make(setting):
            time.sleep(0.03)
            return tiny_system(library, setting)

        return make

    makes = {"ours": slow("ours"), "timm": slow("timm")}
    settings = [EAGER, replace(EAGER, channels_last=False)]
    built = matrix.build_all(makes, settings, budget_s=0.05)
    assert list(built.systems) == ["ours channels_last", "timm channels_last"]
    assert all("0.05 s for making systems were spent" in why for why in built.failed.values())
    assert list(built.failed) == ["ours contiguous", "timm contiguous"]


def test_making_one_system_is_limited_even_if_errors_are_swallowed():
    def stubborn(setting):
        try:
            time.sleep(60)
        except TimeoutError:
            time.sleep(60)
        raise AssertionError("it should have been told again")

    before = signal.getsignal(signal.SIGALRM)
    started = time.perf_counter()
    again, matrix.RING_AGAIN_S = matrix.RING_AGAIN_S, 0.05
    try:
        built = matrix.build_all({"ours": stubborn}, [EAGER], limit_s=0.05)
    finally:
        matrix.RING_AGAIN_S = again
    assert time.perf_counter() - started < 30  # imports of torch's compiler among them
    assert built.failed == {"ours channels_last": "TimeoutError: not ready within 0.05 s"}
    assert signal.getsignal(signal.SIGALRM) is before


def measured(systems, **words):
    built = matrix.Built(
        systems=systems,
        first_call_s=dict.fromkeys(systems, 1.0),
        first_losses=dict.fromkeys(systems, 1.0),
    )
    args = SimpleNamespace(device=CPU, steps=2, rounds=5, quiet=1.0, trace=None)
    args.rates = {"bandwidth": {"copy": {"best_gb_s": 10.0}}}
    traffic = roofline.Traffic(1000, 500, 200, 10_000, 8)
    options = {"section": "x", "batch": 4, "base": "torchvision contiguous", "traffic": traffic}
    return measure.measure_systems(built, args, **{**options, **words})


def test_a_slower_step_is_seen_and_each_librarys_best_compared():
    contiguous = Setting(CPU)
    found = measured(
        {
            "ours channels_last": tiny_system("ours", EAGER, sleep_s=0.002),
            "ours contiguous": tiny_system("ours", contiguous, sleep_s=0.04),
            "timm channels_last": tiny_system("timm", EAGER, sleep_s=0.02),
            "torchvision contiguous": tiny_system("torchvision", contiguous, sleep_s=0.04),
        }
    )
    assert found["best"] == {
        "ours": "ours channels_last",
        "timm": "timm channels_last",
        "torchvision": "torchvision contiguous",
    }
    assert found["best_ratio"]["timm"]["low"] > 1.5
    assert found["best_ratio"]["torchvision"]["low"] > 1.5
    assert found["systems"]["ours channels_last"]["times_base"]["low"] > 1.5
    row = found["systems"]["timm channels_last"]
    assert row["times_same"]["ratio"] == 1.0  # torchvision has no such setting: itself
    assert list(row["ms"]) == ["zero_grad", "forward", "loss", "backward", "optimizer"]
    assert row["step_images_per_s"]["median"] <= row["images_per_s"]["median"]
    floor_bytes = 4 * (3 * 1000 + 8 * 500)
    share = row["step_images_per_s"]["median"] * floor_bytes / 10e9
    assert row["floor"]["B"] == pytest.approx(share, abs=1e-4)
    text = "\n".join(systems_table(found))
    assert "Best of timm: channels_last" in text


def test_what_fails_while_it_is_measured_leaves_the_others():
    calls = []

    def step(mark):
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("no room any more")
        mark("forward")
        return torch.zeros(())

    dying = System("torchvision", Setting(CPU), step, None, None)
    found = measured(
        {
            "torchvision contiguous": dying,
            "ours channels_last": tiny_system("ours", EAGER, sleep_s=0.001),
        }
    )
    assert found["failed"] == {"torchvision contiguous": "no room any more"}
    assert list(found["systems"]) == ["ours channels_last"]
    assert found["base"] == "ours channels_last"
    assert "not measured: torchvision contiguous: no room" in "\n".join(systems_table(found))
    with pytest.raises(RuntimeError, match="no system could be measured"):
        measured({})


def test_the_nearest_setting_of_torchvision_is_compared():
    names = ["torchvision contiguous", "torchvision channels_last"]
    graph = System("ours", replace(EAGER, compile="default", graph=True), None, None, None)
    assert matrix.same_as(graph, names) == "torchvision channels_last"
    assert matrix.same_as(graph, [*names, "torchvision channels_last compiled"]).endswith("led")
    other = System("timm", replace(EAGER, amp="fp16"), None, None, None)
    assert matrix.same_as(other, names) == "timm channels_last fp16"
    assert matrix.choose_base(["ours a", "torchvision b"], "torchvision c") == "torchvision b"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_step_in_half_precision_moves_the_weights(amp):
    setting = replace(EAGER, amp=amp)
    system = classifier("ours", "small", setting, batch=2)
    assert (system.scaler is not None) == (amp == "fp16")
    groups = system.optimizer.param_groups
    assert groups[0]["fused"] is (amp != "fp16")  # as training has it
    before = groups[0]["params"][0].detach().clone()
    stages = []
    if system.scaler is not None:  # the first scale is too large for a few steps
        system.scaler._init_scale = 128.0
    loss = system.whole_step(stages.append)
    assert loss.isfinite()
    assert stages == ["zero_grad", "forward", "loss", "backward", "optimizer"]
    assert not torch.equal(groups[0]["params"][0], before)
    assert setting.title("ours") == f"ours, channels_last, {amp}"


def test_folded_inference_gives_the_models_logits():
    ours = inference_system("ours", "small", EAGER, batch=2)
    theirs = inference_system("torchvision", "small", EAGER, batch=2)
    assert ours.optimizer is None
    marks = []
    logits = ours.whole_step(marks.append)
    assert marks == ["forward"]
    assert logits.shape == theirs.whole_step(marks.append).shape == (2, 1000)
    assert not logits.requires_grad
    half = inference_system("ours", "small", replace(EAGER, amp="bf16"), batch=2)
    assert half.whole_step(marks.append).dtype == torch.bfloat16
    # As a whole: single logits near zero are all rounding, and how much depends on the processor.
    error = torch.linalg.vector_norm(half.step(marks.append).float() - logits)
    assert error < 0.05 * torch.linalg.vector_norm(logits)


def compiled_as(backend, monkeypatch):
    """Compile with another backend, but whole as benchmark and training do."""
    compiler = torch.compile

    def replaced(function, *, dynamic, fullgraph, mode):
        assert not dynamic and fullgraph and mode == "default"
        return compiler(function, dynamic=dynamic, fullgraph=fullgraph, backend=backend)

    monkeypatch.setattr(torch, "compile", replaced)
    matrix.allow_many_graphs()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_the_detector_and_its_loss_compile_whole(monkeypatch):
    plain = our_detector(EAGER, batch=2, num_classes=3).step(matrix.no_mark)
    compiled_as("eager", monkeypatch)
    setting = replace(EAGER, compile="default")
    whole = our_detector(setting, batch=2, num_classes=3).step(matrix.no_mark)
    torch._dynamo.reset()
    assert whole.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.slow
def test_a_classifier_compiles_whole_with_its_backward(monkeypatch):
    """Large's layers are in the detector's test."""
    compiled_as("aot_eager", monkeypatch)
    system = classifier("ours", "small", replace(EAGER, compile="default"), batch=2)
    assert system.step(matrix.no_mark).isfinite()
    torch._dynamo.reset()
    assert all(p.grad is not None for g in system.optimizer.param_groups for p in g["params"])


def test_quick_run_compares_systems_that_do_the_same_work(capsys, tmp_path):
    saved = tmp_path / "out.json"
    words = ["--quick", "--rounds", "1", "--channels-last", "--device", "cpu"]
    words += ["--json", str(saved)]
    markdown = ["--markdown", str(tmp_path / "out.md"), "--trace", str(tmp_path / "t.json.gz")]
    assert train_step.main([*words, *markdown, "--parts", "detectors,counts"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["sections"]) == ["detectors", "counts", "roofline"]
    detectors, counts = report["sections"]["detectors"], report["sections"]["counts"]
    assert list(detectors["systems"]) == ["ours channels_last", "torchvision channels_last"]
    ours, theirs = detectors["first_losses"].values()
    assert ours == pytest.approx(theirs, rel=1e-4)
    stages = ["zero_grad", "input", "forward", "loss", "backward", "optimizer"]
    for row in detectors["systems"].values():
        assert list(row["ms"]) == stages
        assert 0 < row["floor"]["A"] < row["floor"]["B"] < row["floor"]["C"]
        assert row["first_call_s"] > 0
    assert detectors["best"]["torchvision"] == "torchvision channels_last"
    assert detectors["clocks"] == {"before": None, "load": None, "after": None}
    assert (tmp_path / detectors["trace"]["file"]).stat().st_size > 1000
    assert sum(row["share"] for row in detectors["trace"]["kernels"]) == pytest.approx(1, abs=0.02)
    for what in ("loss", "step"):
        ours, theirs = (counts["systems"][name][what] for name in ("ours", "torchvision"))
        assert ours["waits"] == 0 < theirs["waits"]
        assert ours["ops"] < theirs["ops"]
    text = (tmp_path / "out.md").read_text()
    assert "| ours, channels_last |" in text and "| convolution" not in text
    assert "One step of ours channels_last (t-detectors.json.gz)" in text

    # A second part is added to the first, and the roofline has the points of both.
    assert train_step.main([*words, "--add", "--parts", "inference"]) == 0
    both = json.loads(saved.read_text())["sections"]
    assert set(both) == {"detectors", "counts", "inference small", "roofline"}
    found = {(point["model"], point["what"]) for point in both["roofline"]["points"]}
    assert found == {("detector large", "training"), ("classifier small", "inference")}
    assert set(both["roofline"]["floors"]) == {"detector large", "classifier small"}
    assert both["inference small"]["systems"]["ours channels_last"]["floor"]["inference"] > 0


def test_a_section_that_fails_does_not_take_the_others_with_it(monkeypatch, capsys, tmp_path):
    def broken(args):
        raise RuntimeError("the systems' losses differ")

    saved = tmp_path / "out.json"
    counted = {"batch": 2, "systems": {}}
    sections = {"detectors": broken, "counts": lambda args: counted}
    monkeypatch.setattr(train_step, "sections_of", lambda args: sections)
    assert train_step.main(["--quick", "--device", "cpu", "--json", str(saved)]) == 2
    assert "detectors: RuntimeError: the systems' losses differ" in capsys.readouterr().err
    assert list(json.loads(saved.read_text())["sections"]) == ["counts"]


def test_losses_that_differ_stop_the_benchmark():
    systems = {name: tiny_system("ours", EAGER) for name in "ab"}
    train_step.check_losses({"a": 10.0, "b": 10.0005}, systems)
    for wrong in (10.1, float("nan")):
        with pytest.raises(RuntimeError, match="losses differ"):
            train_step.check_losses({"a": 10.0, "b": wrong}, systems)
