"""The compiled views are those of views.py, to the last bit."""

import dataclasses

import numpy as np
import pytest

from mbv3dist.config import ViewConfig
from mbv3dist.data.draws import COLOR, Draws, raw_words
from mbv3dist.data.view_kernels import NAMES, ViewMaker
from mbv3dist.data.view_random import philox_block
from mbv3dist.data.views import View, draw_color, make_view


def random_boxes(rng, width, height, count):
    corner = rng.random((count, 2)) * (width * 0.8, height * 0.8)
    side = rng.random((count, 2)) * (width * 0.5, height * 0.5) + 2
    return np.concatenate([corner, np.minimum(corner + side, (width, height))], 1).astype("f4")


def random_config(rng, name):
    """A recipe with every strength and probability somewhere."""
    return ViewConfig(
        name=name,
        flip=float(rng.choice([0.0, 0.5, 1.0])),
        scale_min=float(rng.uniform(0.05, 0.5)),
        ratio_min=float(rng.uniform(0.3, 1.0)),
        ratio_max=float(rng.uniform(1.0, 3.0)),
        zoom_out_probability=float(rng.choice([0.0, 0.5, 1.0])),
        zoom_out_max=float(rng.uniform(1.0, 4.0)),
        crop_probability=float(rng.choice([0.2, 0.86, 1.0])),
        crop_scale_min=float(rng.uniform(0.1, 0.6)),
        min_ious=tuple(rng.choice([0.1, 0.3, 0.5, 0.7, 0.9, 1.0], rng.integers(0, 5)).tolist()),
        padding=int(rng.integers(0, 30)),
        brightness=float(rng.choice([0.0, 0.3])),
        hue=float(rng.choice([0.0, 0.1])),
        channel_swap=float(rng.choice([0.0, 0.5])),
    )


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_definition(name):
    rng = np.random.default_rng(NAMES.index(name))
    size = 160
    for _ in range(30):
        config = random_config(rng, name)
        seed = int(rng.integers(0, 2**63))
        count = 20
        sizes = rng.integers(1, 800, (count, 2)).astype(np.int32)
        sizes[::5] = rng.integers(1, 8, sizes[::5].shape)
        boxes = [random_boxes(rng, *side, rng.integers(0, 7)) for side in sizes]
        epochs = rng.integers(0, 5, count)
        samples = rng.integers(0, 2**55, count)
        starts = np.concatenate(([0], np.cumsum([len(b) for b in boxes])))
        maker = ViewMaker(config, size=size, seed=seed)
        views = maker.make(epochs, samples, sizes, np.concatenate(boxes), starts)
        vectors = views.vectors()
        for n in range(count):
            key = {"epoch": int(epochs[n]), "sample": int(samples[n])}
            view, keep = make_view(
                config,
                width=int(sizes[n, 0]),
                height=int(sizes[n, 1]),
                size=size,
                boxes=boxes[n],
                draws=Draws(seed, **key),
            )
            mine = View(tuple(views.src[n]), tuple(views.dst[n]), bool(views.flip[n]))
            assert mine == view
            assert (vectors[n] == view.vector()).all()
            own = slice(starts[n], starts[n + 1])
            assert (views.keep[own] == keep).all()
            assert (views.boxes[own] == view.to_canvas(boxes[n])).all()
            color = draw_color(config, Draws(seed, purpose=COLOR, **key))
            assert (views.color[n] == np.float32(color)).all()


def test_words_are_those_of_numpy():
    rng = np.random.default_rng(0)
    for _ in range(50):
        seed, major, minor = (int(n) for n in rng.integers(0, 2**63, 3))
        purpose, epoch = (int(n) for n in rng.integers(0, 100, 2))
        words = raw_words(
            12, seed=seed, purpose=purpose, epoch=epoch, major=major, minor=minor
        ).tolist()
        key = [np.uint64(part) for part in (minor, major, epoch, seed, purpose)]
        mine = [word for block in range(3) for word in philox_block(np.uint64(block), *key)]
        assert mine == words


def test_a_canvas_that_cannot_be_cut_is_refused():
    maker = ViewMaker(ViewConfig(name="random_crop", padding=4, resize=32), size=64, seed=0)
    sizes = np.array([[9, 9]], np.int32)
    one = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"--data.view.resize to 64"):
        maker.make(one, one, sizes, np.zeros((0, 4), np.float32), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"--data.view.name"):
        ViewMaker(dataclasses.replace(ViewConfig(), name="spin"), size=9, seed=0)
