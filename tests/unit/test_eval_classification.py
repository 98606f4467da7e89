"""TopK: figures against torch.topk, few classes, ties, NaN, sharding."""

import json

import pytest
import torch

from mbv3dist.evaluation.classification import TopK, label_rank


def names(count):
    return tuple(f"class{i}" for i in range(count))


def count(logits, label, classes):
    counter = TopK(classes)
    counter.update(logits, label)
    return counter.result()


@pytest.mark.parametrize("num_classes", [5, 6, 30])
def test_equals_topk(num_classes):
    generator = torch.Generator().manual_seed(num_classes)
    logits = torch.randn(200, num_classes, generator=generator)
    label = torch.randint(num_classes, (200,), generator=generator)
    result = count(logits, label, names(num_classes))
    right = logits.topk(5).indices == label[:, None]
    assert result["samples"] == 200
    assert result["top1"] == right[:, 0].sum().item() / 200
    assert result["top5"] == right.any(dim=1).sum().item() / 200
    for number, name in enumerate(names(num_classes)):
        mine = label == number
        row = result["per_class"][name]
        assert row["samples"] == mine.sum()
        assert row["top1"] == pytest.approx(right[mine, 0].double().mean().item())


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_top5_of_fewer_classes_is_one(num_classes):
    label = torch.arange(num_classes)
    logits = -torch.nn.functional.one_hot(label, num_classes).float()
    assert count(logits, label, names(num_classes))["top5"] == 1.0


def test_ties_go_to_the_smaller_class_as_in_argmax():
    logits = torch.zeros(6, 6)
    assert label_rank(logits, torch.arange(6)).tolist() == [0, 1, 2, 3, 4, 5]


def test_nan_is_never_right():
    logits = torch.full((4, 3), float("nan"))
    logits[1, 0] = 5.0
    result = count(logits, torch.tensor([0, 0, 1, 2]), names(3))
    assert (result["top1"], result["top5"], result["samples"]) == (0.0, 0.0, 4)


def test_weight_zero_is_not_counted():
    counter = TopK(names(2))
    counter.update(torch.eye(2), torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert counter.result()["samples"] == 1
    assert counter.result()["top1"] == 1.0


def test_batches_parts_and_reused_buffers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 7, generator=generator)
    label = torch.randint(7, (50,), generator=generator)
    expected = count(logits, label, names(7))
    parts = [TopK(names(7)) for _ in range(3)]
    buffer = torch.empty(9, dtype=torch.int64)
    for start in range(0, 50, 9):
        size = len(label[start : start + 9])
        buffer[:size] = label[start : start + 9]
        parts[start % 3].update(logits[start : start + 9], buffer[:size])
    buffer.zero_()
    whole = TopK(names(7))
    whole.merge([part.payload() for part in parts])
    assert whole.num_samples == 50
    assert whole.result() == expected
    assert whole.result() == expected


def test_empty_result_is_json():
    result = TopK(names(2)).result()
    assert result["top1"] is None
    json.dumps(result, allow_nan=False)
