"""Ranks as processes, and the exchange of JSON with `streaming_guarantees.py`.

A rank is a process of its own: it is forked from the adapter once the system is imported (an
import costs seconds, and there are hundreds of ranks), gets a launcher's environment variables and
a process group of its own, and leaves its result in a file. Only the standard library is used.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

Entry = dict[str, Any]  # {"step": [epoch, number], "ids": [...], "epochs": number or [...]}


@dataclass(frozen=True)
class Request:
    """What one rank shall read.

    Attributes:
        place: Folder of the packed data.
        variant: One of the adapter's `VARIANTS`.
        world_size: Ranks.
        workers: Worker processes (ours: threads) of each rank.
        global_batch: Samples in a step over all ranks.
        epochs: Passes in the whole run.
        rank: This process.
        stop: Steps after which to stop and return the state; None reads to the end.
        state: What an earlier delivery returned: go on from there.
        evaluate: Read once, in order and complete, as for an evaluation.
    """

    place: Path
    variant: str
    world_size: int
    workers: int
    global_batch: int
    epochs: int
    rank: int = 0
    stop: int | None = None
    state: dict[str, Any] | None = None
    evaluate: bool = False

    @property
    def batch_size(self) -> int:
        """Samples in a batch of this rank."""
        return self.global_batch // self.world_size


@dataclass
class Delivery:
    """What one rank got.

    Attributes:
        entries: A row per batch: its place in the run, the samples and the epoch of each.
        state: What the system wants to go on from after `stop` steps; None if it has no such.
        touched: Samples whose bytes were read in this process, in that order.
        extra: Whatever else an adapter has to say.
    """

    entries: list[Entry]
    state: dict[str, Any] | None = None
    touched: list[int] | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child process ended; `value` is None unless it returned."""

    value: Any
    error: str | None = None
    error_type: str | None = None
    signal: str | None = None
    timed_out: bool = False


def collect(
    batches: Any, request: Request, *, epoch: int, first: int = 0, room: int | None = None
) -> list[Entry]:
    """Return the entries of one epoch's batches (lists of ids), at most `room` of them."""
    entries: list[Entry] = []
    if room == 0:
        return entries
    for number, ids in enumerate(batches, start=first):
        entries.append({"step": [epoch, number], "ids": [int(i) for i in ids], "epochs": epoch})
        if len(entries) == room:
            break
    return entries


def run_ranks(
    deliver: Callable[[Request], Delivery], request: Request, *, limit_s: float
) -> list[Outcome]:
    """Run `deliver` on every rank of the request, each in a process of its own."""
    port = _free_port()
    calls: list[tuple[Callable[[], Any], dict[str, Any]]] = []
    for rank in range(request.world_size):
        mine = replace(request, rank=rank)
        env = {
            "RANK": rank,
            "GLOBAL_RANK": rank,  # LitData's name for it
            "LOCAL_RANK": rank,
            "WORLD_SIZE": request.world_size,
            "LOCAL_WORLD_SIZE": request.world_size,
            "NNODES": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        calls.append((partial(_as_dict, deliver, mine), env))
    return run_children(calls, scratch=request.place, limit_s=limit_s)


def _as_dict(deliver: Callable[[Request], Delivery], request: Request) -> dict[str, Any]:
    return asdict(deliver(request))


def run_children(
    calls: list[tuple[Callable[[], Any], dict[str, Any]]], *, scratch: Path, limit_s: float
) -> list[Outcome]:
    """Fork a child per call, wait for all of them, and end those that take too long.

    Args:
        calls: What to call, and the environment variables to call it with.
        scratch: Folder for the results on their way back.
        limit_s: Seconds after which a child and all it started is killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    paths = [scratch / f".result-{os.getpid()}-{number}.json" for number in range(len(calls))]
    pids: list[int] = []
    try:
        for (call, env), path in zip(calls, paths, strict=True):
            path.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                _be_child(call, env, path)
            pids.append(pid)
        ends = _wait(pids, limit_s)
    finally:
        for pid in pids:
            _end_group(pid)  # also worker processes that outlived their rank
    outcomes = []
    for path, (status, timed_out) in zip(paths, ends, strict=True):
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        if timed_out:
            outcomes.append(Outcome(None, timed_out=True))
        elif path.is_file():
            outcomes.append(Outcome(**json.loads(path.read_text())))
        else:
            name = signal.Signals(number).name if number else f"exit {os.WEXITSTATUS(status)}"
            outcomes.append(Outcome(None, signal=name))
        path.unlink(missing_ok=True)
    return outcomes


def _wait(pids: list[int], limit_s: float) -> list[tuple[int, bool]]:
    """Return each child's wait status and whether it had to be killed."""
    deadline = time.monotonic() + limit_s
    ends: dict[int, tuple[int, bool]] = {}
    while len(ends) < len(pids):
        late = time.monotonic() > deadline
        for pid in pids:
            if pid in ends:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ends[pid] = (status, False)
            elif late:
                _end_group(pid)
                ends[pid] = (os.waitpid(pid, 0)[1], True)
        time.sleep(0.005)
    return [ends[pid] for pid in pids]


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be_child(call: Callable[[], Any], env: dict[str, Any], path: Path) -> None:
    """Run the call in this forked process, leave its result in `path`, and exit."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        atexit._clear()  # what the parent registered is the parent's
        os.environ.update({name: str(value) for name, value in env.items()})
        try:
            result: dict[str, Any] = {"value": call()}
        except BaseException as error:
            traceback.print_exc()
            result = {"value": None, "error": describe(error), "error_type": type(error).__name__}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(result))
        temporary.rename(path)
        code = 0
    finally:
        # What a process does at its end, which a forked one that leaves by _exit would not:
        # MosaicML's shared memory is let go of here.
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)


def describe(error: BaseException | None) -> str:
    """Return the message of an error and of those that led to it."""
    texts: list[str] = []
    while error is not None and len(texts) < 5:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return " <- ".join(texts)[:2000]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def main(adapter: Any) -> None:
    """Do the job that standard input describes with an adapter; print the results."""
    from peers import jobs

    job = json.load(sys.stdin)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended on the way out
    # Systems print to standard output; it is kept for the results alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    results = jobs.run(adapter, job)
    results["seconds"] = round(time.perf_counter() - started, 1)
    answer.write(json.dumps(results) + "\n")
    answer.close()
