"""`mbv3dist quickstart`: the main job, end to end, on a data set that is drawn on the spot.

draw -> convert -> score an untrained model -> train on several processes -> score -> pictures. It
calls what a user would call for data of their own; everything lies in one folder.

    OUT/voc/        the drawn pictures with their XML      OUT/pictures/      the model's answers
    OUT/data/       the shards                             OUT/metrics.png    curves of the training
    OUT/training/   the run: best/, last/, metrics.jsonl   OUT/summary.json   the figures
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mbv3dist.config import TrainConfig
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import Split, open_split
from mbv3dist.evaluation.run import evaluate
from mbv3dist.inference.predict import predict
from mbv3dist.models.directory import load_model
from mbv3dist.recipe import load_config
from mbv3dist.tools.drawings import CLASSES
from mbv3dist.tools.drawn import make_drawn_dataset
from mbv3dist.training.build import build_model
from mbv3dist.viz.draw import contact_sheet
from mbv3dist.viz.plots import plot_class_scores, plot_training

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"  # of the clone
NUM_PICTURES = 12  # with answers drawn on them; one of them shows nothing but background
_MARKER = ".quickstart"  # a folder with this file was made here and may be cleared
_SPLITS = ("train", "val", "test")

Progress = Callable[[int, int], None]


def quickstart(
    out: str | Path = "runs/quickstart",
    *,
    processes: int = 2,
    num_train: int = 1600,
    num_val: int = 100,
    num_test: int = 250,
    seed: int = 0,
    flags: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the whole job and writes `OUT/summary.json`. A second call starts afresh.

    Args:
        out: folder for all of it; new, empty, or made by an earlier quickstart.
        processes: training processes on this machine.
        num_train: pictures to train on.
        num_val: pictures for the validation curve.
        num_test: pictures held out for the score.
        seed: of the pictures.
        flags: further flags of the training, such as `["--epochs", "2"]`.

    Returns:
        The summary: map_50, map, untrained_map_50, train_seconds, total_seconds, processes,
        pictures (paths), model, data, drawn (counts and shares of the data set), per_class.

    Raises:
        ValueError: the folder holds something else, the training failed, or this is no clone.
    """
    begin = time.perf_counter()
    out = Path(out)
    if not RECIPE.is_file():
        raise ValueError(f"{RECIPE}: not there; the quickstart runs in a clone, by make quickstart")
    config = _config(out, flags)
    if config.data.global_batch_size % processes:
        raise ValueError(
            f"--processes {processes}: must divide the batch of {config.data.global_batch_size}; "
            "take 1, 2 or 4"
        )
    _clear(out)

    _say(1, f"drawing {num_train + num_val + num_test} pictures: {', '.join(CLASSES)}")
    with _progress("drawing") as progress:
        drawn = make_drawn_dataset(
            out / "voc",
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            seed=seed,
            num_workers=min(processes, os.cpu_count() or 1),
            progress=progress,
        )
    shares = "{small_objects:.0%} small, {overlapping_objects:.0%} overlapping"
    shares += ", {empty_pictures:.0%} of the pictures empty"
    _note(f"{drawn['objects']} objects: " + shares.format(**drawn))

    _say(2, "converting them to tar shards")
    for split in _SPLITS:
        convert_voc(out / "voc", out / "data", split=split)
    _note("  ".join(f"{split} {len(open_split(out / 'data', split))}" for split in _SPLITS))

    _say(3, "scoring an untrained model, for comparison")
    test = open_split(out / "data", "test")
    untrained = _score_untrained(config, test)
    _note(f"mAP@50 {untrained:.4f}")

    _say(4, f"training SSDLite-Small on {processes} process(es), {config.epochs} epochs")
    train_begin = time.perf_counter()
    _train(out, processes=processes, flags=flags)
    train_seconds = time.perf_counter() - train_begin

    _say(5, "scoring it on the test pictures, which it has not seen")
    model = load_model(out / "training" / "best")
    result = evaluate(model.model, model.spec, test, num_threads=processes)
    for name, scores in result["per_class"].items():
        _note(f"{name:6} AP@50 {scores['ap_50']:.3f}")

    _say(6, "drawing its answers")
    names = _choose_pictures(out / "voc", NUM_PICTURES)
    answers = predict(model, names, out / "pictures")
    pictures = [out / "pictures" / item["drawing"] for item in answers["pictures"]]
    _write_sheet(pictures, out / "pictures.png")
    plot_training(out / "training" / "metrics.jsonl", out / "metrics.png", title="Quickstart")
    plot_class_scores(result, out / "classes.png", title="Quickstart, test pictures")

    summary = {
        "map_50": result["map_50"],
        "map": result["map"],
        "untrained_map_50": untrained,
        "train_seconds": round(train_seconds, 1),
        "total_seconds": round(time.perf_counter() - begin, 1),
        "processes": processes,
        "pictures": [path.as_posix() for path in pictures],
        "model": (out / "training" / "best").as_posix(),
        "data": (out / "data").as_posix(),
        "drawn": drawn,
        "per_class": result["per_class"],
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _tell(out, summary)
    return summary


def _config(out: Path, flags: Sequence[str]) -> TrainConfig:
    return load_config(RECIPE, _flags(out, flags))


def _flags(out: Path, flags: Sequence[str]) -> list[str]:
    """Flags that make the recipe write to, and read from, this quickstart's folder."""
    own = ["--out", str(out), "--name", "training", "--data.path", str(out / "data")]
    return [*own, *flags]


def _clear(out: Path) -> None:
    """Makes the folder; what an earlier quickstart left there is removed, nothing else ever is."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise ValueError(
                f"{out}: holds something that is not a quickstart's; choose another --out"
            )
        print(f"{out}: removing the earlier quickstart, starting afresh", flush=True)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text("Made by `mbv3dist quickstart`, which may clear this folder.\n")


def _score_untrained(config: TrainConfig, split: Split) -> float:
    torch.manual_seed(config.seed)
    spec, model = build_model(config, split.classes)
    result = evaluate(model, spec, split)
    return float(result["map_50"])


def _train(out: Path, *, processes: int, flags: Sequence[str]) -> None:
    """Starts the training as a user would; its progress bar goes to this terminal.

    Raises:
        ValueError: it failed; its own message stands above.
    """
    environ = dict(os.environ)
    # Each process its share of the cores: more threads than cores would only wait for each other.
    environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        _note(f"fewer GPUs than {processes} processes: training on the CPU")
        environ["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    command += ["-m", "mbv3dist", "train", str(RECIPE), *_flags(out, flags)]
    code = subprocess.run(command, env=environ, check=False).returncode
    if code != 0:
        raise ValueError(f"the training ended with exit code {code}; its message stands above")


def _choose_pictures(voc: Path, number: int) -> list[Path]:
    """The first test pictures as they come: one without objects, the others with some."""
    stems = (voc / "ImageSets/Main/test.txt").read_text().split()
    empty: list[str] = []
    full: list[str] = []
    for stem in stems:
        text = (voc / "Annotations" / f"{stem}.xml").read_text(encoding="utf-8")
        (full if "<object>" in text else empty).append(stem)
    chosen = full[: number - 1] + empty[:1]
    return [voc / "JPEGImages" / f"{stem}.jpg" for stem in chosen]


def _write_sheet(pictures: Sequence[Path], out: Path) -> None:
    opened = []
    for path in pictures:
        with Image.open(path) as picture:
            opened.append(picture.convert("RGB"))
    contact_sheet(opened, columns=4).save(out)


def _tell(out: Path, summary: dict[str, Any]) -> None:
    """Says what came out, where it lies, and what to type next."""
    model, data = summary["model"], summary["data"]
    lines = [
        "",
        f"mAP@50 {summary['map_50']:.3f} on the test pictures (untrained: "
        f"{summary['untrained_map_50']:.3f}), mAP {summary['map']:.3f}; "
        f"trained in {summary['train_seconds']:.0f} s, {summary['total_seconds']:.0f} s in all",
        "",
        "Look at:",
        f"  {out / 'pictures.png'}   what it finds on {len(summary['pictures'])} test pictures",
        f"  {out / 'metrics.png'}    how the training went",
        f"  {out / 'summary.json'}   the figures",
        f"  {model}   the model",
        "",
        "Type next:",
        f"  mbv3dist eval {model} {data} --split test",
        f"  mbv3dist predict {model} {out / 'voc/JPEGImages'} --out {out / 'predictions'}",
        f"  mbv3dist inspect {data}",
        "With pictures of your own, in VOC's layout as labelImg writes it:",
        "  mbv3dist convert voc MYDATA --out data/mine --split train --val-fraction 0.1",
        f"  torchrun --nproc-per-node 2 -m mbv3dist train {_shown(RECIPE)} "
        "--name mine --data.path data/mine",
    ]
    if shutil.which("mbv3dist") is None:
        lines.append(f"(first: source {Path(sys.executable).parent / 'activate'})")
    print("\n".join(lines), flush=True)


def _shown(path: Path) -> str:
    """The path from here, if it lies below; what a user would type."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _say(number: int, text: str) -> None:
    print(f"[{number}/6] {text}", flush=True)


def _note(text: str) -> None:
    print(f"      {text}", flush=True)


@contextmanager
def _progress(text: str) -> Iterator[Progress | None]:
    """A bar that vanishes when done, if the output is a terminal; else nothing."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import Progress as Bar

    with Bar(transient=True) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
