"""What all benchmarks' command lines take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def output_file(text: str) -> Path:
    """Read the name of a file to write, before anything is measured that it should hold.

    Raises:
        argparse.ArgumentTypeError: It cannot be written.
    """
    path = Path(text)
    folder = path.absolute().parent
    if path.is_dir():
        reason = f"{path} is a folder; give a file"
    elif not folder.is_dir():
        reason = f"the folder {folder} does not exist; make it first"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        reason = f"{path} cannot be written; choose another file"
    else:
        return path
    raise argparse.ArgumentTypeError(reason)
