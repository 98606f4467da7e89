"""What the commands share: numbers from the command line, JSON, and progress."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_SECONDS_PER_LINE = 30.0  # of progress, where there is no terminal


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def print_json(value: Any) -> None:
    """Prints one JSON object."""
    print(json.dumps(value, indent=2))


class Progress:
    """A progress callback (done, total) on standard error: a bar, or a line now and then."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._bar: Any = None
        self._next_line = time.monotonic() + _SECONDS_PER_LINE

    def __enter__(self) -> Callable[[int, int], None]:
        if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self._text, total=None)
        return self._update

    def _update(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)
        elif time.monotonic() > self._next_line and os.environ.get("RANK", "0") == "0":
            self._next_line = time.monotonic() + _SECONDS_PER_LINE
            print(f"{self._text}: {done}/{total}", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
