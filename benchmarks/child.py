"""The processes of the systems measured: each in its own interpreter, alive while others run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER_LIMIT_S = 300.0
END_LIMIT_S = 10.0


class Child:
    """A process of a system measured: one JSON object a line goes in, one comes out.

    Each has its own interpreter, lives as long as the benchmark, and waits while others run.
    """

    def __init__(self, python: Path, module: str, *words: str, work: Path, with_gpu: bool = False):
        """Start `python -m module words`; its messages go to a file in `work`.

        It sees no GPU unless it is to have one.
        """
        work.mkdir(parents=True, exist_ok=True)
        self.log = work / f"{'-'.join((module.rpartition('.')[2], *words))}.log"
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        # Made whole: the process starts in another folder.
        paths = [str(HERE), *map(os.path.abspath, given)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(work),
            # Nothing of this needs a network; these two would ask.
            "LITDATA_DISABLE_VERSION_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if not with_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # A pipe of their own: anything may be printed to standard output.
        answers, writing_end = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        with open(self.log, "w") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module, *words],
                cwd=HERE,
                env={**environment, "ANSWERS_FD": str(writing_end)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing_end,),
            )
        os.close(writing_end)

    def ask(self, job: Mapping[str, Any], *, limit_s: float = ANSWER_LIMIT_S) -> dict[str, Any]:
        """Send a job and return its answer.

        Raises:
            RuntimeError: When the process died, said that it failed, or did not answer in time.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError(f"it ended: {self._last_words()}") from None
        line = self._line(limit_s)
        if not line:
            raise RuntimeError(f"it ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _line(self, limit_s: float) -> bytes:
        """Return one line of its output: it is written at once, so its start is waited for."""
        ready, _, _ = select.select([self._answers], [], [], limit_s)
        if not ready:
            self.close()
            raise RuntimeError(f"no answer within {limit_s:g} s")
        return self._answers.readline()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "without a message"

    def close(self) -> None:
        """End the process: it ends by itself when its input ends, else it is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it may have ended before it took everything
            self._process.stdin.close()
        try:
            self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def missing_modules(python: Path, modules: Iterable[str]) -> set[str]:
    """Return which modules an interpreter does not have, without importing them."""
    names = sorted(set(modules))
    if python != Path(sys.executable) and not python.is_file():
        return set(names)
    code = """
import importlib.util, json, sys

def is_missing(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # of the package that it is in
        return True

print(json.dumps([name for name in sys.argv[1:] if is_missing(name)]))
"""
    output = subprocess.check_output([str(python), "-c", code, *names], text=True)
    return set(json.loads(output))
