"""`data.decode: auto`, on rates that were made up."""

import pytest

from mbv3dist.data.decode_choice import GAIN, choose_decode, decide, measure_rate


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"cpu": 1000}, "cpu"),
        ({"cpu": 1000, "hybrid": 1050, "gpu": 1200}, "cpu"),  # too little gained
        ({"cpu": 1000, "hybrid": 1150, "gpu": 1200}, "hybrid"),
        ({"cpu": 1000, "hybrid": 900, "gpu": 1300}, "gpu"),
        ({"cpu": 1000, "hybrid": 1300, "gpu": 1400}, "hybrid"),  # as fast, and more exact
        ({"cpu": 1000, "hybrid": 1300, "gpu": 1500}, "gpu"),
        ({"cpu": 1000, "gpu": 200}, "cpu"),
    ],
)
def test_choice(rates, expected):
    choice = decide(rates)
    assert choice.decode == expected
    assert choice.reason.startswith(f"decode: {expected}, measured")
    assert all(f"{name} {rate}" in choice.reason for name, rate in rates.items())


def test_more_work_on_the_device_must_gain_more():
    assert 1 == GAIN["cpu"] < GAIN["hybrid"] < GAIN["gpu"]
    for name in ("hybrid", "gpu"):
        just = 1000 * GAIN[name]
        assert decide({"cpu": 1000, name: just + 1}).decode == name
        assert decide({"cpu": 1000, name: just - 1}).decode == "cpu"


def test_nothing_is_measured_off_cuda():
    def fail():
        raise AssertionError("measured")

    choice = choose_decode("cpu", {"cpu": fail, "hybrid": fail, "gpu": fail})
    assert (choice.decode, choice.reason) == ("cpu", "decode: cpu, since the device is cpu")


class Clock:
    """A clock that moves on by what work takes."""

    def __init__(self):
        self.now = 0.0

    def read(self) -> float:
        """Seconds."""
        return self.now

    def work(self, seconds: float, pictures: int):
        """What takes so long for so many pictures."""

        def run() -> int:
            self.now += seconds
            return pictures

        return run


def test_ways_are_measured_and_what_does_not_open_is_named():
    clock = Clock()

    def no_gpu():
        raise ValueError("nvJPEG is missing")

    ways = {
        "cpu": lambda: clock.work(0.1, 100),
        "hybrid": lambda: clock.work(0.05, 100),
        "gpu": no_gpu,
    }
    choice = choose_decode("cuda", ways, clock=clock.read)
    assert choice.decode == "hybrid"
    assert "cpu 1000, hybrid 2000" in choice.reason
    assert choice.reason.endswith("gpu not possible (nvJPEG is missing)")
    assert "\n" not in choice.reason
    assert clock.now < 1.5  # half a second each, and what was under way


def test_the_first_call_does_not_count():
    clock = Clock()
    calls = iter([10.0, 0.2, 0.2, 0.2, 0.2])
    rate = measure_rate(lambda: clock.work(next(calls), 50)(), seconds=0.5, clock=clock.read)
    assert rate == pytest.approx(250)


def test_a_way_that_fails_while_it_is_measured_is_named_and_not_taken():
    clock = Clock()

    def fails() -> int:
        raise RuntimeError("nvjpegDecode failed:\n  status 8")

    ways = {"cpu": lambda: clock.work(0.1, 100), "gpu": lambda: fails}
    choice = choose_decode("cuda", ways, clock=clock.read)
    assert choice.decode == "cpu"
    assert choice.reason.endswith("gpu not possible (nvjpegDecode failed: status 8)")
    with pytest.raises(RuntimeError, match="nvjpegDecode failed"):
        choose_decode("cuda", {"cpu": lambda: fails}, clock=clock.read)
