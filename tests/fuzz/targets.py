"""Parsers, one function for each: an input is accepted, or refused as `sandbox.error_problem` says.

Each target has `make`, which mutates valid files, and `run`, which feeds them to our code and
raises `Finding` if what was accepted is not what it should be. Models and checkpoints are in
`targets_models.py`, whole commands in `pipelines.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import numpy as np

from .mutate import LINES, TEXTS, mutate, one_of
from .sandbox import Target, check_text, require
from .seeds import FLAGS, RECIPES, URLS, Case, Seeds

SECRET = "SECRETWORD"
_LARGE_PICTURE = 4_000_000  # pixels; larger ones are decoded but not worked on


# Annotations, pictures


def make_xml(rng: Random, seeds: Seeds) -> Case:
    """Mutate a VOC annotation."""
    return Case("xml", {"input": mutate(rng, "xml", seeds.annotations)}, {})


def run_xml(case: Case, box: Path, seeds: Seeds) -> bool:
    """Parse an annotation."""
    from mbv3dist.convert.voc_xml import parse_annotation

    found = parse_annotation(case.files["input"])
    for item in found.objects:
        x0, y0, x1, y1 = item.half_open
        require(all(map(math.isfinite, (x0, y0, x1, y1))), f"box {item.corners}")
        require(bool(item.name) and item.name in found.names, f"name {item.name!r}")
    for reason in found.refused:
        check_text(reason)
    require("/" not in found.filename, f"filename {found.filename!r}")
    return True


def _make_picture(target: str) -> Callable[[Random, Seeds], Case]:
    def make(rng: Random, seeds: Seeds) -> Case:
        kind = rng.choice(("jpeg", "jpeg", "jpeg", "png", "png", "webp", "picture"))
        options = {"seed": rng.randrange(2**32)}
        return Case(target, {"input": mutate(rng, kind, seeds.pictures[kind])}, options)

    return make


def run_picture(case: Case, box: Path, seeds: Seeds) -> bool:
    """Decode a picture as convert does, and encode it again."""
    from mbv3dist.convert.pictures import encode_jpeg, load_picture
    from mbv3dist.data.decode import Picture

    picture = load_picture(case.files["input"])
    width, height = picture.image.size
    require(picture.image.mode == "RGB" and min(width, height) > 0, f"{picture}")
    if width * height <= _LARGE_PICTURE:
        again = Picture(encode_jpeg(picture.image, quality=90, full_chroma=True))
        require((again.width, again.height) == (width, height), "size after encoding")
    if picture.clean:  # its bytes are kept: training decodes the same
        kept = Picture(case.files["input"])
        require((kept.width, kept.height) == (width, height), "size when read")
        kept.image()
    return True


def run_view(case: Case, box: Path, seeds: Seeds) -> bool:
    """Decode a picture as training does, by Pillow and by the fast lane, and draw a view of it."""
    from mbv3dist.config import ViewConfig
    from mbv3dist.data.decode import Picture
    from mbv3dist.data.draws import Draws
    from mbv3dist.data.pixels import Pictures
    from mbv3dist.data.views import make_view

    seed = case.options["seed"]
    name = ("ssd", "resize", "random_resized_crop", "center_crop")[seed % 4]
    picture = Picture(case.files["input"])
    width, height = picture.width, picture.height
    boxes = np.array([[1, 1, width, height]], np.float32)
    draws = Draws(seed, epoch=0, sample=0)
    config = ViewConfig(name=name)  # type: ignore[arg-type]
    view, _ = make_view(config, width=width, height=height, size=32, boxes=boxes, draws=draws)
    canvases = np.zeros((1, 32, 32, 3), np.uint8)
    chunk = Pictures([memoryview(case.files["input"])])
    require(chunk.sizes.tolist() == [[width, height]], f"{chunk.sizes} for {width} x {height}")
    chunk.draw(
        np.array([view.src], np.float64),
        np.array([view.dst], np.int32),
        np.array([view.flip]),
        canvases=canvases,
        places=np.zeros(1, np.int64),
        fill=config.fill,
    )
    picture.draw(view, canvases[0])  # may find damage below what the view shows
    require(not chunk.errors, f"{chunk.errors}")
    return True


# Index, targets, splits


def make_idx(rng: Random, seeds: Seeds) -> Case:
    """Mutate an `.idx`."""
    task = rng.choice(("detection", "classification"))
    files = [data for name, data in seeds.datasets[task].items() if name.endswith(".idx")]
    return Case("idx", {"input": mutate(rng, "idx", files)}, {})


def run_idx(case: Case, box: Path, seeds: Seeds) -> bool:
    """Parse an index."""
    from mbv3dist.data.idx import parse_idx

    index = parse_idx(case.files["input"], Path("train/000000.idx"))
    for column in ("image_offset", "image_size", "target_offset", "target_size"):
        values = getattr(index, column)
        require(values.dtype == np.int64 and values.shape == (len(index),), column)
    check_text(f"{index.image_ext} {index.target_ext} {index.first_key}")
    return True


TARGETS = (
    b'{"width":24,"height":16,"boxes":[[1,2,12,14],[2.5,2,13.25,14]],"labels":[1,0],'
    b'"difficult":[0,1]}',
    b'{"width":24,"height":16,"boxes":[],"labels":[],"difficult":[]}',
)


def make_target(rng: Random, seeds: Seeds) -> Case:
    """Mutate a target member."""
    if rng.random() < 0.25:
        data = mutate(rng, "lines", [b"0", b"2", b"17"])
        return Case("target", {"input": data}, {"task": "classification"})
    return Case("target", {"input": mutate(rng, "json", TARGETS)}, {"task": "detection"})


def run_target(case: Case, box: Path, seeds: Seeds) -> bool:
    """Parse a target."""
    from mbv3dist.data.target import parse_target

    task = case.options["task"]
    target = parse_target(memoryview(case.files["input"]), task, num_classes=3)
    if task == "classification":
        require(0 <= target.label < 3, f"label {target.label}")
        return True
    count = len(target.labels)
    require(target.boxes.shape == (count, 4) and target.difficult.shape == (count,), "shapes")
    require(bool(np.isfinite(target.boxes).all()), "a box is not finite")
    require(bool(((target.labels >= 0) & (target.labels < 3)).all()), "a class is not there")
    require(target.width > 0 and target.height > 0, "size")
    require(bool((target.boxes[:, :2] <= target.boxes[:, 2:]).all()), "a box is turned inside out")
    require(json.loads(case.files["input"])["labels"] == target.labels.tolist(), "labels differ")
    return True


def make_split(rng: Random, seeds: Seeds) -> Case:
    """Mutate `SPLIT.json`, sometimes its manifest."""
    files = dict(seeds.datasets[rng.choice(("detection", "classification"))])
    names = {name: data for name, data in files.items() if "/" not in name}
    if rng.random() < 0.25:
        names["train.manifest"] = mutate(rng, "bytes", [names["train.manifest"]])
    else:
        names["train.json"] = mutate(rng, "json", [names["train.json"]])
        del names["train.manifest"]
    return Case("split", {**names, "train/keep": b""}, {})


def run_split(case: Case, box: Path, seeds: Seeds) -> bool:
    """Open a split, describe it and plan with it."""
    from mbv3dist.convert.inspect import inspect_dataset
    from mbv3dist.data.index import open_split
    from mbv3dist.data.plan import Plan

    folder = box / "in"
    split = open_split(folder, "train")
    require(len(split) >= 0 and len(split.fingerprint) == 64, "length or fingerprint")
    for shard in split.shards:
        inside = shard.path.resolve().is_relative_to(folder.resolve())
        require(inside, f"a shard lies elsewhere: {shard.path}")
    for name in split.classes:
        check_text(f"class {name}")
    require("train" in inspect_dataset(folder)["splits"], "inspect leaves it out")
    plan = Plan(split.shard_sizes, global_batch_size=4, epochs=1)
    for index in plan.step(0).index[:2].tolist():
        check_text(split.key(index))
        split.source(index)
    return True


def make_report(rng: Random, seeds: Seeds) -> Case:
    """Mutate the report beside a split."""
    files = seeds.datasets["detection"]
    assert seeds.split, "opened before anybody watches"
    report = json.loads(files["train.report.json"])
    report["problems"] = [{"file": "a.xml", "reason": "no area", "kind": "bad_box"}]
    report["counts"] = {"kept": 3, "reencoded_png": 2}
    data = mutate(rng, "json", [json.dumps(report, indent=1).encode()])
    return Case("report", {"data/train.report.json": data}, {})


def run_report(case: Case, box: Path, seeds: Seeds) -> bool:
    """Read a report and print it as convert does when there is nothing to do."""
    from mbv3dist.convert.publish import read_report
    from mbv3dist.convert.records import ConvertReport
    from mbv3dist.convert.summary import summary_lines

    split = dataclasses.replace(seeds.split, root=box / "in" / "data")
    report = read_report(split)
    if report is None:
        return False
    whole = ConvertReport(split.root, split.task, split.classes, {"train": report}, reused=True)
    for line in summary_lines(whole, "data"):
        check_text(line)
    return True


# Recipes, flags, URLs, lists


def make_recipe(rng: Random, seeds: Seeds) -> Case:
    """Mutate a recipe."""
    data = mutate(rng, "yaml", [text.encode() for text in RECIPES])
    return Case("recipe", {"recipe.yaml": data}, {})


def run_recipe(case: Case, box: Path, seeds: Seeds) -> bool:
    """Read a recipe with flags; written out and read again it must be the same."""
    import yaml

    from mbv3dist.recipe import config_to_dict, load_config

    config = load_config(box / "in" / "recipe.yaml", case.options.get("flags", ()))
    path = box / "out" / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")
    require(load_config(path) == config, "the recipe as written by a run is another")
    return True


def make_flags(rng: Random, seeds: Seeds) -> Case:
    """Mutate the words behind a good recipe."""
    data = mutate(rng, "lines" if rng.random() < 0.5 else "yaml", FLAGS)
    words = data.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")
    return Case("flags", {"recipe.yaml": RECIPES[0].encode()}, {"flags": words})


def make_url(rng: Random, seeds: Seeds) -> Case:
    """Mutate a URL."""
    data = one_of(rng, LINES, rng.choice(URLS)) if rng.random() < 0.9 else rng.choice(URLS)
    if rng.random() < 0.3:
        data += rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return Case("url", {"input": data}, {})


def run_url(case: Case, box: Path, seeds: Seeds) -> bool:
    """Check a URL, show it and find a place for it."""
    from mbv3dist.data import urls

    text = case.files["input"].decode("utf-8", "surrogateescape")
    urls.redact(text)
    if not urls.is_url(text):
        urls.to_local(text)
        return False
    try:
        url = urls.check_url(text)
    except ValueError as error:
        if f"://user:{SECRET}@" in text:
            require(f"user:{SECRET}@" not in str(error), f"shows a password: {error}")
        raise
    require(urls.check_url(url) == url, f"checked twice it is another: {url!r}")
    require(not url.startswith(("pipe", "file")), f"takes {url!r}")
    folder = urls.mirror_folder(url, box)
    require(folder.parent == box and folder.name not in ("", ".", ".."), f"mirror {folder}")
    check_text(folder.name)
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    if SECRET in user + parts.query and SECRET not in host + parts.path:
        require(SECRET not in folder.name and SECRET not in urls.redact(url), f"shows {url!r}")
    require("shard.tar" in urls.join_url(url, "train/shard.tar"), "joined")
    return True


def make_list(rng: Random, seeds: Seeds) -> Case:
    """Mutate a file of class names."""
    data = mutate(rng, "lines", [b"cat\ndog\nred cell\n", "caf\u00e9\r\n\u732b\n".encode()])
    return Case("list", {"classes.txt": data}, {})


def run_list(case: Case, box: Path, seeds: Seeds) -> bool:
    """Read a file of class names."""
    from mbv3dist.data.class_names import read_class_file

    names = read_class_file(box / "in" / "classes.txt")
    require(len(set(names)) == len(names) > 0, "names")
    for name in names:
        check_text(name)
    return True


PARSERS: dict[str, Target] = {
    "xml": Target(make_xml, run_xml, 3.0),
    "picture": Target(_make_picture("picture"), run_picture, 2.6, headroom=3 << 30),
    "view": Target(_make_picture("view"), run_view, 1.6, headroom=3 << 30),
    "idx": Target(make_idx, run_idx, 1.4),
    "target": Target(make_target, run_target, 1.5),
    "split": Target(make_split, run_split, 1.6, on_disk=True),
    "report": Target(make_report, run_report, 0.3, on_disk=True),
    "recipe": Target(make_recipe, run_recipe, 2.2, on_disk=True),
    "flags": Target(make_flags, run_recipe, 0.5, on_disk=True),
    "url": Target(make_url, run_url, 0.8),
    "list": Target(make_list, run_list, 0.3, on_disk=True),
}
