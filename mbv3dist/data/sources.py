"""``SPLIT.sources.tsv``: where each sample's picture came from, a line ``KEY TAB PATH`` per sample.

At a billion samples the file has tens of gigabytes, so lines are looked up where they are: by
bisecting bytes, since keys ascend. Positioned reads, as in reader.py: a file that is cut short
meanwhile is an error, no end of the process.
"""

from __future__ import annotations

import os
from pathlib import Path

from mbv3dist.data.files import open_regular

_WINDOW = 8192  # bytes; most lines are shorter


class Sources:
    """An open sources file; safe to share between threads.

    Raises:
        UnusableFileError: if it is no file.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: Path):
        self._file = open_regular(path)
        self._next = 0  # behind the line that was found last

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def find(self, key: str) -> tuple[str, str]:
        """Return key and path of the line with a key, or of the first one with a larger key."""
        # Asked one after the other, the line wanted is the one behind the last.
        line = self._line(self._next)
        if line.partition(b"\t")[0] != key.encode():
            start = self._bisect(int(key))
            line = self._line(start)
        else:
            start = self._next
        self._next = start + len(line) + 1
        found, _, path = line.partition(b"\t")
        return tuple(part.decode("utf-8", "backslashreplace") for part in (found, path))  # type: ignore[return-value]

    def _bisect(self, key: int) -> int:
        """Return the start of the first line whose key is not below a key, or the file's end."""
        low, high = 0, os.fstat(self._file).st_size  # `low` is the start of a line
        while low < high:
            middle = (low + high) // 2
            # The first line that starts at the middle or behind it.
            start = low if middle == low else middle + len(self._line(middle - 1))
            if start >= high:
                high = middle
                continue
            line = self._line(start)
            number = line.partition(b"\t")[0][:20]
            if number.isdigit() and int(number) >= key:
                high = start
            else:
                low = start + len(line) + 1
        return low

    def _line(self, start: int) -> bytes:
        """Return the bytes from a position to the next line break, or to the file's end."""
        data = b""
        while b"\n" not in data:
            more = os.pread(self._file, _WINDOW, start + len(data))
            if not more:
                break
            data += more
        return data.partition(b"\n")[0]
