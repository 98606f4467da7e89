"""Who waited for data and how long: by a fake device's clock, with a slow loader, over ranks."""

import json
import time
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from mbv3dist.recipe import load_config
from mbv3dist.training import run as training
from mbv3dist.training.meter import DataWait, Meter
from mbv3dist.training.tracking import format_numbers


class FakeGpu:
    """A device that does what it is given in order, and the host's clock; times in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free_at = 0.0

    def give(self, seconds: float) -> None:
        """Work, or a copy: it starts when the device is free."""
        self.free_at = max(self.free_at, self.now) + seconds

    def make_event(self) -> "FakeEvent":
        """As the meter makes events."""
        return FakeEvent(self)


class FakeEvent:
    """A mark in the fake device's stream."""

    num_made = 0

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        FakeEvent.num_made += 1

    def record(self) -> None:
        """As `Event.record`."""
        self.happens_at = max(self.gpu.free_at, self.gpu.now)

    def query(self) -> bool:
        """As `Event.query`."""
        return self.gpu.now >= self.happens_at

    def elapsed_time(self, end: "FakeEvent") -> float:
        """As `Event.elapsed_time`."""
        assert self.query()
        assert end.query()
        return 1000 * (end.happens_at - self.happens_at)


def follow(steps: list[tuple[float, float, float, float]]) -> tuple[FakeGpu, DataWait]:
    """Steps of (wait of the host, copy, launching, work of the device) up to the last one's end."""
    gpu = FakeGpu()
    wait = DataWait(gpu.make_event, clock=lambda: gpu.now)
    for waited, copied, launched, worked in steps:
        wait.ask()
        gpu.now += waited
        gpu.give(copied)
        wait.begin()
        gpu.now += launched
        gpu.give(worked)
    gpu.now = max(gpu.now, gpu.free_at)  # as a reading waits for the device
    return gpu, wait


some_time = st.floats(0, 3)


@given(st.lists(st.tuples(some_time, some_time, st.just(0.0), some_time), min_size=1, max_size=40))
def test_a_device_works_or_waits_for_data(steps):
    gpu, wait = follow(steps)
    # With launches that take no time, all of the device's time is one or the other.
    assert wait.device_s() + sum(step[3] for step in steps) == pytest.approx(gpu.now)
    assert wait.host_s == pytest.approx(sum(step[0] for step in steps))
    assert wait.host_max_s == pytest.approx(max(step[0] for step in steps))
    assert wait.steps == len(steps)


def test_a_host_that_runs_ahead_waits_while_the_device_works():
    _, wait = follow([(0.5, 0.0, 0.0, 1.0)] * 10)
    assert wait.host_s == pytest.approx(5)
    assert wait.device_s() == pytest.approx(0.5)  # only for the first batch


def test_slow_launches_are_no_wait_for_data():
    gpu, wait = follow([(0.1, 0.0, 3.0, 1.0)] * 10)
    assert wait.device_s() == pytest.approx(0.1)  # the first batch; then it has work meanwhile
    assert gpu.now > 30  # though the device idles for most of that


def test_a_copy_that_nothing_hides_is_a_wait_of_the_device():
    _, wait = follow([(0.0, 0.25, 0.0, 1.0)] * 4)
    assert wait.host_s == 0
    assert wait.device_s() == pytest.approx(1.0)


def test_what_lies_between_a_step_and_asking_for_the_next_batch_is_no_wait():
    gpu = FakeGpu()
    wait = DataWait(gpu.make_event, clock=lambda: gpu.now)
    for _ in range(5):
        wait.ask()
        gpu.now += 0.5
        wait.begin()
        gpu.give(1.0)
        gpu.now += 20  # a checkpoint is written
    assert wait.device_s() == pytest.approx(2.5)
    wait.restart()
    assert (wait.steps, wait.host_s, wait.host_max_s, wait.device_s()) == (0, 0, 0, 0)


def test_events_are_used_again():
    before = FakeEvent.num_made
    follow([(0.5, 0.1, 0.1, 0.2)] * 1000)
    assert FakeEvent.num_made - before < 10


def test_on_a_cpu_the_host_is_the_device():
    wait = DataWait()
    wait.ask()
    time.sleep(0.02)
    wait.begin()
    assert wait.device_s() == wait.host_s >= 0.02


def test_meter_averages_over_steps_and_micro_batches():
    meter = Meter(torch.device("cpu"))
    for step in range(3):
        meter.ask()
        meter.begin()
        for _ in range(2):  # micro-batches: their sums add up to the step's
            loss = {"loss_a": torch.tensor(1.0 + step), "loss_b": torch.tensor(2.0)}
            meter.add(loss, torch.tensor(4.0))
        meter.step(8)
    values = meter.read()
    assert values["loss_a"] == pytest.approx(1.0)
    assert values["loss_b"] == pytest.approx(1.0)
    assert values["loss"] == pytest.approx(2.0)
    assert values["data_wait"] < 0.5
    meter.add({"loss_a": torch.tensor(3.0), "loss_b": torch.tensor(0.0)}, torch.tensor(0.0))
    meter.step(8)
    assert meter.read()["loss"] == 3.0  # no positives: divided by 1, not by 0


def _rank(*, rank: int, world_size: int, folder: str) -> None:
    """Rank r waits r times 0.1 s in each of two steps, which take it 0.2 s at least."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    meter = Meter(torch.device("cpu"))
    for _ in range(2):
        meter.ask()
        time.sleep(0.1 * rank)
        meter.begin()
        meter.add({"loss_a": torch.tensor(1.0 + rank)}, torch.tensor(3.0))
        meter.step(4)
        time.sleep(0.2 - 0.1 * rank)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(meter.read(), file)
    torch.distributed.destroy_process_group()


def test_mean_and_slowest_over_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run_ranks(_rank, 2, folder=str(tmp_path))
    values = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    timed = "images_per_s"  # of each rank's own clock
    assert {**values[0], timed: 0} == {**values[1], timed: 0}
    first = values[0]
    assert first["loss"] == pytest.approx((1 + 2) / 3)
    assert first["data_wait_max"] == pytest.approx(2 * first["data_wait"], rel=0.1)
    assert 0.25 < first["data_wait_max"] <= 0.55
    assert first["device_wait"] == first["data_wait"]
    assert first["device_wait_max"] == first["data_wait_max"]
    assert 50 <= first["data_wait_ms"] < 100 <= first["data_wait_ms_max"]


WAITS = {
    "data_wait": 0.3,
    "data_wait_max": 0.3,
    "device_wait": 0.02,
    "device_wait_max": 0.02,
    "data_wait_ms": 4.1234,
    "data_wait_ms_max": 9.0,
}


def test_numbers_people_watch():
    on_cpu = {**WAITS, "device_wait": 0.3, "device_wait_max": 0.3}
    text = format_numbers({"loss": 1.5, "map": None, "images_per_s": 10.2, **on_cpu})
    assert text == "loss 1.5  10 img/s  waited for data 30 % (4.12 ms a step)"
    text = format_numbers({"images_per_s": 10.2, **WAITS})
    assert text == "10 img/s  device waited for data 2 %, host 30 % (4.12 ms a step)"
    text = format_numbers({"images_per_s": 10.2, **WAITS, "device_wait_max": 0.09})
    assert "device waited for data 2 % [a rank: 9 %], host 30 %" in text
    assert format_numbers({"map": 0.5}) == "map 0.5"


@pytest.mark.parametrize("pause_s", [0.0, 0.4])
def test_a_slow_loader_shows_in_the_run(
    pause_s, classification_recipe, tmp_path, monkeypatch, capsys
):
    class SlowLoader(training.Loader):
        def __iter__(self):
            for item in super().__iter__():
                time.sleep(pause_s)
                yield item

    # Beside a quick loader steps take their time; on a busy machine they do in any case.
    monkeypatch.setattr(training, "set_lr", lambda *_: time.sleep(0.0 if pause_s else 0.15))
    monkeypatch.setattr(training, "Loader", SlowLoader)
    flags = ["--out", str(tmp_path), "--tracking.log_every_steps", "3", "--data.val_split", ""]
    flags += ["--epochs", "2"]
    training.train(load_config(classification_recipe, flags))
    out = capsys.readouterr().out
    lines = (tmp_path / "tiny_classifier" / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[-1])
    assert record["device_wait"] == record["data_wait"]
    if pause_s:
        assert record["data_wait"] > 0.3
        assert 400 < record["data_wait_ms"] <= record["data_wait_ms_max"]
        assert out.count("hint: the device waited") == 1
        recipe = tmp_path / "tiny_classifier" / "config.yaml"
        assert f"mbv3dist doctor --recipe {recipe}" in out
    else:
        assert record["data_wait"] < 0.1
        assert "hint" not in out
