"""Small data sets and processes for the tests; nothing outside the test's folder is touched."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# Before torch is imported: two test workers with a thread per core each would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import pytest
from PIL import Image, ImageDraw

COLOURS = {"blue": (40, 60, 220), "green": (30, 170, 60), "red": (220, 50, 40)}
NUM_PICTURES = 19  # prime, so that nothing divides it


def draw_picture(rng: np.random.Generator, num_boxes: int) -> tuple[Image.Image, list[tuple]]:
    """A noisy 96 x 64 picture with coloured rectangles, and (name, x0, y0, x1, y1) of each."""
    noise = rng.integers(90, 160, (64, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    boxes = []
    for _ in range(num_boxes):
        name = sorted(COLOURS)[rng.integers(3)]
        width, height = rng.integers(12, 40, 2)
        x, y = rng.integers(0, 96 - width), rng.integers(0, 64 - height)
        box = (int(x), int(y), int(x + width), int(y + height))
        ImageDraw.Draw(picture).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), COLOURS[name])
        boxes.append((name, *box))
    return picture, boxes


def write_voc(root: Path, *, num_pictures: int = NUM_PICTURES, seed: int = 0) -> Path:
    """A Pascal VOC folder: two thirds in train, the rest in val; every fifth picture is empty."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = []
    for number in range(num_pictures):
        name = f"picture_{number:03d}"
        picture, boxes = draw_picture(rng, 0 if number % 5 == 4 else 1 + number % 3)
        picture.save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        objects = "".join(
            f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin>"
            f"<ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, x0, y0, x1, y1 in boxes
        )
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>96</width>"
            f"<height>64</height><depth>3</depth></size>{objects}</annotation>"
        )
        names.append(name)
    cut = num_pictures * 2 // 3
    lists = {"train": names[:cut], "val": names[cut:], "trainval": names}
    for split, members in lists.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(members) + "\n")
    return root


def write_imagefolder(root: Path, *, per_class: int = 7, seed: int = 0) -> Path:
    """A folder per colour with noisy pictures of that colour."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255)
            path = root / name / f"{number}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(path, quality=92)
    return root


def pytest_report_header() -> str:
    """Say what serves the tests of remote shards."""
    nginx = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return f"http server: {nginx or 'a range server of our own (no nginx here)'}"


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    """Seeds torch, where a test's file has imported it, so that no test passes by luck."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def voc_folder(tmp_path_factory) -> Path:
    """A Pascal VOC folder with 19 pictures of 3 classes."""
    return write_voc(tmp_path_factory.mktemp("voc") / "VOCdemo")


@pytest.fixture(scope="session")
def detection_data(voc_folder, tmp_path_factory) -> Path:
    """The VOC folder as shards: splits train and val."""
    from mbv3dist.convert.voc import convert_voc

    out = tmp_path_factory.mktemp("detection") / "data"
    for split in ("train", "val"):
        convert_voc([voc_folder], out, split=split, workers=1)
    return out


@pytest.fixture(scope="session")
def classification_data(tmp_path_factory) -> Path:
    """Three colours as shards: splits train (21 samples) and val (9)."""
    from mbv3dist.convert.imagefolder import convert_imagefolder

    root = tmp_path_factory.mktemp("classification")
    for split, per_class in (("train", 7), ("val", 3)):
        source = write_imagefolder(root / split, per_class=per_class, seed=per_class)
        convert_imagefolder(source, root / "data", split=split, workers=1)
    return root / "data"


DETECTION_RECIPE = """
epochs: 3
data: {path: %s, train_split: train, val_split: val, global_batch_size: 6, view: {name: ssd}}
model: {architecture: ssdlite_mobilenetv3_small, input_size: 64, width: 0.5, min_negatives: 5}
optim: {lr: 0.01, warmup_epochs: 0.5, ema_decay: 0.9}
eval: {every_epochs: 3, batch_size: 4}
checkpoint: {every_epochs: 0, every_steps: 1}
tracking: {log_every_steps: 1}
"""

CLASSIFICATION_RECIPE = """
epochs: 3
data:
  path: %s
  train_split: train
  val_split: val
  global_batch_size: 6
  view: {name: random_resized_crop, brightness: 0.2}
model: {architecture: mobilenetv3_small, input_size: 32, width: 0.5}
optim: {name: adam, lr: 0.001}
eval: {every_epochs: 3}
checkpoint: {every_epochs: 0, every_steps: 1}
tracking: {log_every_steps: 1}
"""


@pytest.fixture
def detection_recipe(detection_data, tmp_path) -> Path:
    """A recipe that trains a tiny detector in seconds."""
    path = tmp_path / "tiny_detector.yaml"
    path.write_text(DETECTION_RECIPE % detection_data)
    return path


@pytest.fixture
def classification_recipe(classification_data, tmp_path) -> Path:
    """A recipe that trains a tiny classifier in seconds."""
    path = tmp_path / "tiny_classifier.yaml"
    path.write_text(CLASSIFICATION_RECIPE % classification_data)
    return path


def environment() -> dict[str, str]:
    """This process's environment without a launcher's and without GPUs, one thread each."""
    launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "WANDB_MODE")
    env = {k: v for k, v in os.environ.items() if k not in launcher}
    return {**env, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}


def run_mbv3dist(
    *words: object,
    processes: int = 0,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Runs the command, plainly or on `processes` ranks under torchrun; `env` is added."""
    return subprocess.run(
        command_line(words, processes=processes),
        env={**environment(), **(env or {})},
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def command_line(words: Sequence[object], *, processes: int = 0) -> list[str]:
    """`python -m mbv3dist WORDS`, under torchrun if `processes` is not 0."""
    launcher = [sys.executable, "-m"]
    if processes:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    return [*launcher, "mbv3dist", *map(str, words)]


def kill_when(
    words: Sequence[object],
    condition: Path,
    *,
    processes: int = 0,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> None:
    """Starts the command and kills it, ranks included, as soon as `condition` exists."""
    process = subprocess.Popen(
        command_line(words, processes=processes),
        env={**environment(), **(env or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + timeout
    while not condition.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {condition}"
        assert time.monotonic() < deadline, f"{condition} did not appear"
        time.sleep(0.01)
    kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes], *, number: int = signal.SIGKILL) -> None:
    """Signals a process and all it started; torchrun's workers live in sessions of their own."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    psutil.wait_procs(family, timeout=60)
    process.wait()
