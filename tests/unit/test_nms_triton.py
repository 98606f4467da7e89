"""The post-process kernels without a GPU: in Triton's interpreter, and compiled for Hopper."""

import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from hypothesis import assume, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parent.parent
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.slow
def test_kernels_choose_what_torchvision_chooses():
    numpy_version = tuple(int(part) for part in np.__version__.split(".")[:2])
    if VERSION < (3, 9) and numpy_version >= (2, 4):
        pytest.skip("this Triton's interpreter does not know this NumPy")
    done = subprocess.run(
        [sys.executable, str(TESTS / "nms_on_cpu.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["pictures"] >= 36
    assert found["detections"] > 150
    assert min(found["apart"], found["unmoved"]) > 4  # both of torchvision's ways
    assert found["scores"] < 1e-6  # relative
    assert found["boxes"] < 1e-3


# The comparison with the threshold, which is two fused operations instead of a division.


def rounded(value: Fraction) -> np.float32:
    """The nearest float32, of two that are as near the even one."""
    start = np.float32(float(value))  # at most one step off
    steps = [np.nextafter(start, np.float32(end)) for end in (-np.inf, np.inf)]
    near = sorted((start, *steps), key=lambda x: (abs(Fraction(float(x)) - value), is_odd(x)))
    return near[0]


def is_odd(value: np.float32) -> bool:
    return bool(value.view(np.int32) & 1)


def fused(a: np.float32, b: np.float32, c: np.float32) -> np.float32:
    return rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


@given(
    threshold=st.one_of(
        st.just(0.55), st.just(0.5), st.just(0.0), st.floats(2.0**-10, 1, width=32)
    ),
    union=st.floats(2.0**-40, 2.0**40, width=32),
    steps=st.integers(-3, 3),
    share=st.one_of(st.none(), st.floats(0, 1, width=32)),
)
@settings(deadline=None, max_examples=200)
def test_two_fused_operations_decide_as_the_quotient(threshold, union, steps, share):
    from mbv3dist.ops.nms_triton import split_threshold

    low, half_step = (np.float32(x) for x in split_threshold(threshold))
    union = np.float32(union)
    # At the threshold and a few steps from it, or anywhere.
    both = union * (low if share is None else np.float32(share))
    for _ in range(abs(steps)):
        both = np.nextafter(both, np.float32(0 if steps < 0 else np.inf))
    assume(both == 0 or both / union > 0)  # not 1e-45 of a pixel
    inner = fused(union, -low, both)
    assert (fused(union, -half_step, inner) > 0) == (both / union > low)


def kernels() -> list:
    """Every kernel with the types of its arguments, its constants and warps."""
    from mbv3dist.ops import nms_kernels, nms_triton

    floats = ("score_threshold", "height", "width", "to_x", "to_y", "to_width", "to_height")
    score = dict.fromkeys(("logits", "deltas", "anchors", "boxes"), "*fp32")
    score |= {"keys": "*i32", "facts": "*i32", "num_anchors": "i32", "num_columns": "i32"}
    score |= dict.fromkeys(floats, "fp32")
    lists = dict.fromkeys(("list_keys", "list_places", "count"), "*i32")
    select = lists | {"keys": "*i32", "length": "i32", "limit": "i32"}
    sort = lists | dict.fromkeys(("boxes", "out_boxes"), "*fp32")
    sort |= dict.fromkeys(("length", "limit", "rows_per_picture", "per_class"), "i32")
    first = dict.fromkeys(("out_scores", "labels", "out_count"), "*i32")
    last = {"out_scores": "*fp32", "labels": "*i64", "out_count": "*i64"}
    suppress = dict.fromkeys(("keys", "count", "facts", "kept_keys"), "*i32")
    suppress |= {"boxes": "*fp32", "kept_boxes": "*fp32", "threshold": "fp32", "half_step": "fp32"}
    suppress |= dict.fromkeys(("num_classes", "limit", "max_detections", "moved_apart"), "i32")
    short = (nms_triton.BLOCK, nms_triton.SELECT_WARPS)
    long = (nms_triton.LONG_BLOCK, nms_triton.LONG_SELECT_WARPS)
    tile = {"IS_DEVICE": True, "TILE": nms_triton.TILE}
    return [
        (nms_kernels.score_and_decode, score, tile, nms_triton.SCORE_WARPS),
        *((nms_kernels.select_top, select, {"BLOCK": block}, n) for block, n in (short, long)),
        (nms_kernels.sort_top, sort | first, {"IS_LAST": False}, 1),
        (nms_kernels.sort_top, sort | last, {"IS_LAST": True}, 1),
        (nms_kernels.suppress, suppress, {"FUSED": True, "STEP": nms_triton.STEP}, 1),
    ]


def test_kernels_compile_for_hopper_without_spilling(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    registers = {}
    for kernel, types, constants, num_warps in kernels():
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel,
            {name: signature[name] for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "--dump-resource-usage", binary], text=True)
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        assert found["STACK"] == found["LOCAL"] == "0", usage
        registers[f"{kernel.__name__} {constants}"] = int(found["REG"])
        rounding = set(re.findall(r"\b(?:div|rcp)\.[a-z.]*f32", compiled.asm["ptx"]))
        assert rounding <= {"div.rn.f32"}  # torch's, not the fast one
    print("registers", registers)
    assert max(registers.values()) <= 128
