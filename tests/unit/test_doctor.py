"""`mbv3dist doctor` on small data: what it measures is there, and mistakes are one line."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import servers
import torch

from mbv3dist.cli import main
from mbv3dist.data.index import open_split
from mbv3dist.data.joined import open_splits
from mbv3dist.recipe import load_config
from mbv3dist.tools import doctor as tool
from mbv3dist.tools import doctor_data as data
from mbv3dist.tools import doctor_environment as env
from mbv3dist.tools.doctor_page import report_text
from mbv3dist.tools.doctor_setting import Pace
from mbv3dist.training.meter import Meter

HASTE = Pace(disk=0.05, decode=0.05, copy=0.05, step=0.05, together=0.05)


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch):
    monkeypatch.setattr(tool, "QUICK", HASTE)
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_measures_a_recipe(task, request, capfd):
    recipe = request.getfixturevalue(f"{task}_recipe")
    main(["doctor", "--recipe", str(recipe), "--quick", "--json", "--num-threads", "2"])
    result = json.loads(capfd.readouterr().out)
    assert set(result) == {
        "environment",
        "data",
        "settings",
        "rates",
        "bound",
        "verdict",
        "advice",
    }
    split = open_split(request.getfixturevalue(f"{task}_data"), "train")
    facts, settings, rates = result["data"], result["settings"], result["rates"]
    assert facts["samples"] == len(split)
    assert facts["bytes"] == sum(split.shard_bytes)
    assert not facts["is_raw"]
    size = (96, 64) if task == "detection" else (48, 40)
    assert (facts["width"], facts["height"]) == pytest.approx(size)
    assert 500 < facts["picture_bytes"] < facts["bytes"] / facts["samples"]
    assert settings["num_threads"] == 2
    assert settings["device"] == "cpu"
    assert settings["batch_size"] == 6  # the recipe's
    cores = result["environment"]["cores"]["usable"]
    assert set(rates["decode"]) >= {"1", str(cores)}
    assert min(rates["decode"].values()) > 0
    assert rates["disk"]["mb_per_s"] > 0
    assert rates["disk"]["sequential_mb_per_s"] > 0
    assert rates["crc_mb_per_s"] > 1
    assert rates["copy"] is None
    assert rates["step"][0]["images_per_s"] > 0
    assert 0 <= rates["together"]["device_wait"] <= 1
    assert rates["limits"][result["bound"]] == min(rates["limits"].values())
    assert result["verdict"]
    assert report_text(result).count("\n") >= 14


def test_without_a_data_set(monkeypatch, capfd):
    drawn = data.draw_data_set
    monkeypatch.setattr(
        "mbv3dist.tools.doctor_setting.draw_data_set", lambda out: drawn(out, count=6)
    )
    monkeypatch.setattr(data, "thread_counts", lambda cores, asked: [1])
    words = ["doctor", "--quick", "--architecture", "mobilenetv3_small", "--batch-size", "2"]
    main(words)
    page = capfd.readouterr().out
    assert "6 pictures drawn for this (500 x 375," in page
    assert "not measured without a data set" in page
    assert "mobilenetv3_small at 224" in page
    assert "bounds training" in page


def fails(capfd, *words: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *map(str, words)])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


def test_mistakes(detection_data, classification_recipe, tmp_path, capfd):
    assert "nowhere" in fails(capfd, tmp_path / "nowhere")
    assert "no finished split" in fails(capfd, tmp_path)
    line = fails(capfd, detection_data, "--split", "tset")
    assert "tset" in line
    assert "train, val" in line
    assert "no such recipe" in fails(capfd, "--recipe", tmp_path / "none.yaml")
    line = fails(capfd, detection_data, "--architecture", "mobilenetv3_small")
    assert "is a detection data set" in line
    assert "is a detection data set" in fails(
        capfd, detection_data, "--recipe", classification_recipe
    )
    line = fails(capfd, detection_data, "--architecture", "resnet50")
    assert "ssdlite_mobilenetv3_large" in line
    assert "--device tpu" in fails(capfd, detection_data, "--device", "tpu")


def test_split_is_chosen_or_asked_for(detection_data, tmp_path, capfd):
    other = tmp_path / "data"
    other.mkdir()
    for name in ("train", "val"):
        for path in detection_data.glob(f"{name}*"):
            target = name.replace("train", "fit") + path.name.removeprefix(name)
            (other / target).symlink_to(path)
    # Shards keep their names inside the description: choosing comes before opening.
    assert "fit, val: name one with --split" in fails(capfd, other)


def test_head_of_a_split(detection_data, voc_folder, tmp_path):
    from mbv3dist.convert.voc import convert_voc

    convert_voc([voc_folder], tmp_path / "data", split="train", workers=1, shard_bytes=12_000)
    split = open_split(tmp_path / "data", "train")
    assert len(split.shards) > 3
    head = data.head_split(split, int(split.shard_bytes[:3].sum()))
    assert len(head.shards) == 3
    assert len(head) == sum(split.shard_sizes[:3])
    assert [shard.path for shard in head.shards] == [s.path for s in split.shards[:3]]
    assert len(data.head_split(split, 1).shards) == 1
    assert len(data.head_split(split, 1 << 40)) == len(split)
    joined = open_splits([str(tmp_path / "data"), str(detection_data)], "train")
    assert len(data.head_split(joined, 1 << 40)) == len(split)


def test_disk_rates_and_the_page_cache(tmp_path):
    path = tmp_path / "shard.tar"
    path.write_bytes(np.random.default_rng(0).bytes(3_000_000))
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not written yet cannot be forgotten
    rates = data.measure_disk([path], piece_bytes=10_000, num_threads=3, seconds=0.2)
    assert rates["mb_per_s"] > 0
    assert rates["sequential_mb_per_s"] > 0
    for name in ("cached_share", "cached_share_before"):
        assert rates[name] is None or 0 <= rates[name] <= 1
    # A file below one piece, and an empty one.
    small = tmp_path / "small"
    small.write_bytes(b"x")
    assert data.measure_disk([small], piece_bytes=99, num_threads=1, seconds=0.1)["mb_per_s"] > 0
    (tmp_path / "empty").touch()
    empty = data.measure_disk([tmp_path / "empty"], piece_bytes=9, num_threads=1, seconds=0.1)
    assert empty["mb_per_s"] == 0


def test_reading_stops_in_time_and_uses_little_memory(tmp_path):
    path = tmp_path / "shard.tar"
    with open(path, "wb") as file:
        file.truncate(1 << 34)  # 16 GiB of nothing
    tracemalloc.start()
    rates = data.measure_disk([path], piece_bytes=1 << 20, num_threads=2, seconds=0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rates["mb_per_s"] > 0
    assert peak < 32 << 20


def test_numbers_of_threads():
    assert data.thread_counts(1, 2) == [1]
    assert data.thread_counts(2, 2) == [1, 2]
    assert data.thread_counts(6, 3) == [1, 2, 3, 4, 6]
    assert data.thread_counts(64, 100) == [1, 2, 4, 8, 16, 32, 64]


def test_batches_feed_all_threads():
    for threads in (1, 2, 16, 192):
        for rate in (0.1, 10.0, 1000.0, 1e6):
            size = data.batch_for(rate, num_threads=threads, largest=256)
            assert 4 * threads <= size <= max(256, 4 * threads)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quotas_of_control_groups(tmp_path):
    """The tightest of all groups around a process counts, in either version."""
    new, member = tmp_path / "new", tmp_path / "member"
    write(member, "0::/outer/inner\n")
    assert env.cpu_quota(new, member) is None
    write(new / "outer" / "inner" / "cpu.max", "max 100000\n")
    assert env.cpu_quota(new, member) is None
    write(new / "outer" / "cpu.max", "250000 100000\n")
    assert env.cpu_quota(new, member) == 2.5
    write(new / "outer" / "inner" / "cpu.max", "50000 100000\n")
    assert env.cpu_quota(new, member) == 0.5
    write(new / "outer" / "memory.max", "max\n")
    assert env.memory_limit(new, member) is None
    write(new / "outer" / "inner" / "memory.max", "1000000\n")
    assert env.memory_limit(new, member) == 1_000_000

    old = tmp_path / "old"
    write(member, "4:memory:/job\n1:cpu,cpuacct:/job\n")
    write(old / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(old / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(old / "memory" / "memory.limit_in_bytes", "9223372036854771712\n")
    assert env.cpu_quota(old, member) is None
    assert env.memory_limit(old, member) is None
    write(old / "cpu" / "job" / "cpu.cfs_quota_us", "300000\n")
    write(old / "cpu" / "job" / "cpu.cfs_period_us", "100000\n")
    write(old / "memory" / "job" / "memory.limit_in_bytes", "5000\n")
    assert env.cpu_quota(old, member) == 3
    assert env.memory_limit(old, member) == 5000
    write(old / "cpu" / "job" / "cpu.cfs_period_us", "rubbish\n")
    assert env.cpu_quota(old, member) is None


def test_environment_of_this_machine(tmp_path, monkeypatch):
    facts = json.loads(json.dumps(env.environment(tmp_path / "not" / "there")))
    assert 1 <= facts["cores"]["usable"] <= facts["cores"]["affinity"] <= facts["cores"]["machine"]
    assert facts["memory"]["available_bytes"] > 0
    assert facts["disk"]["free_bytes"] > 0
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert env.package_version("no-such-package-of-ours") is None
    assert facts["gpu"]["usable"] == bool(facts["gpu"]["devices"])
    assert facts["gpu"]["usable"] or facts["gpu"]["reason"]


def test_shards_behind_a_url(classification_data, tmp_path, monkeypatch, capfd):
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("MBV3DIST_CACHE", str(tmp_path / "cache"))
    recipe = tmp_path / "recipe.yaml"
    with servers.file_server(classification_data, tmp_path / "server") as (url, _):
        recipe.write_text(
            f"data: {{path: {url}, global_batch_size: 4, cache_dir: {tmp_path / 'mine'}}}\n"
            "model: {architecture: mobilenetv3_small, input_size: 32, width: 0.5}\n"
        )
        main(["doctor", "--recipe", str(recipe), "--quick"])
    page = capfd.readouterr().out
    assert "over the network, one connection" in page
    assert f"{url}, train: 21 pictures" in page
    assert list((tmp_path / "mine").rglob("*.tar"))
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_batch_that_does_not_fit_is_halved(
    classification_data, classification_recipe, monkeypatch
):
    from mbv3dist.tools import doctor_device

    def measure(step, batch, *, seconds):
        if len(batch) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 10.0 * len(batch)

    monkeypatch.setattr(doctor_device, "measure_step", measure)
    split = open_split(classification_data, "train")
    config = load_config(classification_recipe)
    device = torch.device("cpu")
    tries = [(16, "no"), (16, "bf16"), (4, "bf16")]
    steps, step = doctor_device.measure_steps(split, config, device, tries=tries, seconds=0.01)
    assert [(s["batch_size"], s["precision"], s["images_per_s"]) for s in steps] == [
        (4, "no", 40.0),
        (4, "bf16", 40.0),
    ]
    batch = doctor_device.resident_batch(split, config, device, batch_size=4)
    meter = Meter(device)
    step(batch, meter)
    assert meter.read()["loss"] > 0

    def never_fits(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(doctor_device, "measure_step", never_fits)
    with pytest.raises(ValueError, match="does not hold a step of two pictures"):
        doctor_device.measure_steps(split, config, device, tries=[(16, "no")], seconds=0.01)
