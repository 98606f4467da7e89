"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for Hopper."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parent.parent
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


@pytest.mark.slow
def test_kernels_equal_the_references_in_the_interpreter():
    numpy_version = tuple(int(part) for part in np.__version__.split(".")[:2])
    if VERSION < (3, 9) and numpy_version >= (2, 4):
        pytest.skip("this Triton's interpreter does not know this NumPy")
    script = [sys.executable, str(TESTS / "triton_on_cpu.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The interpreter of older versions rounds `fma` twice, and so does torch at the end of a row on
    # some processors: a level here or there, two after a contrast.
    assert found["colors"]["worst"] < 2.01
    assert found["colors"]["different"] < (0.001 if VERSION >= (3, 9) else 0.01)
    assert found["crops"]["worst"] <= 1
    assert found["crops"]["mean"] <= 0.3
    assert found["crops"]["different"] < 0.005  # from the reference: where a sum ends at a half
    # A level more or less, and bfloat16's own steps of 1/64 at 2.5.
    assert found["crops"]["normalized"] < 1 / 255 / 0.224 + 1 / 64


def kernels() -> list:
    """Every kernel with the types of its arguments and its constants."""
    from mbv3dist.ops import color_triton, resample_triton

    pictures = {"images": "*u8", "color": "*fp32", "sums": "*i32"}
    colors = {name: "fp32" for part in ("scale", "shift") for name in _channels(part)}
    block = {"WITH_HUE": True, "BLOCK": color_triton.BLOCK}
    distort = {**pictures, "out": "*fp32", "num_pixels": "i32", "num_blocks": "i32", **colors}
    tile = {"pixels": "*u8", "layout": "*i64", "places": "*fp32", "out": "*bf16"}
    tile |= dict.fromkeys(("canvas_height", "canvas_width", "tiles_x"), "i32")
    tile |= dict.fromkeys(_channels("fill"), "fp32") | colors
    sides = {name: getattr(resample_triton, name) for name in ("TILE_Y", "TILE_X", "ROWS")}
    return [
        (color_triton.sum_gray, {**pictures, "num_pixels": "i32"}, block, False),
        (
            color_triton.distort_and_normalize,
            distort,
            {**block, "WITH_COLOR": True, "SUMS": 128},
            False,
        ),
        (resample_triton.draw_tile, tile, {**sides, "IS_LEVELS": False}, True),
    ]


def _channels(part: str) -> list[str]:
    return [f"{color}_{part}" for color in ("red", "green", "blue")]


def test_kernels_compile_for_hopper_without_spilling(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, types, constants, fuse in kernels():
        signature = types | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            kernel,
            {name: signature[name] for name in kernel.arg_names},
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        )
        options = {"num_warps": 4, "enable_fp_fusion": fuse}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.check_output([tool, "--dump-resource-usage", binary], text=True)
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        assert int(found["REG"]) <= 128, usage  # four programs of four warps on a multiprocessor
        assert found["STACK"] == found["LOCAL"] == "0", usage
