"""In which ways the benchmark of training steps runs each system, and what becomes of failures."""

import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import roofline
import train_step
from steps import matrix, measure
from steps.report import systems_table
from steps.systems import Setting, System

CPU = torch.device("cpu")
EAGER = Setting(CPU, channels_last=True)


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
        "channels_last fp16",
        "channels_last bf16 compiled",
        "channels_last bf16 graph",
        "channels_last bf16 compiled graph",
        "channels_last fp16 compiled",
        "channels_last bf16 compiled reduce-overhead",
        "channels_last bf16 compiled max-autotune-no-cudagraphs",
        "channels_last bf16 compiled max-autotune-no-cudagraphs graph",
    ]


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
        makes = {"ours": stubborn, "timm": lambda setting: tiny_system("timm", setting)}
        built = matrix.build_all(makes, [EAGER], limit_s=0.05)
    finally:
        matrix.RING_AGAIN_S = again
    assert time.perf_counter() - started < 30  # imports of torch's compiler among them
    assert built.failed == {
        "ours channels_last": "TimeoutError: not ready within 0.05 s",
        "timm channels_last": "left out: ours was not ready in time",
    }
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


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ((10.0, 10.0005), "ab"),
        ((10.0, 10.1), ""),  # nobody knows which is right
        ((10.0, 10.1, 10.0005), "ac"),
        ((10.0, float("nan"), 10.0), "ac"),
        ((float("nan"), float("inf")), ""),
    ],
)
def test_systems_with_another_loss_are_not_measured(losses, left):
    names = list("abc"[: len(losses)])
    built = matrix.Built({name: tiny_system("ours", EAGER) for name in names})
    built.first_losses = dict(zip(names, losses, strict=True))
    train_step.drop_deviating(built)
    assert "".join(built.systems) == left
    assert sorted([*built.systems, *built.failed]) == names
    assert all("its first loss is" in why for why in built.failed.values())
