"""Random numbers that are the same on every machine, thread count and numpy release.

Everything random in the data path is a function of a key: (seed, purpose, epoch, two numbers).
The key is laid into the key and counter words of Philox4x64-10 (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011), and only the raw 64-bit words are used, because numpy
promises those for ever, but not the results of its distributions and shuffles.
"""

from __future__ import annotations

import threading

import numpy as np

# What a stream of words is for. A number, once released, is never given another meaning.
SHARD_ORDER = 1
WITHIN_SHARD = 2
WITHIN_BLOCK = 3
VIEW = 4
COLOR = 5

MAX_SEED = 2**64 - 1
_FLOATS_PER_REFILL = 16
_thread = threading.local()
_EMPTY_BUFFER = np.zeros(4, dtype=np.uint64)


def raw_words(
    count: int, *, seed: int, purpose: int, epoch: int, major: int = 0, minor: int = 0
) -> np.ndarray:
    """Return the first `count` raw words (uint64 [count]) of the stream with this key.

    Streams of different keys never overlap: the lowest counter word counts within a stream, the
    other three and the key words hold the key.
    """
    # Setting the state of one generator per thread costs 4 us; building a generator costs 17 us.
    generator: np.random.Philox | None = getattr(_thread, "philox", None)
    if generator is None:
        generator = _thread.philox = np.random.Philox(key=0)
    generator.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array((0, minor, major, epoch), dtype=np.uint64),
            "key": np.array((seed, purpose), dtype=np.uint64),
        },
        "buffer": _EMPTY_BUFFER,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return generator.random_raw(count)


def permutation(
    count: int, *, seed: int, purpose: int, epoch: int, major: int = 0, minor: int = 0
) -> np.ndarray:
    """Return a uniformly random permutation (int64 [count]) for this key."""
    words = raw_words(count, seed=seed, purpose=purpose, epoch=epoch, major=major, minor=minor)
    return np.argsort(words, kind="stable")


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` fits the generator's key."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}; choose another --seed")


class Draws:
    """The random numbers of one sample in one epoch, in the order they are asked for.

    The result depends on (seed, purpose, epoch, sample) alone, so views are the same on every
    thread, rank and world size.
    """

    def __init__(self, seed: int, *, epoch: int, sample: int, purpose: int = VIEW):
        self._key = {"seed": seed, "purpose": purpose, "epoch": epoch, "major": sample}
        self._refills = 0
        self._floats: list[float] = []

    def uniforms(self, count: int) -> np.ndarray:
        """Return `count` doubles in [0, 1), float64 [count], from a stream part of their own."""
        # Every request takes its own part of the key space (`minor`), so nothing is counted twice.
        words = raw_words(count, minor=self._refills, **self._key)
        self._refills += 1
        return (words >> np.uint64(11)) * 2.0**-53

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a double in [low, high)."""
        if not self._floats:
            # Reversed, because a list gives its last element away fastest.
            self._floats = self.uniforms(_FLOATS_PER_REFILL).tolist()[::-1]
        return low + (high - low) * self._floats.pop()

    def integer(self, count: int) -> int:
        """Return an integer in [0, count)."""
        # The product can round up to `count` only for counts beyond 2**52.
        return min(int(self.uniform() * count), count - 1)
