"""The loader: same pixels on any number of threads and ranks, clean ends, errors with names."""

import contextlib
import hashlib
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mbv3dist.config import ViewConfig
from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.decode import Picture
from mbv3dist.data.drawing import Drawing
from mbv3dist.data.idx import DamagedShardError
from mbv3dist.data.index import open_split
from mbv3dist.data.loader import Loader, eval_batches
from mbv3dist.data.plan import Plan
from mbv3dist.data.reader import Reader
from mbv3dist.data.views import vector_to_source
from tests.resized import resized
from tests.rewritten import rewrite_members

SSD = ViewConfig(name="ssd", brightness=0.2, hue=0.1)
CROP = ViewConfig(name="random_resized_crop")
PLAIN = ViewConfig(name="resize")


def picture(rng, width, height):
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 pictures in three classes, in several shards."""
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for number in range(37):
        path = root / "src" / f"class{number % 3}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng, int(rng.integers(30, 90)), int(rng.integers(30, 90))).save(path)
    convert_imagefolder(root / "src", root / "out", split="train", workers=1, shard_bytes=20_000)
    return open_split(root / "out", "train")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """29 pictures with 0 to 5 boxes."""
    root = tmp_path_factory.mktemp("voc")
    rng = np.random.default_rng(1)
    names = [f"{number:04d}" for number in range(29)]
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / "src" / name).mkdir(parents=True)
    (root / "src/ImageSets/Main/train.txt").write_text("\n".join(names) + "\n")
    for number, name in enumerate(names):
        width, height = 80, 60
        picture(rng, width, height).save(root / "src/JPEGImages" / f"{name}.jpg")
        objects = ""
        for box in range(number % 6):
            x, y = int(rng.integers(1, 50)), int(rng.integers(1, 30))
            objects += (
                f"<object><name>{'ab'[box % 2]}</name><difficult>{box // 4}</difficult><bndbox>"
                f"<xmin>{x}</xmin><ymin>{y}</ymin><xmax>{x + 25}</xmax><ymax>{y + 25}</ymax>"
                "</bndbox></object>"
            )
        (root / "src/Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>"
            f"{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    convert_voc(root / "src", root / "out", split="train", workers=1, shard_bytes=20_000)
    return open_split(root / "out", "train")


def make_plan(split, batch=8, epochs=2, **options):
    return Plan(split.shard_sizes, global_batch_size=batch, epochs=epochs, **options)


def make_loader(split, *, view, plan=None, **options):
    return Loader(split, plan or make_plan(split), view=view, size=32, seed=5, **options)


def digest(batch):
    """SHA-256 of each sample: pixels, boxes and everything else that belongs to it."""
    digests = []
    for place in range(len(batch)):
        content = hashlib.sha256(batch.image[place].numpy().tobytes())
        for name in ("index", "epoch", "weight", "size", "view", "color", "label"):
            if getattr(batch, name) is not None:
                content.update(getattr(batch, name)[place].numpy().tobytes())
        if batch.boxes is not None:
            real = batch.labels[place] >= 0
            for name in ("boxes", "labels", "difficult"):
                content.update(getattr(batch, name)[place][real].numpy().tobytes())
        digests.append(content.hexdigest())
    return digests


def run_digests(split, view, world_size=1, **options):
    loaders = [
        make_loader(split, view=view, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return [[d for _, b in parts for d in digest(b)] for parts in zip(*loaders, strict=True)]


def our_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mbv3dist")]


def test_classification_batches(folder):
    plan = make_plan(folder, epochs=1)
    seen = []
    with Reader(folder) as reader:
        for number, (step, batch) in enumerate(make_loader(folder, view=PLAIN, plan=plan)):
            assert step == number
            assert batch.image.shape == (8, 3, 32, 32)
            assert batch.image.dtype == torch.uint8
            assert batch.image.is_contiguous(memory_format=torch.channels_last)
            assert (batch.label.dtype, batch.size.dtype) == (torch.int64, torch.int32)
            assert (batch.color == torch.tensor([1.0, 1, 1, 0, 0, 0])).all()
            assert batch.boxes is None
            for place, index in enumerate(batch.index.tolist()):
                data = reader.read(index)[0]
                whole = Image.open(io.BytesIO(data))
                expected = np.asarray(resized(whole, (32, 32)))
                if batch.view[place, 4] > batch.view[place, 6]:
                    expected = expected[:, ::-1]
                assert (batch.image[place].permute(1, 2, 0).numpy() == expected).all()
                assert batch.label[place] == reader.target(index).label
                assert batch.size[place].tolist() == [whole.height, whole.width]
            seen += batch.index[batch.weight > 0].tolist()
    assert sorted(seen) == list(range(37))
    assert batch.weight.tolist() == [1] * 5 + [0] * 3
    assert batch.epoch.tolist() == [0] * 5 + [1] * 3


def test_detection_batches(voc):
    dropped = 0
    with Reader(voc) as reader:
        for _, batch in make_loader(voc, view=SSD, plan=make_plan(voc, epochs=4)):
            num_boxes = (batch.labels >= 0).sum(1)
            assert batch.boxes.shape == (8, max(1, int(num_boxes.max())), 4)
            assert batch.difficult.dtype == torch.bool
            assert (batch.boxes >= 0).all()
            assert (batch.boxes <= 32).all()
            assert (batch.boxes[batch.labels < 0] == 0).all()
            assert not batch.difficult[batch.labels < 0].any()
            for place, index in enumerate(batch.index.tolist()):
                truth = reader.target(index)
                real = batch.labels[place] >= 0
                dropped += len(truth.boxes) - int(real.sum())
                back = vector_to_source(batch.view[place].numpy(), batch.boxes[place][real].numpy())
                for box, label in zip(back, batch.labels[place][real].tolist(), strict=True):
                    # A box lies in one of the original's boxes of its class: it was only clipped.
                    same = truth.boxes[truth.labels == label]
                    inside = (box[:2] >= same[:, :2] - 0.1) & (box[2:] <= same[:, 2:] + 0.1)
                    assert inside.all(1).any()
    assert dropped > 0


@pytest.mark.parametrize(("kind", "view"), [("folder", CROP), ("voc", SSD)])
def test_content_depends_on_neither_threads_nor_prefetch_nor_world_size(kind, view, request):
    split = request.getfixturevalue(kind)
    base = run_digests(split, view, num_threads=1, prefetch=1)
    assert len(base) == make_plan(split).num_steps
    assert run_digests(split, view, num_threads=2) == base
    assert run_digests(split, view, num_threads=5, prefetch=4) == base
    assert run_digests(split, view, world_size=2) == base
    assert run_digests(split, view, world_size=8, num_threads=1, prefetch=1) == base
    assert run_digests(split, view, start_step=3, verify="always") == base[3:]


def test_every_epoch_has_other_views(folder):
    plan = make_plan(folder, batch=37)
    first, second = (digest(batch) for _, batch in make_loader(folder, view=CROP, plan=plan))
    assert not set(first) & set(second)


@pytest.mark.parametrize("world_size", [1, 2, 3, 50])
def test_evaluation_reads_every_sample_once(voc, world_size):
    seen = []
    for rank in range(world_size):
        batches = eval_batches(
            voc, view=PLAIN, size=32, batch_size=4, rank=rank, world_size=world_size
        )
        for batch in batches:
            assert (batch.weight == 1).all()
            assert len(batch) == len(batch.image) == len(batch.labels) <= 4
            seen += batch.index.tolist()
    assert seen == list(range(29))


def test_evaluation_keeps_all_boxes(voc):
    with Reader(voc) as reader:
        for batch in eval_batches(voc, view=ViewConfig(name="center_crop"), size=16, batch_size=5):
            back = vector_to_source(batch.view.numpy(), batch.boxes.numpy())
            for place, index in enumerate(batch.index.tolist()):
                truth = reader.target(index)
                count = len(truth.boxes)
                assert (batch.labels[place] >= 0).sum() == count
                assert back[place, :count] == pytest.approx(truth.boxes, abs=0.01)


def test_leaving_in_the_middle_stops_the_threads(voc):
    for way in ("break", "close", "error", "with", "again"):
        loader = make_loader(voc, view=SSD, num_threads=3, plan=make_plan(voc, epochs=50))
        if way == "break":
            for _ in loader:
                break
        elif way == "error":
            with contextlib.suppress(KeyError):
                for _ in loader:
                    raise KeyError
        elif way == "with":
            with loader:
                batches = iter(loader)
                next(batches)
        else:
            batches = iter(loader)
            next(batches)
            started = time.perf_counter()
            if way == "again":
                assert next(iter(loader))[0] == 0
            loader.close()
            assert time.perf_counter() - started < 1
            assert list(batches) == []
        assert our_threads() == []


def test_no_threads_are_left_over_epochs(folder):
    for _ in range(3):
        assert len(list(make_loader(folder, view=CROP, start_step=6))) == 4
        assert our_threads() == []
    assert list(make_loader(folder, view=CROP, start_step=10)) == []
    list(eval_batches(folder, view=PLAIN, size=8, batch_size=10))
    assert next(eval_batches(folder, view=PLAIN, size=8, batch_size=10)).index[0] == 0
    assert our_threads() == []


def test_a_loader_closed_by_another_thread_ends(voc, monkeypatch):
    slow = threading.Event()
    original = Drawing.draw
    monkeypatch.setattr(Drawing, "draw", lambda *a: (slow.wait(0.2), original(*a))[1])
    loader = make_loader(voc, view=SSD, plan=make_plan(voc, batch=24))
    got = []
    consumer = threading.Thread(target=lambda: got.extend(loader))
    consumer.start()
    time.sleep(0.3)
    loader.close()
    consumer.join(5)
    assert not consumer.is_alive()
    assert got == []


def test_the_buffer_is_reused_and_memory_bounded(voc):
    loader = make_loader(voc, view=SSD, prefetch=2, plan=make_plan(voc, epochs=5))
    places = {batch.image.data_ptr() for _, batch in loader}
    assert len(places) == 3


def test_an_unreadable_sample_is_named(folder, monkeypatch):
    def damaged(index, data, target):
        return (data[: len(data) // 2] if index in (5, 20) else data), target

    rewrite_members(monkeypatch, damaged)
    plan = make_plan(folder, batch=37)
    order = plan.step(0).index.tolist()
    first = min((5, 20), key=order.index)
    for num_threads in (1, 4):
        loader = make_loader(folder, view=CROP, plan=plan, num_threads=num_threads)
        message = rf"train/.*{first:09d} \({folder.source(first)}\).*cannot be decoded: .*truncated"
        with pytest.raises(DamagedShardError, match=message):
            list(loader)
        assert our_threads() == []
    with pytest.raises(DamagedShardError, match="000000005"):
        list(eval_batches(folder, view=PLAIN, size=16, batch_size=8))


def test_a_wrong_recipe_is_not_called_damage(folder):
    view = ViewConfig(name="random_crop", resize=16, padding=2)
    with pytest.raises(ValueError, match=r"--data.view.resize to 32") as caught:
        list(make_loader(folder, view=view))
    assert not isinstance(caught.value, DamagedShardError)


def test_wrong_targets_are_named(folder, voc, monkeypatch):
    rewrite_members(monkeypatch, lambda index, data, target: (data, b"7"))
    with pytest.raises(DamagedShardError, match="class number 7 for 3 classes"):
        list(make_loader(folder, view=CROP))
    wrong = b'{"width": 9, "height": 9, "boxes": [], "labels": [], "difficult": []}'
    rewrite_members(monkeypatch, lambda index, data, target: (data, wrong))
    with pytest.raises(DamagedShardError, match=r"80 x 60 pixels, its .json member says 9 x 9"):
        list(make_loader(voc, view=SSD))


def test_wrong_arguments_are_refused(folder):
    plan = make_plan(folder)
    with pytest.raises(ValueError, match=r"size of 6 or 9 \(--data.global_batch_size"):
        make_loader(folder, view=CROP, world_size=3)
    with pytest.raises(ValueError, match=r"--data.num_threads"):
        make_loader(folder, view=CROP, num_threads=0)
    with pytest.raises(ValueError, match="start step 11"):
        make_loader(folder, view=CROP, start_step=11)
    with pytest.raises(ValueError, match="plan is for 3 samples"):
        make_loader(folder, view=CROP, plan=Plan([3], global_batch_size=8, epochs=1))
    with pytest.raises(ValueError, match=r"--eval.batch_size"):
        next(eval_batches(folder, view=PLAIN, size=8, batch_size=0))
    assert len(make_loader(folder, view=CROP, plan=plan, start_step=4)) == 6


def test_waiting_is_measured(folder):
    loader = make_loader(folder, view=CROP, prefetch=1)
    for _, _ in loader:
        assert 0 <= loader.wait_s < 30
        time.sleep(0.1)
    assert loader.wait_s < 0.1


def test_split_and_to_share_the_samples(voc):
    _, batch = next(iter(make_loader(voc, view=SSD)))
    parts = batch.split(4)
    assert [len(part) for part in parts] == [2] * 4
    assert [d for part in parts for d in digest(part)] == digest(batch)
    assert digest(batch.to("cpu")) == digest(batch)
    with pytest.raises(ValueError, match="does not divide by 3"):
        batch.split(3)


def test_the_canvas_shows_the_picture(voc):
    """The whole walk once more, end to end: the centre of an unflipped plain view."""
    with Reader(voc) as reader:
        batch = next(eval_batches(voc, view=PLAIN, size=60, batch_size=1))
        image = np.asarray(Picture(reader.read(0)[0]).image())
    mean = batch.image[0].float().mean((1, 2)).numpy()
    assert mean == pytest.approx(image.mean((0, 1)), abs=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_buffers_are_not_reused_while_they_are_copied(folder):
    plan = make_plan(folder, epochs=20)
    expected = [batch.image.clone() for _, batch in make_loader(folder, view=CROP, plan=plan)]
    moved = []
    loader = make_loader(folder, view=CROP, plan=plan, prefetch=1, pin_memory=True)
    for _, batch in loader:
        assert batch.image.is_pinned()
        torch.cuda._sleep(20_000_000)  # the copy waits behind this, the host does not
        moved.append([part.to("cuda") for part in batch.split(2)])
    for parts, image in zip(moved, expected, strict=True):
        assert (torch.cat([part.image for part in parts]).cpu() == image).all()
