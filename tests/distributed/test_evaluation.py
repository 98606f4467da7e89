"""Evaluation on several real processes: every sample once, and the figures of one process."""

import json
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import write_imagefolder, write_voc
from ranks import fork_ranks, run_ranks

from mbv3dist.convert.imagefolder import convert_imagefolder
from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import open_split
from mbv3dist.models.directory import load_model, model_from_spec, new_spec, save_model

CLASSES = ("blue", "green", "red")
NUM_SAMPLES = 19
WORLD_SIZES = (1, 2, 3, 4)


def small_model(path, architecture, *, size):
    spec = new_spec(architecture, CLASSES, input_size=size, width=0.5)
    torch.manual_seed(0)
    save_model(model_from_spec(spec), spec, path)
    return str(path)


def damaged_copy(data, out):
    """The data set with one picture of the last rank overwritten, sizes unchanged."""
    out.mkdir()
    for path in data.rglob("*"):
        target = out / path.relative_to(data)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            target.write_bytes(path.read_bytes())
    split = open_split(out, "val")
    picture = split.sample(len(split) - 1)["jpg"]
    shard = split.shards[-1].path
    content = shard.read_bytes()
    assert content.count(picture) == 1
    shard.write_bytes(content.replace(picture, b"\0" * len(picture)))
    return out


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """(model, data set, batch size) to score; the last data set is damaged."""
    root = tmp_path_factory.mktemp("evaluation")
    # Of write_voc's pictures, the last third is `val`.
    for name, size in (("boxes", 3 * NUM_SAMPLES - 2), ("few", 5)):
        source = write_voc(root / f"VOC {name}", num_pictures=size)
        convert_voc([source], root / name, split="val", workers=1, shard_bytes=20_000)
    source = write_imagefolder(root / "colours", per_class=7)
    (source / "blue" / "0.jpg").unlink()
    (source / "red" / "3.jpg").unlink()
    convert_imagefolder(source, root / "classes", split="val", workers=1, shard_bytes=9_000)
    sizes = [len(open_split(root / name, "val")) for name in ("boxes", "classes", "few")]
    assert sizes == [NUM_SAMPLES, NUM_SAMPLES, 2]
    assert all(NUM_SAMPLES % world_size for world_size in WORLD_SIZES[1:])
    detector = small_model(root / "ssd", "ssdlite_mobilenetv3_small", size=64)
    classifier = small_model(root / "net", "mobilenetv3_small", size=32)
    return [
        (detector, str(root / "boxes"), 2),
        (classifier, str(root / "classes"), 3),
        (detector, str(root / "boxes"), 7),  # three batches: a fourth rank has nothing to do
        (classifier, str(root / "classes"), 32),  # one batch, and all ranks but one have nothing
        (detector, str(root / "few"), 2),
        (classifier, str(damaged_copy(root / "classes", root / "damaged")), 3),
    ]


def score_on_all(*, rank, world_size, jobs, out):
    """Scores every job on each number of ranks, forked from here: imports take longest."""
    torch.set_num_threads(1)
    models = [load_model(model) for model, _, _ in jobs]
    for number in WORLD_SIZES:
        codes = fork_ranks(score, number, jobs=jobs, models=models, out=out)
        assert codes == [0] * number


def score(*, rank, world_size, jobs, models, out):
    """A rank; it leaves the results of all jobs, or their errors, in a file."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from mbv3dist.evaluation.run import evaluate

    if world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{out / f'store {world_size}'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    results = []
    for (_, data, batch_size), loaded in zip(jobs, models, strict=True):
        model = DistributedDataParallel(loaded.model) if world_size > 1 else loaded.model
        try:
            result = evaluate(model, loaded.spec, open_split(data, "val"), batch_size=batch_size)
        except ValueError as error:
            result = str(error)
        results.append(result)
    (out / f"{world_size}.{rank}.json").write_text(json.dumps(results))
    if world_size > 1:
        dist.destroy_process_group()


def assert_same(result, expected):
    """The same counts and scores to the last bit, losses up to the order of float64 additions."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("loss"):
            assert result[name] == pytest.approx(value, rel=1e-12), name
        else:
            assert result[name] == value, name


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same(jobs, tmp_path):
    run_ranks(score_on_all, 1, jobs=jobs, out=tmp_path)
    found = {
        world_size: [
            json.loads(Path(tmp_path / f"{world_size}.{rank}.json").read_text())
            for rank in range(world_size)
        ]
        for world_size in WORLD_SIZES
    }
    *expected, failure = found[1][0]
    assert [result["samples"] for result in expected] == [NUM_SAMPLES] * 4 + [2]
    assert expected[0]["map_50"] > 0 and expected[0]["loss"] > 0
    assert 0 < expected[1]["top1"] < 1
    assert expected[1]["loss"] == pytest.approx(expected[3]["loss"], rel=1e-5)
    for world_size in WORLD_SIZES[1:]:
        ranks = found[world_size]
        assert all(results == ranks[0] for results in ranks)
        for result, reference in zip(ranks[0][:-1], expected, strict=True):
            assert_same(result, reference)
        # A rank that fails in its part does not leave the others waiting.
        assert ranks[0][-1] == failure and "000000018" in failure
