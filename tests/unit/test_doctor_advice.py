"""What bounds training and what to change, from made-up rates with each bound in turn."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbv3dist.tools.doctor_advice import (
    Findings,
    StepRate,
    advise,
    decode_rate,
    environment_advice,
    find_bound,
    limits,
    verdict,
)

GPU = Findings(
    device="cuda",
    ranks=1,
    cores=16,
    machine_cores=16,
    num_threads=16,
    decode={1: 1000.0, 2: 2000.0, 4: 4000.0, 8: 8000.0, 16: 15_000.0},
    steps=(StepRate(128, "bf16", 5000.0),),
    needs_side=256,
    picture_bytes=30_000.0,
    sample_bytes=32_000.0,
    height=256.0,
    width=340.0,
    data_bytes=40_000_000_000,
    input_size=224,
    disk_mb_per_s=2000.0,
    memory_bytes=100_000_000_000,
    crc_mb_per_s=2000.0,
    copy_mb_per_s=20_000.0,
)


def found(**changes) -> Findings:
    return dataclasses.replace(GPU, **changes)


def bound_of(findings: Findings) -> str:
    return find_bound(limits(findings))


def has(lines: list[str], *words: str) -> bool:
    return any(all(word in line for word in words) for line in lines)


def test_step():
    assert bound_of(GPU) == "step"
    assert "data comes at 15,000 images/s (3.0 times that)" in verdict(GPU)
    assert "does not wait" in verdict(GPU)
    assert advise(GPU) == []


def test_step_with_something_to_gain():
    slow = found(
        steps=(
            StepRate(64, "no", 2000.0),
            StepRate(64, "bf16", 3900.0),
            StepRate(128, "no", 2050.0),
        )
    )
    assert bound_of(slow) == "step"
    lines = advise(slow)
    assert has(lines, "--mixed_precision bf16", "2,000 images/s become 3,900")
    assert not has(lines, "batch")  # 2.5 % more is nothing
    larger = found(steps=(StepRate(64, "bf16", 2000.0), StepRate(128, "bf16", 2600.0)))
    assert has(advise(larger), "a batch of 128", "instead of 64", "--data.global_batch_size")


def test_too_few_threads():
    few = found(num_threads=2)
    assert bound_of(few) == "decode"
    assert "the device waits about 60 % of the time" in verdict(few)
    # Eight threads are enough; sixteen would bring nothing.
    assert advise(few) == ["set --data.num_threads 8 (now 2): 2,000 images/s become 8,000 images/s"]


def test_threads_are_shared_by_the_ranks():
    node = found(ranks=4, num_threads=2)
    assert limits(node)["decode"] == 8000
    assert limits(node)["step"] == 20_000
    lines = advise(node)
    assert has(lines, "--data.num_threads 4 (now 2)", "15,000")
    assert has(lines, "about 6 cores for each rank")


def test_decoding_that_threads_cannot_mend():
    large = found(
        decode={1: 100.0, 16: 1500.0},
        height=375.0,
        width=500.0,
        picture_bytes=110_000.0,
        sample_bytes=112_000.0,
    )
    assert bound_of(large) == "decode"
    lines = advise(large)
    assert has(lines, "--resize 256", "500 x 375 pixels, 110 KB", "2.1 times fewer")
    assert has(lines, "about 54 cores")
    assert not has(lines, "num_threads")
    assert not has(lines, "raw")
    allowed = dataclasses.replace(large, cores=4, machine_cores=64, decode={1: 100.0, 4: 390.0})
    assert has(advise(allowed), "4 of the machine's 64 cores", "about 52")
    boxes = dataclasses.replace(
        large, is_detection=True, needs_side=320, height=1000.0, width=2000.0, input_size=320
    )
    assert has(advise(boxes), "--max-side 640", "9.8 times fewer")
    assert not has(advise(dataclasses.replace(boxes, width=700.0, height=500.0)), "--max-side")


def test_small_pictures_can_be_stored_as_pixels():
    # 256 x 340 x 3 = 261 KB instead of 32: 326 GB, at 1.3 GB/s.
    small = found(decode={1: 100.0, 16: 1500.0})
    assert has(advise(small), "--format raw", "326 GB instead of 40", "1,306 MB/s", "the disk")
    slow_disk = dataclasses.replace(small, disk_mb_per_s=500.0)
    assert not has(advise(slow_disk), "raw")
    in_memory = dataclasses.replace(slow_disk, memory_bytes=1_000_000_000_000)
    assert has(advise(in_memory), "--format raw", "memory holds it")
    assert not has(advise(dataclasses.replace(small, is_raw=True)), "raw")


def test_other_ways_to_decode():
    ways = {"cpu": 1480.0, "hybrid": 1600.0, "gpu": 12_000.0}
    slow = found(decode={1: 100.0, 16: 1500.0}, ways=ways)
    lines = advise(slow)
    assert has(lines, "--data.decode gpu (now cpu)", "1,500 images/s become 12,000")
    assert not has(lines, "hybrid")  # 7 % are not worth it
    assert bound_of(dataclasses.replace(slow, decode_mode="gpu")) == "step"
    missing = dataclasses.replace(slow, has_decoder=False)
    assert has(advise(missing), "pip install nvidia-nvimgcodec-cu13 numba")
    # The ranks of a node have a GPU each, and its cores together.
    node = dataclasses.replace(slow, ranks=4, num_threads=16, decode_mode="hybrid")
    assert limits(node)["decode"] == pytest.approx(1600)


def test_a_gpu_that_decodes_slower_than_the_threads_could():
    small_gpu = found(decode_mode="gpu", ways={"cpu": 15_000.0, "gpu": 3000.0})
    assert bound_of(small_gpu) == "decode"
    line = "set --data.num_threads 8 and --data.decode cpu (now 16 and gpu)"
    assert has(advise(small_gpu), line, "3,000 images/s become 8,000")


def test_disk():
    slow = found(disk_mb_per_s=32.0, reads_every_epoch=True, file_system="nfs4")
    assert limits(slow)["disk"] == pytest.approx(1000)
    assert bound_of(slow) == "disk"
    assert "reading bounds training: it allows 1,000 images/s" in verdict(slow)
    lines = advise(slow)
    assert has(lines, "32 MB/s from nfs4 over the network", "local NVMe disk", "40.0 GB")
    assert has(lines, "a disk of 160 MB/s would no longer be the bound")
    raw = dataclasses.replace(slow, is_raw=True)
    assert has(advise(raw), "without --format raw")
    away = dataclasses.replace(slow, is_remote=True)
    assert has(advise(away), "--data.cache_gb")


def test_a_disk_that_only_the_first_epoch_waits_for():
    slow = found(disk_mb_per_s=32.0)
    assert bound_of(slow) == "step"
    assert has(advise(slow), "in the first epoch the disk allows 1,000 images/s", "memory has")
    unknown = found(disk_mb_per_s=None, reads_every_epoch=True)
    assert bound_of(unknown) == "step"  # no figure, no verdict
    assert advise(unknown) == []


def test_copy():
    slow = found(copy_mb_per_s=150.0)
    assert bound_of(slow) == "copy"
    assert "996 images/s" in verdict(slow)
    assert has(advise(slow), "150 MB/s", "PCIe")


def test_a_cpu_does_both():
    small = found(
        device="cpu",
        cores=2,
        machine_cores=2,
        num_threads=2,
        decode={1: 700.0, 2: 1300.0},
        steps=(StepRate(8, "no", 20.0),),
        copy_mb_per_s=None,
    )
    assert bound_of(small) == "step"
    assert "98 % of their work" in verdict(small)
    assert has(advise(small), "a GPU")
    decoding = dataclasses.replace(small, decode={1: 6.0, 2: 12.0})
    assert bound_of(decoding) == "decode"
    assert "62 % of their work" in verdict(decoding)


def test_more_threads_than_cores():
    assert has(advise(found(cores=8, num_threads=16)), "8 cores here: --data.num_threads 8")
    assert has(advise(found(ranks=4, num_threads=16)), "--data.num_threads 4 is enough")
    assert not has(advise(found(ranks=4, num_threads=4)), "is enough")


def test_checksums():
    often = found(verify="always", picture_bytes=200_000.0, crc_mb_per_s=1000.0)
    assert has(advise(often), "17 % of the threads' time", "--data.verify first")
    assert advise(found(verify="always", crc_mb_per_s=50_000.0)) == []


rate = st.floats(1, 1e6)


@given(
    st.builds(
        Findings,
        device=st.sampled_from(["cpu", "cuda"]),
        ranks=st.integers(1, 8),
        cores=st.integers(1, 64),
        machine_cores=st.integers(64, 128),
        num_threads=st.integers(1, 32),
        decode=st.dictionaries(st.integers(1, 64), rate, min_size=1),
        steps=st.lists(
            st.builds(StepRate, st.integers(2, 512), st.sampled_from(["no", "bf16"]), rate),
            min_size=1,
            max_size=3,
        ).map(tuple),
        needs_side=st.integers(32, 640),
        picture_bytes=rate,
        sample_bytes=rate,
        height=st.floats(1, 10_000),
        width=st.floats(1, 10_000),
        data_bytes=st.integers(1, 1 << 50),
        input_size=st.integers(32, 640),
        decode_mode=st.sampled_from(["cpu", "gpu", "hybrid"]),
        ways=st.dictionaries(st.sampled_from(["cpu", "gpu", "hybrid"]), rate),
        is_detection=st.booleans(),
        is_raw=st.booleans(),
        reads_every_epoch=st.booleans(),
        disk_mb_per_s=st.none() | rate,
        is_remote=st.booleans(),
        file_system=st.sampled_from([None, "ext4", "nfs4"]),
        memory_bytes=st.none() | st.integers(1, 1 << 50),
        crc_mb_per_s=rate,
        verify=st.sampled_from(["open", "first", "always"]),
        copy_mb_per_s=st.none() | rate,
        has_decoder=st.booleans(),
    )
)
def test_any_findings_give_whole_lines(findings):
    values = limits(findings)
    bound = find_bound(values)
    assert values[bound] == min(values.values())
    for line in [verdict(findings), *advise(findings)]:
        assert "\n" not in line
        assert "nan" not in line
        assert "None" not in line
    assert has(advise(findings), "cache_gb") <= findings.is_remote


@given(
    st.dictionaries(st.integers(1, 64), rate, min_size=1), st.integers(1, 100), st.integers(1, 100)
)
def test_rates_between_measured_ones(decode, some, others):
    low, high = min(decode.values()), max(decode.values())
    assert low * 0.999 <= decode_rate(decode, some) <= high * 1.001
    for count, measured in decode.items():
        assert decode_rate(decode, count) == pytest.approx(measured)
    rising = dict(zip(sorted(decode), sorted(decode.values()), strict=True))
    less, more = sorted((some, others))
    assert decode_rate(rising, less) <= decode_rate(rising, more) * 1.000001


ENVIRONMENT = {
    "gpu": {
        "usable": True,
        "reason": None,
        "devices": [{"name": "X", "memory_bytes": 80e9, "free_bytes": 79e9}],
    },
    "cores": {"usable": 16},
    "load_1min": 0.5,
    "open_files": 65_536,
    "shm_bytes": 10**10,
    "nccl": "2.30.7",
    "disk": {"free_bytes": 10**12},
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"gpu": {"usable": False, "reason": "no NVIDIA driver was found", "devices": []}}, ""),
        (
            {"gpu": {"usable": False, "reason": "the driver is there, but ...", "devices": []}},
            "CUDA build",
        ),
        (
            {
                "gpu": {
                    **ENVIRONMENT["gpu"],
                    "devices": [{"name": "X", "memory_bytes": 80e9, "free_bytes": 20e9}],
                }
            },
            "60.0 GB in use",
        ),
        ({"load_1min": 15.0}, "busy"),
        ({"open_files": 256}, "ulimit -n"),
        ({"open_files": None}, ""),
        ({"shm_bytes": 64 << 20}, "--shm-size"),
        ({"nccl": None}, "NCCL"),
        ({"disk": {"free_bytes": 10**9}}, "1.0 GB of disk"),
    ],
)
def test_environment(changes, words):
    lines = environment_advice({**ENVIRONMENT, **changes}, ranks=2)
    assert len(lines) == bool(words)
    assert all(words in line for line in lines)
