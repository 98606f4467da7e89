"""The samples that every system packs: read from our shards with the standard library alone."""

from __future__ import annotations

import tarfile
from pathlib import Path


def read_samples(source: Path) -> list[tuple[int, bytes, int]]:
    """Return (key, picture, label) of all samples in our shards under `source`, in order."""
    samples = []
    for shard in sorted(source.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {item.name: item for item in tar.getmembers()}
            for name in members:
                if name.endswith(".jpg"):
                    samples.append(
                        (
                            int(name[:-4]),
                            _bytes(tar, members[name]),
                            int(_bytes(tar, members[f"{name[:-4]}.cls"])),
                        )
                    )
    return samples


def read_pictures(source: Path) -> dict[int, bytes]:
    """Return the pictures' bytes by key."""
    return {key: picture for key, picture, _ in read_samples(source)}


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
