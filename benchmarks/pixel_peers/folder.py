"""A class folder, listed the same way for every format that is made of it."""

from __future__ import annotations

import random
from pathlib import Path


def class_samples(folder: Path) -> list[tuple[Path, int]]:
    """Return the pictures and class numbers of a class folder, shuffled, always alike.

    Formats that are read in order would otherwise deliver one class after the other.
    """
    samples = [
        (path, number)
        for number, place in enumerate(sorted(p for p in folder.iterdir() if p.is_dir()))
        for path in sorted(place.iterdir())
    ]
    random.Random(0).shuffle(samples)
    return samples
