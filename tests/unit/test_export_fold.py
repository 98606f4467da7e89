"""Batch norms folded into convolutions, and normalisation as part of a network."""

import copy

import pytest
import torch
from lively import lively_model
from torch import nn

from mbv3dist.inference.check import drawn_canvases, reference_outputs
from mbv3dist.inference.fold import DeployedNetwork, fold_batch_norms
from mbv3dist.models.directory import ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduced_tail", [False, True])
def test_a_folded_model_has_no_batch_norm_and_gives_the_same(architecture, reduced_tail):
    loaded = lively_model(architecture, size=64, reduced_tail=reduced_tail)
    before = copy.deepcopy(loaded.model.state_dict())
    folded = fold_batch_norms(loaded.model)
    assert not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in folded.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in loaded.model.modules())
    assert all(torch.equal(v, before[k]) for k, v in loaded.model.state_dict().items())

    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = loaded.model(images), folded(images)
    if loaded.spec.task == "classification":
        expected, found = (expected,), (found,)
    for a, b in zip(expected, found, strict=True):
        assert float(a.std()) > 0.02  # not the same for all: a wrong fold would show
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_deployed_network_takes_canvases_as_they_are(dtype):
    loaded = lively_model(
        "mobilenetv3_small",
        size=64,
        preprocess={"dtype": dtype, "mean": (0.1, 0.5, 0.7), "std": (0.2, 0.25, 0.4)},
    )
    canvas = drawn_canvases(loaded.spec, 2, seed=3)
    assert str(canvas.dtype) == f"torch.{dtype}"
    with torch.no_grad():
        found = DeployedNetwork(loaded)(canvas)
    expected = reference_outputs(loaded, canvas)["logits"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_in_training_is_not_folded():
    with pytest.raises(AssertionError):
        fold_batch_norms(lively_model("mobilenetv3_small", size=32).model.train())
