"""Packed crops become what Pillow draws: the reference that the GPU's kernel is tested against."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import FILL, random_crops

from mbv3dist.ops.resample import resample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 20, 90, 300]), st.sampled_from([1, 7, 64, 130]))
def test_pixels_are_pillows(seed, most, canvas):
    case = random_crops(np.random.default_rng(seed), number=3, most=most, canvas=canvas)
    expected = case.pop("expected")
    out = resample(**case, size=(canvas, canvas), fill=FILL)
    assert out.shape == (3, 3, canvas, canvas)
    assert out.is_contiguous(memory_format=torch.channels_last)
    error = np.abs(out.permute(0, 2, 3, 1).numpy().astype(int) - expected)
    assert error.max() <= 1
    assert error.mean() <= 0.3  # noise, of which Pillow may filter the columns first


def test_pixels_of_large_pictures_are_pillows():
    case = random_crops(np.random.default_rng(0), number=4, most=1500, canvas=224)
    expected = case.pop("expected")
    out = resample(**case, size=(224, 224), fill=FILL).permute(0, 2, 3, 1).numpy()
    error = np.abs(out.astype(int) - expected)
    assert error.max() <= 1
    assert error.mean() <= 0.25


def test_no_picture_is_all_fill_and_size_may_differ_by_axis():
    case = random_crops(np.random.default_rng(1), number=2, most=20, canvas=16)
    case.pop("expected")
    case["places"][0] = 0
    out = resample(**case, size=(20, 31), fill=FILL)
    assert out.shape == (2, 3, 20, 31)
    assert (out[0].permute(1, 2, 0) == torch.tensor(FILL)).all()
    assert (out[1, :, 16:] == out[0, :, 16:]).all()  # places end at 16


def test_normalized_form_is_the_levels_normalized():
    case = random_crops(np.random.default_rng(2), number=3, most=50, canvas=24)
    case.pop("expected")
    options = {"size": (24, 24), "fill": FILL}
    levels = resample(**case, **options).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    expected = (levels / 255 - mean) / std
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = resample(**case, **options, mean=MEAN, std=STD, dtype=dtype)
        assert torch.equal(out, expected.to(dtype))


def test_crops_anywhere_in_the_buffer():
    """An offset may count from a part of a larger buffer, and be negative."""
    case = random_crops(np.random.default_rng(3), number=3, most=30, canvas=20)
    case.pop("expected")
    whole = resample(**case, size=(20, 20), fill=FILL)
    skipped = 100
    case["pixels"], case["layout"] = case["pixels"][skipped:], case["layout"].clone()
    case["layout"][:, 0] -= skipped
    assert torch.equal(resample(**case, size=(20, 20), fill=FILL), whole)


def test_wrong_arguments_are_refused():
    case = random_crops(np.random.default_rng(4), number=1, most=9, canvas=8)
    case.pop("expected")
    options = {"size": (8, 8), "fill": FILL}
    with pytest.raises(ValueError, match="mean and std"):
        resample(**case, **options, dtype=torch.float32)
    with pytest.raises(ValueError, match="mean and std"):
        resample(**case, **options, mean=MEAN, std=STD)
    case["places"] = case["places"][:, :4]
    with pytest.raises(ValueError, match="places"):
        resample(**case, **options)
