"""Samples that are something else than what their checksums say, for tests of what comes after."""

import numpy as np

from mbv3dist.data.reader import Reader


def rewrite_members(monkeypatch, change):
    """Let readers hand out `change(index, picture, target)` for each sample of a chunk."""
    original = Reader.read_chunk

    def read_chunk(self, indices, first):
        members, errors = original(self, indices, first)
        for n, place in enumerate(members.places):
            new = change(indices[place], bytes(members.pictures[n]), bytes(members.targets[n]))
            members.pictures[n], members.targets[n] = (memoryview(part) for part in new)
            members.sizes[n] = [len(part) for part in new]
            for member, part in enumerate(new):
                address = np.frombuffer(part, np.uint8).__array_interface__["data"][0]
                members.addresses[n, member] = address
        return members, errors

    monkeypatch.setattr(Reader, "read_chunk", read_chunk)
