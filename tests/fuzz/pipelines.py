"""Whole commands on folders and data sets with mutated files.

A folder is converted, and what came of it verified and read. A data set is verified, inspected,
planned, read and loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from .mutate import TEXTS, mutate
from .mutate_binary import _headers, member
from .sandbox import MAX_PROBLEM, Finding, Target, check_text, error_problem, require, text_problem
from .seeds import Case, Seeds

KINDS = {
    **{".xml": "xml", ".json": "json", ".txt": "lines", ".tsv": "lines", ".idx": "idx"},
    **{".tar": "tar", ".npy": "npy", ".crc": "bytes", ".manifest": "bytes"},
    **{".jpg": "jpeg", ".png": "png", ".webp": "webp", ".gif": "picture"},
}
_LINKS = ("/etc/passwd", "/dev/zero", ".", "..", "../../cwd", "missing", "self")


def mutated(rng: Random, name: str, seeds: Seeds, data: bytes) -> bytes:
    """Mutate a file by what its name says it is, or put another file in its place."""
    kind = KINDS[os.path.splitext(name)[1]]
    if rng.random() < 0.04:
        return rng.choice(rng.choice(list(seeds.pictures.values())))
    pool = [data, *seeds.pictures[kind][:2]] if kind in seeds.pictures else [data]
    return mutate(rng, kind, pool)


def place_special(folder: Path, specials: list[list[str]]) -> None:
    """Put in what is no plain file: pipes, links, folders, files with strange names."""
    for name, kind, detail in specials:
        path = folder / name
        assert Path(os.path.abspath(path)).is_relative_to(folder), name
        with contextlib.suppress(OSError, ValueError):  # names that the system refuses
            if kind == "fifo":
                path.unlink(missing_ok=True)
                os.mkfifo(path)
            elif kind == "link":
                path.unlink(missing_ok=True)
                path.symlink_to(path if detail == "self" else detail)
            elif kind == "folder":
                path.unlink(missing_ok=True)
                path.mkdir()
            elif kind == "gone":
                path.unlink()
            else:
                path.write_bytes((folder / detail).read_bytes())


def _specials(rng: Random, names: list[str], suffix: str) -> list[list[str]]:
    name = rng.choice(names)
    strange = rng.choice(TEXTS).replace("/", "_").replace("\0", "")[:200]
    beside = os.path.join(os.path.dirname(name), f"{strange}{suffix}")
    found = rng.choice(
        (
            [name, "fifo", ""],
            [name, "link", rng.choice(_LINKS)],
            [name, "folder", ""],
            [name, "gone", ""],
            [beside, "copy", name],
            [beside, "fifo", ""],
            [beside, "link", rng.choice(_LINKS)],
        )
    )
    return [found]


# Converting


def _make_convert(kind: str) -> Callable[[Random, Seeds], Case]:
    def make(rng: Random, seeds: Seeds) -> Case:
        files = dict(seeds.voc if kind == "voc" else seeds.imagefolder)
        if rng.random() < 0.1:
            files["labels.txt"] = mutate(rng, "lines", [b"cat\ndog\nred cell\n"])
        for name in rng.sample(sorted(files), rng.choice((1, 1, 2, 4))):
            files[name] = mutated(rng, name, seeds, files[name])
        words = ["--split", "train", "--workers", "1", "--seed", str(rng.randrange(9))]
        words += rng.choice((["--on-error", "skip"], ["--on-error", "skip"], []))
        words += rng.choice(([], [], ["--resize", "8"], ["--val-fraction", "0.3"]))
        if kind == "voc" and rng.random() < 0.3:
            words += ["--task", "classification"]
            words += rng.choice(([], ["--object-crops"]))
        specials = _specials(rng, sorted(files), ".jpg") if rng.random() < 0.15 else []
        if rng.random() < 0.1:
            files["classes.txt"] = mutate(rng, "lines", [b"cat\ndog\nred cell\n"])
            words += ["--classes", "in/src/classes.txt"]
        sources = {f"src/{name}": data for name, data in files.items()}
        placed = [[f"src/{name}", what, detail] for name, what, detail in specials]
        return Case(kind, sources, {"words": words, "special": placed})

    return make


def run_convert(case: Case, box: Path, seeds: Seeds) -> bool:
    """Convert; what comes of it must verify, and every sample of it must load."""
    out = box / "out" / "data"
    words = [str(box / word) if word.startswith("in/") else word for word in case.options["words"]]
    source = str(box / "in" / "src")
    code, printed = command("convert", case.target, source, "--out", str(out), *words)
    require(code == 0, f"convert ends with {code}")
    for line in printed.splitlines():
        check_text(line, limit=MAX_PROBLEM)
    code, printed = command("verify", str(out), "--json")
    result = json.loads(printed)
    require(result["ok"] and code == 0, f"what was converted does not verify: {result}")
    from mbv3dist.data.index import list_splits

    for name in list_splits(out):
        problems = read_split(out, name, verify="always")[1]
        require(not problems, f"what was converted cannot be read: {problems[:2]}")
        problem = load_batches(out, name)
        require(not problem, f"what was converted cannot be loaded: {problem}")
    return True


def command(*words: str) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and what it printed.

    Errors that it would print are raised (``MBV3DIST_TRACEBACK``).
    """
    from mbv3dist.cli import main

    printed, said = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            main(words)
    except SystemExit as end:
        code = end.code or 0
    if said.getvalue().strip():
        check_text(said.getvalue().strip())
    return code, printed.getvalue()


# Reading


def read_split(
    folder: Path, name: str, *, verify: str
) -> tuple[dict[int, tuple[bytes, bytes]], list[str]]:
    """Read and parse all samples; return those that could be read, and the errors.

    Raises:
        Finding: if an error is not what a user may meet.
    """
    from mbv3dist.data.index import open_split
    from mbv3dist.data.reader import Reader

    found, errors = {}, []
    split = open_split(folder, name)
    with Reader(split, verify=verify) as reader:
        for index in range(min(len(split), 40)):
            try:
                picture, target = reader.read(index)
                found[index] = bytes(picture), bytes(target)
                reader.target(index)
            except Exception as error:
                if problem := error_problem(error):
                    raise Finding(f"reader: {problem}") from error
                errors.append(str(error))
    return found, errors


def load_batches(folder: Path, name: str) -> str:
    """Load a split for evaluation and for training; return the first error, or nothing.

    Raises:
        Finding: if an error is not what a user may meet.
    """
    from mbv3dist.config import ViewConfig
    from mbv3dist.data.index import open_split
    from mbv3dist.data.joined import choose_pass
    from mbv3dist.data.loader import Loader, eval_batches
    from mbv3dist.data.plan import Plan

    try:
        split = open_split(folder, name)
        config = ViewConfig(name="resize")
        seen = 0
        for batch in eval_batches(split, view=config, size=16, batch_size=4, num_threads=1):
            seen += len(batch)
        require(seen == len(split), f"evaluation saw {seen} of {len(split)} samples")
        view = "ssd" if split.task == "detection" else "random_resized_crop"
        balanced = split.task == "detection" and bool((split.labels() >= 0).any())
        samples = choose_pass(split, balance_classes=True) if balanced else None
        plan = Plan(split.shard_sizes, global_batch_size=4, epochs=1, samples=samples)
        config = ViewConfig(name=view)  # type: ignore[arg-type]
        with Loader(split, plan, view=config, size=16, seed=1, num_threads=1) as loader:
            steps = [step for step, _ in loader]
        require(steps == list(range(plan.num_steps)), "steps are missing")
    except Finding:
        raise
    except Exception as error:
        if problem := error_problem(error):
            raise Finding(f"loader: {problem}") from error
        return str(error)
    return ""


# Data sets with mutated files


def make_dataset(rng: Random, seeds: Seeds) -> Case:
    """Mutate files of a data set; or a sample in it, with all checksums made right."""
    task = rng.choice(("detection", "classification"))
    files = dict(seeds.datasets[task])
    assert seeds.samples, "read before anybody watches"
    options: dict[str, Any] = {"task": task, "special": [], "sealed": False}
    kind = rng.random()
    if kind < 0.35:
        options["sealed"] = True
        _mutate_sample(rng, files, seeds, task)
    else:
        for name in rng.sample(sorted(files), rng.choice((1, 1, 1, 2))):
            files[name] = mutated(rng, name, seeds, files[name])
        if kind < 0.5:
            options["sealed"] = True
            seal(files)
        elif kind < 0.58:
            options["special"] = _specials(rng, sorted(files), ".tar")
    return Case("dataset", files, options)


def _mutate_sample(rng: Random, files: dict[str, bytes], seeds: Seeds, task: str) -> None:
    """Mutate the picture or target of a sample, and write tar, index and checksums to fit."""
    shard = rng.choice([name for name in files if name.endswith(".tar")])
    data, extension = files[shard], "json" if task == "detection" else "cls"
    members = []
    for at in _headers(data):
        name = data[at : at + 100].rstrip(b"\0").decode("ascii")
        size = int(data[at + 124 : at + 135], 8)
        members.append((name, data[at + 512 : at + 512 + size]))
    for place in rng.sample(range(len(members)), rng.choice((1, 1, 2))):
        name, body = members[place]
        if name.endswith(".jpg"):
            kind = rng.choice(("jpeg", "jpeg", "jpeg", "png", "webp", "picture"))
            body = mutate(rng, kind, [body] if kind == "jpeg" else seeds.pictures[kind])
        else:
            body = mutate(rng, "json" if task == "detection" else "lines", [body])
        members[place] = name, body
    tar, lines, checksums = b"", [], b""
    for name, body in members:
        lines.append(f"{name.partition('.')[2]} {len(tar) + 512} {len(body)} {name}")
        tar += member(name.encode(), b"0", body)
        checksums += zlib.crc32(body).to_bytes(4, "little")
    files[shard] = tar + bytes(-(len(tar) + 1024) % 10240 + 1024)
    stem = shard.removesuffix(".tar")
    pairs = [f"{a} {b}" for a, b in zip(lines[::2], lines[1::2], strict=True)]
    files[f"{stem}.idx"] = "\n".join([f"v1.2 {len(pairs)}", *pairs, ""]).encode()
    files[f"{stem}.crc"] = checksums
    assert all(line.startswith(("jpg", extension)) for line in lines)
    seal(files)


def seal(files: dict[str, bytes]) -> None:
    """Bring sizes and digests in `SPLIT.json` in line with the tars."""
    try:
        value = json.loads(files["train.json"])
        for row in value["shardlist"]:
            tar = files[row["url"]]
            row["filesize"], row["sha256"] = len(tar), hashlib.sha256(tar).hexdigest()
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return
    files["train.json"] = json.dumps(value).encode()
    files.pop("train.manifest", None)


def run_dataset(case: Case, box: Path, seeds: Seeds) -> bool:
    """Verify, inspect, plan, read and load; unsealed changes of shards must be noticed."""
    folder, task = box / "in", case.options["task"]
    original = seeds.datasets[task]
    changed = {
        name
        for name, data in original.items()
        if case.files.get(name) != data
        or any(name == place for place, *_ in case.options["special"])
    }
    refused = []
    for words in (
        ["verify", str(folder), "--json"],
        ["inspect", str(folder), "--json"],
        ["plan", str(folder), "--split", "train", "--global-batch", "4", "--json"],
        [
            "plan",
            str(folder),
            "--split",
            "train",
            "--global-batch",
            "4",
            "--keys",
            "--steps",
            "0:2",
        ],
    ):
        try:
            refused += _check_command(words)
        except Finding:
            raise
        except Exception as error:
            if problem := error_problem(error):
                raise Finding(f"{words[0]}: {problem}") from error
            refused.append(str(error))
    shards = {name for name in changed if name.endswith((".tar", ".idx", ".crc"))}
    if shards and not case.options["sealed"]:
        require(bool(refused), f"changes of {sorted(shards)} are not noticed by verify")
    accepted = not refused
    for verify in ("always", "open"):
        try:
            found, errors = read_split(folder, "train", verify=verify)
        except Finding:
            raise
        except Exception as error:
            if problem := error_problem(error):
                raise Finding(f"open: {problem}") from error
            return False
        accepted = accepted and not errors
        untouched = not case.options["sealed"] and changed <= shards
        if verify == "always" and untouched:
            for index, sample in found.items():
                require(sample == seeds.samples[task][index], f"sample {index} is another")
    return not load_batches(folder, "train") and accepted


def _check_command(words: list[str]) -> list[str]:
    """Run a command on a data set; return the problems that verify names."""
    code, printed = command(*words)
    if words[0] == "verify":
        result = json.loads(printed)
        require((code == 0) == result["ok"] == (not result["problems"]), "exit code of verify")
        for problem in result["problems"]:
            check_text(problem)
        return list(result["problems"])
    require(code == 0, f"{words[0]} ends with {code}")
    if words[-1] == "--json":
        json.loads(printed)
    for line in printed.splitlines():
        if problem := text_problem(line.replace("\t", " ") or "-"):
            raise Finding(f"{words[0]} prints {problem}")
    return []


PIPELINES: dict[str, Target] = {
    "dataset": Target(
        make_dataset, run_dataset, 2.6, on_disk=True, is_pipeline=True, headroom=3 << 30
    ),
    "voc": Target(
        _make_convert("voc"), run_convert, 1.0, on_disk=True, is_pipeline=True, headroom=3 << 30
    ),
    "imagefolder": Target(
        _make_convert("imagefolder"),
        run_convert,
        0.6,
        on_disk=True,
        is_pipeline=True,
        headroom=3 << 30,
    ),
}
