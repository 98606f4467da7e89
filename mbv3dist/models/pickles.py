"""Reads what `torch.save` wrote, from files of unknown origin: nothing in them is run.

torch's own `weights_only` unpickler refuses code. What is added here: other containers, which torch
would unpack to temporary files, are refused; so is what is small on disk and large in memory; every
error is one line; and `argparse.Namespace` is let in, a bag of values without code, in which the
training scripts of timm and torchvision keep their arguments beside the weights.
"""

from __future__ import annotations

import argparse
import io
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from mbv3dist.messages import one_line

_ZIP = b"PK\x03\x04"
# Of torch.save before its version 1.6: a pickled number.
_OLD = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
# The only thing torch unpickles that makes much memory of a few bytes.
_BOMB = b"bytearray"


_OBJECT = re.compile(r"Unsupported global: GLOBAL (\S+)")  # of torch's messages


class PickledObjectError(ValueError):
    """A pickle of an object, which only its own code can load.

    Attributes:
        kind: Its class or function, printable and short.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(f"it holds a pickled {kind}, which is no tensor")
        self.kind = kind


def load_pickle(path: Path) -> Any:
    """Load a file of `torch.save` onto the CPU: tensors, numbers, texts and containers of these.

    Raises:
        PickledObjectError: if it holds an object of another kind.
        ValueError: with the reason, if it is damaged or holds anything else.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(len(_OLD))
    source: Path | io.BytesIO = path
    if head.startswith(_ZIP):
        _check_zip(path)
    elif head == _OLD and not tarfile.is_tarfile(path):
        # From memory: reading from a file would make room for as much as the file claims to have.
        content = path.read_bytes()
        if _BOMB in content:
            raise ValueError("it holds a bytearray, which is no tensor")
        source = io.BytesIO(content)
    else:
        raise ValueError("it is no file of torch.save")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None
    except (
        Exception
    ) as error:  # damaged pickles end in nearly any error: IndexError, TypeError, ...
        named = _OBJECT.search(str(error))
        if named:
            raise PickledObjectError(one_line(named[1], 100)) from None
        raise ValueError(_reason(error)) from None


def _check_zip(path: Path) -> None:
    """Refuse compressed or overlapping records; `torch.save` writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            size = sum(record.file_size for record in records)
            if any(record.compress_type for record in records) or size > path.stat().st_size:
                raise ValueError("its records are compressed, which those of torch.save are not")
            for record in records:
                if record.filename.endswith(".pkl") and _BOMB in archive.read(record):
                    raise ValueError("it holds a bytearray, which is no tensor")
    except ValueError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, struct.error, RuntimeError, ...
        raise ValueError(f"its zip is damaged ({type(error).__name__})") from None


def _reason(error: Exception) -> str:
    """Return what is wrong in one line, without torch's advice to load the file all the same."""
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "GLOBAL" in line or "WeightsUnpickler error" in line]
    text = (named or [line for line in lines if line] or [""])[0]
    if not named and text.startswith("Weights only load failed"):
        text = "more than tensors and plain values in it"
    return f"{type(error).__name__}: {one_line(text)}" if text else type(error).__name__
