"""Drawings: boxes, labels inside the picture, sheets, plots."""

import json

import numpy as np
import pytest
from PIL import Image, ImageChops

from mbv3dist.viz import draw, plots
from mbv3dist.viz.draw import _place, class_color, contact_sheet, draw_boxes, draw_classes
from mbv3dist.viz.plots import plot_class_scores, plot_training, read_metrics

CLASSES = tuple(f"class{i}" for i in range(60))
GREY = (128, 128, 128)


def blank(width=400, height=300, mode="RGB"):
    return Image.new("RGB", (width, height), GREY).convert(mode)


def changed(drawn, before):
    """Box around all pixels that differ."""
    return ImageChops.difference(drawn, before).getbbox()


def test_colours_are_distinct_and_fixed():
    colours = [class_color(label) for label in range(60)]
    assert colours == [class_color(label) for label in range(60)]
    assert len(set(colours)) == 60
    first = np.array(colours[:12], dtype=int)
    distance = np.abs(first[:, None] - first[None]).sum(axis=2) + 1000 * np.eye(12, dtype=int)
    assert distance.min() >= 60


def test_box_is_drawn_where_it_is():
    before = blank()
    drawn = draw_boxes(before, [[100, 120, 200, 220]], [3], classes=CLASSES, scores=[0.87])
    colour = class_color(3)
    for x, y in ((100, 200), (199, 200), (150, 219), (100, 219)):
        assert drawn.getpixel((x, y)) == colour
    for x, y in ((99, 200), (200, 200), (150, 220), (150, 180)):
        assert drawn.getpixel((x, y)) == GREY
    assert before.getpixel((100, 200)) == GREY
    assert drawn.size == before.size
    left, upper, right, lower = changed(drawn, before)
    assert (left, right, lower) == (100, 200, 220)
    assert 90 < upper < 120  # the label stands above the box


def test_drawing_is_deterministic():
    boxes, labels, scores = [[10, 10, 90, 90], [50, 40, 120, 110]], [0, 1], [0.5, 0.9]
    first, second = (
        draw_boxes(blank(), boxes, labels, classes=CLASSES, scores=scores) for _ in range(2)
    )
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_any_mode_of_picture(mode):
    drawn = draw_boxes(blank(mode=mode), [[5, 5, 50, 50]], [0], classes=CLASSES)
    assert drawn.mode == "RGB"


def test_boxes_at_and_beyond_the_edges_and_without_area():
    boxes = [[-50, -50, 500, 400], [399.9, 299.9, 400, 300], [20, 20, 20, 20], [390, 0, 400, 5]]
    drawn = draw_boxes(blank(), boxes, [0, 1, 2, 3], classes=CLASSES, scores=[0.1, 0.2, 0.3, 0.4])
    assert drawn.size == (400, 300)


def test_no_boxes_leaves_the_picture():
    before = blank()
    assert changed(draw_boxes(before, [], [], classes=CLASSES, scores=[]), before) is None


def test_small_pictures_are_enlarged_by_a_whole_factor():
    assert draw_boxes(blank(32, 32), [[0, 0, 9, 9]], [0], classes=CLASSES).size == (320, 320)
    assert draw_classes(blank(50, 30), [("cat", 0.5)]).size == (350, 210)
    assert draw_classes(blank(50, 30), [("cat", 0.5)], min_side=0).size == (50, 30)


def test_labels_stay_inside_and_apart():
    rng = np.random.default_rng(0)
    canvas = (300, 200)
    for _ in range(200):
        taken = []
        for _ in range(3):
            x, y = rng.integers(0, 290), rng.integers(0, 190)
            box = (int(x), int(y), int(x) + 10, int(y) + 10)
            size = (int(rng.integers(10, 300)), int(rng.integers(8, 30)))
            left, upper, right, lower = _place(box, size, canvas, taken)
            assert left >= 0
            assert upper >= 0
            assert right <= canvas[0]
            assert lower <= canvas[1]
            assert (right - left, lower - upper) == size
            taken.append((left, upper, right, lower))
    one = _place((50, 50, 90, 90), (40, 12), canvas, [])
    other = _place((50, 50, 90, 90), (40, 12), canvas, [one])
    assert one == (50, 38, 90, 50)
    assert other[1] >= 50


def test_long_names_are_cut():
    long = ("a name that is far too long for this picture " * 5,)
    before = blank(120, 400)
    drawn = draw_boxes(before, [[60, 100, 110, 150]], [0], classes=long, scores=[0.5])
    left, _, right, _ = changed(drawn, before)
    assert 0 <= left < right <= 120
    drawn = draw_classes(before, [(long[0], 0.5), ("x", 0.1)])
    assert changed(drawn, before)[2] <= 120


@pytest.mark.parametrize(
    ("score", "text"),
    [(1, "100%"), (0.87, "87%"), (0.01, "1%"), (0.0042, "0.4%"), (0.0001, "<0.1%"), (0, "0%")],
)
def test_small_scores_keep_a_digit(score, text, monkeypatch):
    written = []
    fitted = draw._fitted
    monkeypatch.setattr(draw, "_fitted", lambda t, *rest: written.append(t) or fitted(t, *rest))
    draw_classes(blank(), [("cat", score)])
    draw_boxes(blank(), [[5, 5, 50, 50]], [0], classes=CLASSES, scores=[score])
    assert written == [f"{text}  cat", f"class0 {text}"]


def test_class_lines_do_not_leave_a_low_picture():
    before = blank(640, 20)
    drawn = draw_classes(before, [(name, 0.1) for name in CLASSES[:5]])
    assert drawn.size == (640, 20)
    assert draw_classes(before, []).tobytes() == before.tobytes()


def test_contact_sheet_holds_every_picture():
    pictures = [Image.new("RGB", (30 + 10 * i, 40), class_color(i)) for i in range(5)]
    sheet = contact_sheet(pictures, columns=2, cell=60, gap=4)
    assert sheet.width == 2 * 60 + 3 * 4
    colours = {colour for _, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert {class_color(i) for i in range(5)} <= colours
    captioned = contact_sheet(pictures, columns=2, cell=60, gap=4, captions=["name"] * 5)
    assert captioned.height > sheet.height
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def records():
    train = [
        {
            "kind": "train",
            "step": step,
            "epoch": step / 10,
            "loss": 5 / step,
            "loss_regression": 2 / step,
            "loss_classification": 3 / step,
            "lr": 0.01,
            "images_per_s": 50.0,
            "data_wait": 0.01,
        }
        for step in range(1, 30)
    ]
    val = [
        {"kind": "val", "step": 10 * n, "epoch": n, "loss": None, "map": n / 9, "map_50": None}
        for n in range(1, 3)
    ]
    return train + val


def test_training_plot_from_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(record) for record in records()]
    path.write_text("\n".join(lines) + '\n{"kind": "tra')  # cut short by a kill
    assert read_metrics(path) == records()
    out = plot_training(path, tmp_path / "plots" / "training.png", title="a run")
    with Image.open(out) as picture:
        assert min(picture.size) > 400
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert len(colours) > 10


def test_training_plot_of_a_run_that_blew_up(tmp_path):
    broken = {"loss": float("inf"), "lr": float("nan"), "images_per_s": float("nan")}
    bad = [{**r, **broken, "map": float("nan")} for r in records()]
    for rows in (records()[:5] + bad, bad):
        assert plot_training(rows, tmp_path / "bad.png").stat().st_size > 1000


def test_training_plot_with_little(tmp_path):
    train = {"kind": "train", "step": 1, "epoch": 0.1, "loss": 1.0}
    plot_training([train], tmp_path / "one.png")
    plot_training([{"kind": "val", "step": 1, "epoch": 0.1, "top1": 0.5}], tmp_path / "val.png")
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_training([], tmp_path / "none.png")


@pytest.fixture
def panels(monkeypatch):
    """Make a plot, return its axes by title (its first word) instead of a picture."""
    made = []
    monkeypatch.setattr(plots, "_save", lambda figure, out: made.append(figure) or out)

    def plot(rows):
        plot_training(rows, "plot.png")
        return {axes.get_title().split()[0]: axes for axes in made[-1].axes}

    return plot


def run_of(losses, *, kind="train"):
    return [
        {"kind": kind, "step": n, "epoch": n / 10, "loss": loss, "lr": 0.01, "images_per_s": 9.0}
        for n, loss in enumerate(losses, start=1)
    ]


@pytest.mark.parametrize("count", [1, 3, 49])
def test_everything_of_a_short_run_is_on_the_plot(panels, count):
    train = [40.0, *[4.0] * (count - 1)]
    shown = panels([*run_of(train), *run_of([7.246, 50.0], kind="val")])["Losses"]
    for line in shown.lines:
        assert all(0 <= y <= shown.get_ylim()[1] for y in line.get_ydata())
    assert shown.get_title() == "Losses"


@pytest.mark.parametrize(("count", "marked"), [(1, True), (3, True), (200, False)])
def test_few_points_are_marked(panels, count, marked):
    axes = panels(run_of([5.0] * count))
    for name in ("Losses", "Learning", "Speed"):
        (line,) = [line for line in axes[name].lines if len(line.get_xdata())]
        assert (line.get_marker() != "None") == marked


def test_a_peak_of_training_is_cut_but_never_validation(panels):
    train = [900.0, 300.0, *[5.0 - n / 100 for n in range(198)]]
    axes = panels(run_of(train))["Losses"]
    assert axes.get_ylim()[1] < 10
    assert axes.get_title() == "Losses (training's peak, 900, is cut off)"
    axes = panels([*run_of(train), *run_of([80.0, 4.0], kind="val")])["Losses"]
    assert 80 < axes.get_ylim()[1] < 100
    axes = panels(run_of([8.0 - n / 25 for n in range(200)]))["Losses"]  # falls, without a peak
    assert axes.get_ylim()[1] > 8
    assert axes.get_title() == "Losses"


def test_bad_metrics_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_text("no json\n{}\n")
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_class_scores_plot(tmp_path):
    rows = {"a": {"ap": 0.5, "ap_50": 0.8}, "never": {"ap": None, "ap_50": None}}
    out = plot_class_scores({"map": 0.5, "per_class": rows}, tmp_path / "ap.png", title="AP")
    assert out.stat().st_size > 1000
    plot_class_scores({"top1": 1, "per_class": {"a": {"top1": 1.0}}}, tmp_path / "top1.svg")
    with pytest.raises(ValueError, match="no class"):
        plot_class_scores({"map": None, "per_class": {"x": rows["never"]}}, tmp_path / "x.png")
