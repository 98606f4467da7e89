"""The valid files that mutation starts from: small, of every kind we read, made by our own code."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

SIDES = (24, 16)
CLASSES = ("cat", "dog", "red cell")
_BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
_XML = (
    '<annotation verified="yes">\n<folder>images</folder><filename>{name}</filename>\n'
    "<path>C:\\pictures\\{name}</path><source><database>Unknown</database></source>\n"
    "<size><width>24</width><height>16</height><depth>3</depth></size><segmented>0</segmented>\n"
    "{objects}</annotation>\n"
)
_OBJECT = (
    "<object><name>{name}</name><pose>Left</pose><truncated>1</truncated>"
    "<difficult>{difficult}</difficult>{box}"
    "<part><name>head</name>" + _BOX.format(3, 3, 6, 6) + "</part></object>\n"
)
RECIPES = (
    """# Detector
epochs: 3
seed: 7
data: {path: data, train_split: train, val_split: val, global_batch_size: 6, view: {name: ssd}}
model: {architecture: ssdlite_mobilenetv3_small, input_size: 64, width: 0.5}
optim: {lr: 0.01, warmup_epochs: 0.5, ema_decay: 0.9, milestones: [1, 2.5]}
eval: {every_epochs: 3, batch_size: 4}
checkpoint: {every_epochs: 0, every_steps: 1}
""",
    """name: cifar
out: runs
epochs: 5
resume: auto
mixed_precision: no
data:
  path: [data/a, data/b]
  weights: [1.0, 2]
  train_split: train
  global_batch_size: 64
  lanes: 8
  tail: drop
  error_budget: 2
  accept_changes: [decoder]
  view:
    name: random_resized_crop
    fill: [1, 2, 3]
    brightness: 0.4
model: &model
  architecture: mobilenetv3_small
  input_size: 32
  anchor_scales: [0.2, 0.5, 1.0]
optim:
  name: adamw
  lr: 1.0e-3
  base_lr: null
""",
)
FLAGS = (
    b"--optim.lr\n0.01\n--epochs=5\n--name\nx",
    b"--data.path\na\nb\n--data.weights\n1\n2\n--data.view.fill\n[1, 2, 3]",
    b"--optim.base_lr\nnone\n--mixed_precision\nno\n--data.lanes\n8",
)
URLS = (
    *(b"https://user:SECRETWORD@example.org:8080/data/voc?X-Amz-Signature=SECRETWORD", b"./data"),
    *(
        b"s3://bucket/data/voc/",
        b"gs://bucket/a b",
        b"hf://datasets/name/data",
        b"file:///data/voc",
    ),
    *(
        b"http://[::1]:80/data",
        b"pipe:cat data",
        b"C:\\data",
        b"simplecache::s3://b/k",
        b"gcs://b/k",
    ),
    *(b"https://example.org/a%2Fb/%2e%2e/c", b"http://example.org/#x", b"HTTPS://EXAMPLE.org/data"),
)


@dataclass(frozen=True)
class Case:
    """One input: files that are put into the sandbox, and what the target does with them."""

    target: str
    files: dict[str, bytes]
    options: dict[str, Any]


def picture(number: int, mode: str = "RGB", size: tuple[int, int] = SIDES) -> Image.Image:
    """Return a gradient with a little noise."""
    rng = random.Random(number)
    width, height = size
    values = bytes(
        min(255, (x * 9 * (channel + 1) + y * 5 + rng.randrange(12)) % 256)
        for y in range(height)
        for x in range(width)
        for channel in range(3)
    )
    return Image.frombytes("RGB", size, values).convert(mode)


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """Return a picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def annotation(name: str, number: int) -> bytes:
    """Return a VOC annotation of zero to two objects."""
    objects = ""
    for place in range(number % 3):
        box = _BOX.format(2 + place, 3, 12 + number + place, 14)
        label = CLASSES[(number + place) % 3]
        objects += _OBJECT.format(name=label, difficult=place, box=box)
    return _XML.format(name=name, objects=objects).encode()


def _jpegs() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    plain = picture(1)
    found = [
        encode(plain, "JPEG", quality=90),
        encode(plain, "JPEG", quality=90, subsampling=0, progressive=True),
        encode(plain, "JPEG", quality=90, restart_marker_blocks=2, comment=b"comment"),
        encode(picture(2, "L"), "JPEG"),
        encode(picture(3, "CMYK"), "JPEG"),
        encode(plain, "JPEG", exif=exif, optimize=True, dpi=(72, 72)),
        encode(plain, "JPEG", icc_profile=b"\0" * 200),
        encode(plain, "MPO", save_all=True, append_images=[picture(4)]),
    ]
    return found


def _pngs() -> list[bytes]:
    plain, exif = picture(5), Image.Exif()
    exif[0x0112] = 3
    return [
        encode(plain, "PNG", exif=exif),
        encode(picture(6, "RGBA"), "PNG"),
        encode(picture(7, "P"), "PNG", transparency=0),
        encode(picture(8, "L"), "PNG", transparency=3),
        encode(picture(9, "1"), "PNG"),
        encode(picture(10, "I").convert("I;16"), "PNG"),
        encode(plain, "PNG", save_all=True, append_images=[picture(11)]),
    ]


def _webps() -> list[bytes]:
    plain, exif = picture(12), Image.Exif()
    exif[0x0112] = 8
    return [
        encode(plain, "WEBP", quality=80),
        encode(plain, "WEBP", lossless=True, exif=exif),
        encode(picture(13, "RGBA"), "WEBP", quality=50),
        encode(plain, "WEBP", save_all=True, append_images=[picture(14)]),
    ]


def _other_pictures() -> list[bytes]:
    plain = picture(15)
    return [
        encode(plain, "GIF"),
        encode(plain, "GIF", save_all=True, append_images=[picture(16)]),
        encode(plain, "BMP"),
        encode(picture(17, "P"), "BMP"),
        encode(plain, "TIFF"),
        encode(plain, "TIFF", compression="tiff_lzw"),
        encode(plain, "TIFF", compression="tiff_adobe_deflate"),
        encode(plain, "TIFF", compression="jpeg"),
        encode(picture(18, "1"), "TIFF", compression="group4"),
        encode(picture(19, "I").convert("I;16"), "TIFF"),
        encode(picture(20, "F"), "TIFF"),
        encode(picture(21, "CMYK"), "TIFF"),
        encode(plain, "TIFF", save_all=True, append_images=[picture(22)]),
    ]


class Seeds:
    """All valid files; what needs conversion or torch is made when it is first asked for.

    Args:
        folder: Where data sets and a run are made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures = {
            "jpeg": _jpegs(),
            "png": _pngs(),
            "webp": _webps(),
            "picture": _other_pictures(),
        }

    @cached_property
    def annotations(self) -> list[bytes]:
        """XML files."""
        return [annotation(f"{number}.jpg", number) for number in range(1, 6)]

    @cached_property
    def voc(self) -> dict[str, bytes]:
        """A VOC folder: six annotated pictures of several formats, a list, no labels.txt."""
        forms = [("jpeg", 0), ("jpeg", 1), ("png", 1), ("webp", 0), ("jpeg", 5), ("png", 0)]
        files = {"ImageSets/Main/train.txt": "".join(f"{n}\n" for n in range(6)).encode()}
        for number, (form, which) in enumerate(forms):
            suffix = {"jpeg": "jpg"}.get(form, form)
            files[f"JPEGImages/{number}.{suffix}"] = self.pictures[form][which]
            files[f"Annotations/{number}.xml"] = annotation(f"{number}.{suffix}", number)
        return files

    @cached_property
    def imagefolder(self) -> dict[str, bytes]:
        """Two class folders, a list of classes beside them."""
        files = {"labels.txt": b"cat\ndog\n", "cat/notes.txt": b"x"}
        for number, form in enumerate(("jpeg", "png", "webp", "picture", "jpeg", "jpeg")):
            suffix = {"jpeg": "jpg", "picture": "gif"}.get(form, form)
            which = number % len(self.pictures[form]) if form == "jpeg" else 0
            files[f"{('cat', 'dog')[number % 2]}/{number}.{suffix}"] = self.pictures[form][which]
        return files

    @cached_property
    def datasets(self) -> dict[str, dict[str, bytes]]:
        """For each task a converted data set, in two shards, with a manifest."""
        return {task: self._convert(task) for task in ("detection", "classification")}

    def _convert(self, task: str) -> dict[str, bytes]:
        from mbv3dist.convert.voc import convert_voc
        from mbv3dist.data import manifest

        source, out = self.folder / f"source-{task}", self.folder / f"data-{task}"
        write_files(source, self.voc)
        usual = manifest.MIN_SHARDS
        manifest.MIN_SHARDS = 1
        try:
            convert_voc(source, out, split="train", task=task, workers=1, shard_bytes=6000)
        finally:
            manifest.MIN_SHARDS = usual
        files = read_files(out)
        assert "train/000001.tar" in files and "train.manifest" in files, sorted(files)
        return files

    @cached_property
    def split(self) -> Any:
        """The opened split of the data set for detection."""
        from mbv3dist.data.index import open_split

        assert self.datasets
        return open_split(self.folder / "data-detection", "train")

    @cached_property
    def samples(self) -> dict[str, list[tuple[bytes, bytes]]]:
        """Picture and target of every sample of each data set."""
        from mbv3dist.data.index import open_split
        from mbv3dist.data.reader import Reader

        found = {}
        for task in self.datasets:
            split = open_split(self.folder / f"data-{task}", "train")
            with Reader(split) as reader:
                pairs = [reader.read(index) for index in range(len(split))]
            found[task] = [(bytes(image), bytes(target)) for image, target in pairs]
        return found

    @cached_property
    def run(self) -> Any:
        """A training run, stopped after two steps, prepared to be resumed."""
        from dataclasses import replace

        from mbv3dist.recipe import load_config
        from mbv3dist.training.run import train
        from mbv3dist.training.setup import prepare

        assert self.datasets
        recipe = self.folder / "tiny.yaml"
        recipe.write_text(
            f"out: {self.folder / 'runs'}\nepochs: 2\n"
            f"data: {{path: {self.folder / 'data-classification'}, global_batch_size: 4}}\n"
            "model: {architecture: mobilenetv3_small, input_size: 32, width: 0.1}\n"
            "optim: {lr: 0.01, ema_decay: 0.9}\n"
            "tracking: {log_every_steps: 1}\n"
        )
        config = load_config(recipe)
        train(config)
        return prepare(replace(config, resume="auto"))

    @cached_property
    def checkpoint(self) -> dict[str, bytes]:
        """Files of a checkpoint."""
        from mbv3dist.training.checkpoint import list_checkpoints

        return read_files(list_checkpoints(self.run.config.run_dir)[-1])

    @cached_property
    def data_state(self) -> bytes:
        """The loader's state, as in a checkpoint."""
        state = json.loads(self.checkpoint["state.json"])["data"]
        return json.dumps(state, indent=1).encode()

    @cached_property
    def models(self) -> list[dict[str, bytes]]:
        """Model directories: a classifier and a detector."""
        import torch

        from mbv3dist.models.directory import model_from_spec, new_spec, save_model

        torch.manual_seed(0)
        found = []
        for name, size in (("mobilenetv3_small", 32), ("ssdlite_mobilenetv3_small", 64)):
            spec = new_spec(name, CLASSES, input_size=size, width=0.1)
            save_model(model_from_spec(spec), spec, self.folder / name)
            found.append(read_files(self.folder / name))
        return found

    @cached_property
    def pickles(self) -> list[bytes]:
        """Weights as torch writes them: its zip, its older format, wrapped, of several types."""
        import torch

        state = {"conv_stem.weight": torch.arange(6.0).reshape(2, 3), "bn1.bias": torch.ones(3)}
        values = [
            state,
            {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
            {"state_dict": state, "a": [1, (2.5, None), {"b"}]},
            {"x": torch.ones(4, dtype=torch.float16), "y": torch.ones(2).bool()},
        ]
        found = []
        for value in values:
            for zipped in (True, False):
                buffer = io.BytesIO()
                torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
                found.append(buffer.getvalue())
        return found

    @cached_property
    def safetensors(self) -> list[bytes]:
        """Weights in safetensors files."""
        return [files["model.safetensors"] for files in self.models]


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def read_files(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder by their names in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
