"""Evaluation on several real processes: every sample once, and the figures of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment, write_voc

from mbv3dist.convert.voc import convert_voc
from mbv3dist.data.index import open_split
from mbv3dist.evaluation.run import evaluate
from mbv3dist.models.directory import load_model, model_from_spec, new_spec, save_model

CLASSES = ("blue", "green", "red")

# Three processes from one launch (imports take longest) score on three ranks, then on two.
WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from mbv3dist.data.index import open_split
from mbv3dist.evaluation.run import evaluate
from mbv3dist.models.directory import load_model

jobs, out, rank = json.loads(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
torch.set_num_threads(1)
for world_size in (3, 2):
    if rank >= world_size:
        continue
    store = f"file://{out}.store{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = []
    for model, data in jobs:
        loaded = load_model(model)
        wrapped = DistributedDataParallel(loaded.model)
        try:
            result = evaluate(wrapped, loaded.spec, open_split(data, "val"), batch_size=2)
        except ValueError as error:
            result = str(error)
        results.append(result)
    with open(f"{out}.{world_size}.{rank}", "w") as handle:
        json.dump(results, handle)
    dist.destroy_process_group()
"""


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


def assert_same(result, expected):
    """Equal counts, and figures equal up to the rounding of batches of another size."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(result[name], value)
        elif value is None:
            assert result[name] is None, name
        else:
            assert result[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_any_number_of_ranks_gives_the_same(detection_data, classification_data, tmp_path):
    few = tmp_path / "few"  # two pictures: on three ranks one has nothing to do
    convert_voc([write_voc(tmp_path / "voc", num_pictures=5)], few, split="val", workers=1)
    detector = small_model(tmp_path / "ssd", "ssdlite_mobilenetv3_small", size=64)
    classifier = small_model(tmp_path / "net", "mobilenetv3_small", size=32)
    data = [detection_data, classification_data, few]
    jobs = list(zip((detector, classifier, detector), data, strict=True))
    expected = []
    for model, where in jobs:
        loaded = load_model(model)
        expected.append(evaluate(loaded.model, loaded.spec, open_split(where, "val"), batch_size=2))
    assert [result["samples"] for result in expected] == [7, 9, 2]
    assert expected[0]["map_50"] > 0

    jobs.append((classifier, damaged_copy(Path(classification_data), tmp_path / "damaged")))
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    out = tmp_path / "results"
    arguments = json.dumps([(model, str(where)) for model, where in jobs])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    subprocess.run(
        [*launcher, str(worker), arguments, str(out)], check=True, env=environment(), timeout=300
    )
    for world_size in (3, 2):
        files = [Path(f"{out}.{world_size}.{rank}") for rank in range(world_size)]
        ranks = [json.loads(file.read_text()) for file in files]
        assert all(results == ranks[0] for results in ranks)
        for result, reference in zip(ranks[0][:3], expected, strict=True):
            assert_same(result, reference)
        # A rank that fails in its part does not leave the others waiting.
        assert "000000008" in ranks[0][3]
