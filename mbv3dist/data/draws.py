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
FLOATS_PER_REFILL = 16
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
    count: int,
    *,
    seed: int,
    purpose: int,
    epoch: int,
    major: int = 0,
    minor: int = 0,
    part: range | None = None,
) -> np.ndarray:
    """Return a uniformly random permutation (int64 [count]) for this key, or a part of it."""
    words = raw_words(count, seed=seed, purpose=purpose, epoch=epoch, major=major, minor=minor)
    if part is None or len(part) > count // 8:
        order = stable_order(words)
        return order if part is None else order[part.start : part.stop]
    return _part_of_order(words, part.start, part.stop)


def stable_order(words: np.ndarray) -> np.ndarray:
    """Return what `np.argsort(words, kind="stable")` does for uint64 [n], five times faster.

    The position takes the place of each word's lowest bits, so that plain sorting, which NumPy
    does with vector instructions, sorts positions too. Words that differ in those bits only would
    come in the wrong order: that is looked for, and is rarer than once in a million calls.
    """
    count = len(words)
    low_bits = np.uint64(max(count - 1, 1).bit_length())
    mask = np.uint64((1 << int(low_bits)) - 1)
    packed = words & ~mask
    packed |= np.arange(count, dtype=np.uint64)
    packed.sort()
    order = (packed & mask).view(np.int64)
    packed >>= low_bits
    if (packed[1:] == packed[:-1]).any():
        return np.argsort(words, kind="stable")
    return order


def _part_of_order(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return what `stable_order(words)[start:stop]` does, without sorting them all.

    Uniform words of these ranks lie in a narrow window, 3.5 standard deviations to each side.
    Should some not, all are sorted.
    """
    count = len(words)
    margin = 1.75 * count**0.5
    low = int(max(start - margin, 0) / count * 2**64)
    high = min(int((stop + margin) / count * 2**64), 2**64 - 1)
    near = np.flatnonzero(words - np.uint64(low) <= np.uint64(high - low))
    skip = start - int(np.count_nonzero(words < np.uint64(low)))
    if not 0 <= skip <= len(near) - (stop - start):
        return stable_order(words)[start:stop]
    return near[np.argsort(words[near], kind="stable")[skip : skip + stop - start]]


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
            self._floats = self.uniforms(FLOATS_PER_REFILL).tolist()[::-1]
        return low + (high - low) * self._floats.pop()

    def integer(self, count: int) -> int:
        """Return an integer in [0, count)."""
        # The product can round up to `count` only for counts beyond 2**52.
        return min(int(self.uniform() * count), count - 1)
