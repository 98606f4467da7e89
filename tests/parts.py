"""What tests of conversion in parts share: a source, and calls that start parts."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.verify import verify_dataset
from mbv3dist.data.index import open_split

NUM_PICTURES = 83  # prime


class Killed(BaseException):
    """Like SIGKILL: nothing in the way of it cleans up."""


def write_source(root):
    """Class folders a, b and c with small pictures, every tenth a PNG."""
    rng = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        folder = root / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "png" if number % 10 == 0 else "jpg"
        noise = rng.integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:03d}.{suffix}")
    return root


def convert(source, out, part=None, **options):
    defaults = {"split": "train", "workers": 1, "shard_bytes": 20_000}
    return convert_imagefolder(source, out, part=part, **{**defaults, **options})


def convert_all(source, out, count, order=None, **options):
    """Start all parts, one after the other; return the last report."""
    reports = [convert(source, out, (n, count), **options) for n in order or range(1, count + 1)]
    assert [len(report.waiting) for report in reports] == list(range(count))[::-1]
    return reports[-1]


def tree(folder):
    """Every file, hidden ones too, with its bytes."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def content(out, split="train"):
    """The samples in pack order, and what else should not depend on parts."""
    opened = open_split(out, split)
    samples = [(opened.source(n), opened.sample(n)) for n in range(len(opened))]
    report = json.loads((out / f"{split}.report.json").read_text())
    return samples, opened.labels().tolist(), report


def whole_after(out):
    assert verify_dataset(out)["ok"]
    assert not list(out.glob(".*")) and not list(out.glob("*.failed.json"))
