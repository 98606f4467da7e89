"""A measured decoder: `python -m pixel_peers.decode_serve NAME`, jobs from `child.Child`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from pixel_peers.decoders import (
    Pictures,
    decode_all,
    differences,
    make_decoder,
    new_slots,
    pillow_decoder,
)
from pixel_peers.serve import answer_jobs

PACKAGES = {
    "ours": ("numba", "nvidia-nvimgcodec-cu13", "pillow"),
    "pillow": ("pillow",),
    "torchvision": ("torchvision", "torch"),
    "simplejpeg": ("simplejpeg", "opencv-python-headless"),
}


def _versions(name: str) -> dict[str, str]:
    found = {}
    for package in PACKAGES[name]:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    """Serve one decoder."""
    name = sys.argv[1]
    state: dict[str, Any] = {}

    def handle(job: dict[str, Any]) -> dict[str, Any]:
        if job["do"] == "open":
            state["decoder"] = make_decoder(name)
            state["pictures"] = Pictures(Path(job["views"]))
            return {"versions": _versions(name)}
        decoder, pictures = state["decoder"], state["pictures"]
        if job["do"] == "difference":
            found = differences(decoder, pillow_decoder(), pictures)
            return {"mean": float(found.mean()), "worst": float(found.max())}
        assert job["do"] == "pass"
        slots = new_slots(job["threads"], pictures.size)
        return {"images_per_s": decode_all(decoder, pictures, slots, threads=job["threads"])}

    answer_jobs(handle)


if __name__ == "__main__":
    main()
