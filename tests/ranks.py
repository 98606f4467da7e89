"""Ranks as real processes, cheaply, and what they read as digests.

Ranks are forked from a server process that has imported torch once and has a single thread, so that
eight of them start in milliseconds. What a rank does is a function of this module, called with
`rank` and `world_size`; it leaves its findings in files.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.data.index import Split
from mbv3dist.data.joined import choose_pass, open_splits
from mbv3dist.data.plan import Plan
from mbv3dist.data.state import resume_step

CLASSES = ("often", "rare", "seldom")
CANVAS = 24
SSD = ViewConfig(
    name="ssd", brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, color_probability=1
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mbv3dist.data.loader", "pytest"])


def start_ranks(function: Callable[..., None], world_size: int, **options: Any) -> list[Any]:
    """Starts `function(rank=, world_size=, **options)` on every rank; returns the processes."""
    processes = [
        _context.Process(
            target=function, kwargs={"rank": rank, "world_size": world_size, **options}, daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def join_ranks(processes: Sequence[Any], *, timeout: float = 120) -> list[int]:
    """Waits for the ranks; returns their exit codes, a signal's as a negative number."""
    for process in processes:
        process.join(timeout)
        assert process.exitcode is not None, "a rank hangs"
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.close()
    return codes


def kill_ranks(processes: Sequence[Any]) -> list[int]:
    """Sends SIGKILL to every rank; returns their exit codes."""
    for process in processes:
        process.kill()
    return join_ranks(processes)


def run_ranks(function: Callable[..., None], world_size: int, **options: Any) -> None:
    """Runs `function` on every rank to its end."""
    assert join_ranks(start_ranks(function, world_size, **options)) == [0] * world_size


def fork_ranks(function: Callable[..., None], world_size: int, **options: Any) -> list[int]:
    """As `run_ranks`, by forking this process: for functions that need more imported than torch.

    To be called in a process with a single thread, such as one that `run_ranks` has started;
    returns the exit codes.
    """
    assert threading.active_count() == 1
    ranks = []
    for rank in range(world_size):
        number = os.fork()
        if number == 0:
            code: Any = 1
            try:
                function(rank=rank, world_size=world_size, **options)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(number)
    return [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in ranks]


@dataclass(frozen=True)
class Ended:
    """How a rank of a command ended."""

    code: int
    stdout: str
    stderr: str


def run_commands(
    commands: Sequence[Sequence[object]], world_size: int, out: Path
) -> list[list[Ended]]:
    """Runs `mbv3dist WORDS` for each of the commands, one after the other, without a launcher.

    Ranks find each other by what launchers set; a single one stands alone. Returns how each rank
    of each command ended.
    """
    out.mkdir()
    words = [[str(word) for word in command] for command in commands]
    run_ranks(_launch, 1, commands=words, num_ranks=world_size, out=out)
    return [
        [
            Ended(code, *((out / f"{number}.{rank}.{file}").read_text() for file in (1, 2)))
            for rank, code in enumerate(codes)
        ]
        for number, codes in enumerate(json.loads((out / "codes").read_text()))
    ]


def _launch(
    *, rank: int, world_size: int, commands: list[list[str]], num_ranks: int, out: Path
) -> None:
    import mbv3dist.training.run  # noqa: F401

    codes = []
    for number, words in enumerate(commands):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"port": port, "words": words, "out": out / str(number)}
        codes.append(fork_ranks(_command, num_ranks, **options))
    (out / "codes").write_text(json.dumps(codes))


def _command(*, rank: int, world_size: int, port: int, words: list[str], out: Path) -> None:
    from mbv3dist.cli import main

    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    if world_size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    for number in (1, 2):
        os.dup2(os.open(f"{out}.{rank}.{number}", os.O_WRONLY | os.O_CREAT), number)
    main(words)


def write_tiny_voc(root: Path, num_pictures: int, *, seed: int = 0) -> Path:
    """A Pascal VOC folder of pictures of some 20 pixels, no two the same, with 0 to 3 boxes."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    (root / "labels.txt").write_text("\n".join(CLASSES) + "\n")
    rng = np.random.default_rng(seed)
    names = [f"{number:05d}" for number in range(num_pictures)]
    (root / "ImageSets/Main/train.txt").write_text("\n".join(names) + "\n")
    for name in names:
        width, height = rng.integers(16, 25, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=60)
        objects = ""
        for label in rng.choice(CLASSES, rng.integers(0, 4), p=(0.7, 0.05, 0.25)):
            x, y = rng.integers(1, 8, 2).tolist()
            objects += (
                f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x}</xmin>"
                f"<ymin>{y}</ymin><xmax>{x + 8}</xmax><ymax>{y + 7}</ymax></bndbox></object>"
            )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    return root


@dataclass(frozen=True)
class Reading:
    """What and how a run reads: all that its ranks have to know."""

    data: tuple[str, ...]
    global_batch_size: int = 24
    epochs: int = 3
    tail: str = "carry"
    weights: tuple[float, ...] = ()
    balance_classes: bool = False
    num_threads: int = 2

    def open(self) -> tuple[Split, Plan]:
        """The split and the plan."""
        split = open_splits(self.data, "train")
        samples = choose_pass(split, weights=self.weights, balance_classes=self.balance_classes)
        plan = Plan(
            split.shard_sizes,
            global_batch_size=self.global_batch_size,
            epochs=self.epochs,
            seed=5,
            tail=self.tail,
            samples=samples,
        )
        return split, plan

    def loader(self, split: Split, plan: Plan, *, rank: int, world_size: int, start: int) -> Any:
        """The loader of one rank."""
        from mbv3dist.data.loader import Loader

        return Loader(
            split,
            plan,
            view=SSD,
            size=CANVAS,
            seed=5,
            rank=rank,
            world_size=world_size,
            num_threads=self.num_threads,
            start_step=start,
        )


@dataclass(frozen=True)
class Part:
    """What some ranks got in one step: lists with an item per position, in order."""

    step: int
    keys: list[str]
    epochs: list[int]
    weights: list[float]
    digests: list[str]
    """Of the canvas, the boxes and all else that belongs to a sample."""


def describe(split: Split, step: int, batch: Any) -> Part:
    """A batch as keys and digests."""
    return Part(
        step=step,
        keys=split.keys(batch.index.numpy()),
        epochs=batch.epoch.tolist(),
        weights=batch.weight.tolist(),
        digests=[_digest(batch, place) for place in range(len(batch))],
    )


def _digest(batch: Any, place: int) -> str:
    content = hashlib.sha256(batch.image[place].permute(1, 2, 0).numpy().tobytes())
    real = batch.labels[place] >= 0  # padding depends on the other samples in the batch
    for name in ("boxes", "labels", "difficult"):
        content.update(getattr(batch, name)[place][real].numpy().tobytes())
    for name in ("color", "view", "size"):
        content.update(getattr(batch, name)[place].numpy().tobytes())
    return content.hexdigest()[:16]


def join_parts(parts: Sequence[Part]) -> Part:
    """The parts of all ranks, one behind the other, as one: the global batch."""
    assert len({part.step for part in parts}) == 1
    return Part(
        parts[0].step,
        *(
            [item for part in parts for item in getattr(part, name)]
            for name in ("keys", "epochs", "weights", "digests")
        ),
    )


def read_to_the_end(*, rank: int, world_size: int, reading: Reading, out: Path) -> None:
    """A rank that reads the whole run."""
    split, plan = reading.open()
    loader = reading.loader(split, plan, rank=rank, world_size=world_size, start=0)
    parts = [vars(describe(split, step, batch)) for step, batch in loader]
    (out / f"{world_size}.{rank}.json").write_text(json.dumps(parts))


def whole_run(reading: Reading, world_size: int, out: Path) -> list[Part]:
    """The global batches of a run on this many ranks."""
    out.mkdir()
    run_ranks(read_to_the_end, world_size, reading=reading, out=out)
    files = [out / f"{world_size}.{rank}.json" for rank in range(world_size)]
    ranks = [[Part(**part) for part in json.loads(file.read_text())] for file in files]
    return [join_parts(parts) for parts in zip(*ranks, strict=True)]


def read_in_lockstep(
    *,
    rank: int,
    world_size: int,
    reading: Reading,
    state: Path,
    logs: Path,
    barrier: Any,
    die_rank: int = -1,
    die_step: int = -1,
    die_late: bool = False,
) -> None:
    """A rank of a run as in training: all ranks finish a step before any begins the next.

    It goes on from the file `state`, which one rank, another each time, writes after each step.
    What was read goes to `logs/RANK`, a line per step. The rank `die_rank` kills itself while its
    threads are decoding ahead: at `die_step`, between reading it and the state behind it, or with
    `die_late` when that state has been written.
    """
    split, plan = reading.open()
    start = 0
    if state.exists():
        start, warnings = resume_step(json.loads(state.read_text()), split, plan)
        assert warnings == []
    loader = reading.loader(split, plan, rank=rank, world_size=world_size, start=start)
    log = os.open(logs / str(rank), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for step, batch in loader:
        threads = sum(t.name.startswith("mbv3dist") for t in threading.enumerate())
        line = {"threads": threads, "part": vars(describe(split, step, batch))}
        os.write(log, json.dumps(line).encode() + b"\n")
        if (rank, step, die_late) == (die_rank, die_step, False):
            os.kill(os.getpid(), signal.SIGKILL)
        barrier.wait()
        if rank == step % world_size:
            temporary = state.with_suffix(".tmp")
            temporary.write_text(json.dumps(loader.state()))
            temporary.replace(state)
        barrier.wait()
        if (rank, step, die_late) == (die_rank, die_step, True):
            os.kill(os.getpid(), signal.SIGKILL)


def make_barrier(world_size: int) -> Any:
    """A barrier for ranks that are started with it; to be kept as long as they live."""
    return _context.Barrier(world_size)
