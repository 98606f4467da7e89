"""Coverage is the training's own matching; the fit finds what covers boxes better."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from mbv3dist.cli import main
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import open_split
from mbv3dist.data.joined import open_splits
from mbv3dist.data.loader import Loader
from mbv3dist.data.plan import Plan
from mbv3dist.models.anchor_fit import (
    SeenBoxes,
    cover,
    coverage_score,
    fit_anchors,
    map_best_iou,
)
from mbv3dist.models.anchors import AnchorConfig, make_anchors, recipe_anchors
from mbv3dist.models.loss import match_batch
from mbv3dist.models.ssdlite import feature_sizes
from mbv3dist.ops.boxes import anchors_to_pixels, box_iou
from mbv3dist.recipe import load_config
from mbv3dist.tools.anchors import judge_anchors
from mbv3dist.tools.drawn import make_drawn_dataset
from mbv3dist.viz.plots import _number_maps

STEPS_300 = (16.0, 32.0, 64.0, 100.0, 150.0, 300.0)


def random_seen(rng, *, size, counts=(3, 0, 5, 1), largest=1.0):
    total = sum(counts)
    side = (0.03 + rng.random((total, 2)) * (largest - 0.03)) * size
    corner = rng.random((total, 2)) * (size - side)
    boxes = np.concatenate((corner, corner + side), 1).astype(np.float32)
    starts = np.concatenate(([0], np.cumsum(counts)))
    return SeenBoxes(boxes, rng.integers(0, 3, total), starts, size)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([64, 128, 200, 300]),
    clip=st.booleans(),
    with_steps=st.booleans(),
    ratios=st.lists(st.floats(1.05, 5), max_size=2),
)
def test_the_nearest_anchor_of_a_shape_is_its_best(seed, size, clip, with_steps, ratios):
    """The fit's short cut finds the same best IoU as comparing with every anchor."""
    rng = np.random.default_rng(seed)
    scales = tuple(np.sort(rng.uniform(0.03, 1.2, 7)).tolist())
    steps = tuple(size / 300 * step for step in STEPS_300) if with_steps else ()
    config = AnchorConfig(scales=scales, ratios=tuple(ratios), steps=steps, clip=clip)
    seen = random_seen(rng, size=size, counts=(40,))
    canvas = (size, size)
    pixels = anchors_to_pixels(make_anchors(config, feature_sizes(canvas), size=canvas), canvas)
    per_anchor = box_iou(torch.from_numpy(seen.boxes), pixels).numpy()
    first = 0
    for k, (rows, columns) in enumerate(feature_sizes(canvas)):
        last = first + rows * columns * config.num_per_cell
        mine = map_best_iou(config, k, seen.boxes, size=size)
        np.testing.assert_allclose(mine, per_anchor[:, first:last].max(1), atol=2e-5)
        first = last


def test_coverage_counts_each_positive_anchor_once():
    rng = np.random.default_rng(0)
    seen = random_seen(rng, size=320, counts=(3, 0, 5, 1) * 9)
    found = cover(AnchorConfig(), seen)
    pixels = anchors_to_pixels(make_anchors(AnchorConfig(), feature_sizes((320, 320))), (320, 320))
    overlap = box_iou(torch.from_numpy(seen.boxes), pixels)
    np.testing.assert_allclose(found.best_iou, overlap.amax(1).numpy())
    assert found.positives.sum() == found.map_positives.sum()
    assert (found.positives >= 0).all()
    alone = np.flatnonzero(np.diff(seen.starts) == 1)
    for picture in alone:  # without competition: those above 0.5, or the forced one
        box = seen.starts[picture]
        assert found.positives[box] == max(1, int((overlap[box] >= 0.5).sum()))
    assert found.map_anchors.tolist() == [2400, 600, 150, 54, 24, 6]


def test_a_box_whose_only_anchor_another_took_is_unmatched():
    box = [100.0, 100.0, 104.0, 104.0]
    seen = SeenBoxes(np.array([box, box], np.float32), np.array([0, 1]), np.array([0, 2]), 320)
    assert cover(AnchorConfig(), seen).positives.tolist() == [0, 1]  # the last one wins


def test_the_fit_covers_what_the_usual_anchors_miss():
    """Small objects of two sizes, one class rare: torchvision's anchors miss them."""
    rng = np.random.default_rng(1)
    boxes = []
    for side, count in ((24, 40), (60, 400)):
        sides = side * rng.uniform(0.8, 1.25, (count, 2))
        corner = rng.random((count, 2)) * (320 - sides)
        boxes.append(np.concatenate((corner, corner + sides), 1))
    labels = np.repeat([0, 1], [40, 400])
    seen = SeenBoxes(np.concatenate(boxes).astype("f4"), labels, np.arange(441), 320)
    before = coverage_score(AnchorConfig(), [seen])
    fit = fit_anchors([seen], AnchorConfig())
    assert fit.score == pytest.approx(coverage_score(fit.config, [seen]))
    assert fit.score > before + 0.25
    assert list(fit.config.scales) == sorted(fit.config.scales)
    assert len(fit.config.ratios) == 2
    rare = cover(fit.config, seen).best_iou[labels == 0]
    assert (rare >= 0.5).mean() > 0.6 > (cover(AnchorConfig(), seen).best_iou[labels == 0]).max()
    assert fit_anchors([seen], AnchorConfig()) == fit
    assert len(fit_anchors([seen], AnchorConfig(), num_ratios=1).config.ratios) == 1


def test_the_fit_never_proposes_worse_and_keeps_steps():
    rng = np.random.default_rng(2)
    for seed in range(3):
        seen = random_seen(np.random.default_rng(seed), size=300, counts=(30,))
        scales = tuple(np.sort(rng.uniform(0.05, 1.1, 7)).round(2).tolist())
        start = AnchorConfig(scales=scales, ratios=(2.0,), steps=STEPS_300)
        fit = fit_anchors([seen], start)
        assert fit.score >= coverage_score(start, [seen]) - 2e-3  # of rounding
        assert fit.config.steps == STEPS_300


def test_no_boxes_no_fit():
    seen = SeenBoxes(np.zeros((0, 4), "f4"), np.zeros(0, int), np.zeros(3, int), 320)
    with pytest.raises(ValueError, match="no box"):
        fit_anchors([seen], AnchorConfig())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    make_drawn_dataset(root / "voc", num_train=24, num_val=6, num_test=6, num_workers=1)
    for split in ("train", "val"):
        convert_voc([root / "voc"], root / "data", split=split, workers=1)
    return root / "data"


RECIPE = """
data: {path: elsewhere, train_split: train, view: {name: ssd, zoom_out_max: 2.0}}
model: {architecture: ssdlite_mobilenetv3_small, input_size: 224, anchor_ratios: [1.5],
  anchor_scales: [0.1, 0.25, 0.38, 0.5, 0.7, 0.9, 1.0]}
"""


def test_judged_as_the_model_sees_them(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("mbv3dist.tools.anchors.MAX_EPOCHS", 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "out"
    result = judge_anchors(drawn, split=None, recipe=recipe, input_size=None, out=out)
    assert (result["input_size"], result["view"], result["split"]) == (224, "ssd", "train")
    assert list(result["anchors"]) == ["torchvision", "recipe", "proposal"]
    # The boxes of the training view are those that training's own loader yields.
    config = load_config(recipe, ["--data.path", str(drawn)])
    split = open_splits([str(drawn)], "train")
    plan = Plan(split.shard_sizes, global_batch_size=8, epochs=result["epochs"], seed=0)
    boxes, positives = 0, 0
    anchors = make_anchors(recipe_anchors(config.model), feature_sizes((224, 224)))
    with Loader(split, plan, view=config.data.view, size=224, seed=0, num_threads=1) as loader:
        for _, batch in loader:
            boxes += int((batch.labels >= 0).sum())
            targets = match_batch(anchors, batch.boxes, batch.labels, size=(224, 224))
            positives += int(targets.num_positives)
    seen = result["anchors"]["recipe"]["views"]["training"]
    assert seen["boxes"] == boxes
    assert sum(row["positives"] for row in seen["maps"]) == positives
    assert sum(row["boxes"] for row in seen["classes"].values()) == boxes
    evaluation = result["anchors"]["recipe"]["views"]["evaluation"]
    assert evaluation["boxes"] == split.num_boxes
    for figures in (seen, evaluation):
        assert figures["covered"] + figures["forced"] <= 1 + 1e-9
        assert sum(row["best_of"] for row in figures["maps"]) == pytest.approx(1, abs=1e-3)

    saved = json.loads((out / "anchors.json").read_text())
    assert saved["proposal"] == result["proposal"]
    for name in ("shapes.png", "coverage.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert str(out / name) in result["files"]

    # What is proposed can be pasted, and is judged as it said it would be.
    lines = result["lines"]
    place = lines.index("proposal, for the section `model` of a recipe:")
    recipe.write_text(
        "data: {path: x, view: {name: ssd}}\nmodel:\n" + "\n".join(lines[place + 1 : place + 3])
    )
    pasted = recipe_anchors(load_config(recipe).model)
    assert list(pasted.scales) == result["proposal"]["anchor_scales"]
    assert list(pasted.ratios) == result["proposal"]["anchor_ratios"]


def test_without_a_recipe_torchvisions_anchors_on_plain_pictures(drawn, tmp_path):
    result = judge_anchors(drawn, split="val", recipe=None, input_size=256, out=tmp_path / "a")
    assert list(result["anchors"]) == ["torchvision", "proposal"]
    views = result["anchors"]["torchvision"]["views"]
    assert list(views) == ["evaluation"]
    assert views["evaluation"]["boxes"] == open_split(drawn, "val").num_boxes
    gained = result["anchors"]["proposal"]["views"]["evaluation"]
    assert gained["best_iou"] > views["evaluation"]["best_iou"]


def test_nothing_is_written_unless_asked(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["anchors", str(drawn), "--split", "val"])
    assert not list(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "nothing was written; --out DIR draws plots and saves every figure"
    assert any(line.startswith("  anchor_scales: [") for line in lines)
    main(["anchors", str(drawn), "--split", "val", "--json"])
    assert json.loads(capsys.readouterr().out)["files"] == []


def test_a_file_in_the_way_is_named_before_any_work(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr("mbv3dist.tools.anchors.open_splits", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*file is a file; give a folder$"):
        judge_anchors(drawn, split="val", out=tmp_path / "file")
    with pytest.raises(ValueError, match=r"below: .*file is a file; give a folder$"):
        judge_anchors(drawn, split="val", out=tmp_path / "file" / "below")
    with pytest.raises(TypeError):  # a folder that can be made is not made before the work
        judge_anchors(drawn, split="val", out=tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_maps_whose_anchors_meet_share_a_label():
    axes = Figure().add_subplot()
    _number_maps(axes, [[(20, 30), (30, 20)], [(320, 230), (230, 320)], [(320, 225), (1, 9)]])
    assert [text.get_text() for text in axes.texts] == ["1", "2, 3"]
    assert [text.xy for text in axes.texts] == [(30, 20), (320, 230)]


def test_what_has_no_anchors_is_refused(drawn, classification_data, tmp_path):
    with pytest.raises(ValueError, match="classification data set"):
        judge_anchors(classification_data, split="train", out=tmp_path)
    recipe = tmp_path / "classifier.yaml"
    recipe.write_text(
        "data: {path: x, view: {name: center_crop}}\nmodel: {architecture: mobilenetv3_small}"
    )
    with pytest.raises(ValueError, match="classifier's recipe"):
        judge_anchors(drawn, recipe=recipe, out=tmp_path)
    with pytest.raises(ValueError, match="at least 32"):
        judge_anchors(drawn, split="val", input_size=8, out=tmp_path)
    model = "{architecture: ssdlite_mobilenetv3_small, input_size: 300, %s}"
    recipe.write_text(
        "data: {path: x, view: {name: ssd}}\nmodel: "
        + model % "anchor_steps: [16, 32, 64, 100, 150, 300]"
    )
    with pytest.raises(ValueError, match="anchor_steps are pixels of 300"):
        judge_anchors(drawn, split="val", recipe=recipe, input_size=320, out=tmp_path)
    recipe.write_text(
        "data: {path: x, view: {name: ssd}}\nmodel: " + model % "anchor_scales: [0.1, 0.5, 1.0]"
    )
    with pytest.raises(ValueError, match="give 7 scales"):
        judge_anchors(drawn, split="val", recipe=recipe, out=tmp_path)
