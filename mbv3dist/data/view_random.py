"""Philox's random numbers for compiled code: those of draws.py, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mbv3dist.data.compiled import compiled
from mbv3dist.data.draws import FLOATS_PER_REFILL


@intrinsic
def _high_word(_context: Any, left: Any, right: Any) -> Any:
    """Return the upper 64 bits of the product of two uint64."""
    signature = types.uint64(types.uint64, types.uint64)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(builder.zext(values[0], wide), builder.zext(values[1], wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), ir.IntType(64))

    return signature, generate


@compiled
def philox_block(
    number: np.uint64,
    minor: np.uint64,
    major: np.uint64,
    epoch: np.uint64,
    seed: np.uint64,
    purpose: np.uint64,
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Return four words of Philox4x64-10: those of `draws.raw_words` from 4 * number on."""
    c0, c1, c2, c3 = number + np.uint64(1), minor, major, epoch
    k0, k1 = seed, purpose
    for _ in range(10):
        high0 = _high_word(np.uint64(0xD2E7470EE14C6C93), c0)
        low0 = np.uint64(0xD2E7470EE14C6C93) * c0
        high1 = _high_word(np.uint64(0xCA5A826395121157), c2)
        low1 = np.uint64(0xCA5A826395121157) * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    return c0, c1, c2, c3


@compiled
def fill(stream: np.ndarray, out: np.ndarray) -> None:
    """Write the next stream part's doubles in [0, 1), as `Draws.uniforms`.

    `stream` is uint64 [5]: seed, purpose, epoch, sample, parts used so far.
    """
    for start in range(0, len(out), 4):
        words = philox_block(
            np.uint64(start // 4), stream[4], stream[3], stream[2], stream[0], stream[1]
        )
        for place in range(min(4, len(out) - start)):
            out[start + place] = np.float64(words[place] >> np.uint64(11)) * 2.0**-53
    stream[4] += np.uint64(1)


@compiled
def uniform(stream: np.ndarray, ready: np.ndarray, used: np.ndarray) -> float:
    """Return the next double in [0, 1), as `Draws.uniform`."""
    if used[0] == FLOATS_PER_REFILL:
        fill(stream, ready)
        used[0] = 0
    value = ready[used[0]]
    used[0] += 1
    return float(value)


@compiled
def integer(stream: np.ndarray, ready: np.ndarray, used: np.ndarray, count: int) -> int:
    """Return the next whole number below count, as `Draws.integer`."""
    return min(int(uniform(stream, ready, used) * count), count - 1)
