"""import: what training scripts save (averages, arguments, modules); folders that are in use."""

import argparse
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from mbv3dist.cli import main
from mbv3dist.inference.importing import import_model
from mbv3dist.models.directory import load_model
from mbv3dist.models.weights import read_state
from tests.foreign import timm_classifier, torchvision_classifier

ARCHS = {"timm": "mobilenetv3_small_050", "torchvision": "mobilenet_v3_small"}
# What `--args` of these scripts holds.
ARGUMENTS = argparse.Namespace(model="any", lr=0.1, mean=None, size=(3, 64, 64), amp=True)


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("ant\nbee\ncow\n")
    return path


def averaged(library: str) -> tuple[dict, torch.nn.Module]:
    """A checkpoint as the script saves it, and the model whose weights are the average."""
    if library == "timm":
        model = timm_classifier(ARCHS[library], 3)
    else:
        model = torchvision_classifier("small", 3)
    last = {k: v * 1.05 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    if library == "timm":
        average = {"state_dict": last, "state_dict_ema": model.state_dict(), "version": 2}
    else:
        average = {"model": last, "model_ema": AveragedModel(model).state_dict()}
        assert "n_averaged" in average["model_ema"]
    return {**average, "epoch": 3, "args": ARGUMENTS}, model


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_the_moving_average_is_taken_and_said(
    library: str, names: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, theirs = averaged(library)
    path, out = tmp_path / "checkpoint.pth", tmp_path / "model"
    torch.save(checkpoint, path)
    words = ["--arch", ARCHS[library], "--classes", str(names)]
    main(["import", str(path), str(out), *words])
    key = {"timm": "state_dict_ema", "torchvision": "model_ema"}[library]
    assert f"weights: their moving average, {key} of {path}" in capsys.readouterr().out
    loaded = load_model(out)
    assert loaded.spec.provenance["imported"]["entry"] == key
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(images), theirs(images), rtol=1e-4, atol=1e-5)

    plain = {k: v for k, v in checkpoint.items() if k != key} | {"state_dict_ema": None}
    torch.save(plain, path)
    main(["import", str(path), str(out), *words, "--overwrite"])
    assert "moving average" not in capsys.readouterr().out
    assert "entry" not in load_model(out).spec.provenance["imported"]
    with torch.no_grad():
        assert (load_model(out).model(images) - theirs(images)).abs().max() > 1e-3


def test_an_averaged_model_alone_loses_its_counter(tmp_path: Path) -> None:
    model = torchvision_classifier("small", 3)
    torch.save(AveragedModel(model).state_dict(), tmp_path / "average.pth")
    assert list(read_state(tmp_path / "average.pth")) == list(model.state_dict())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_pickled_module_is_told_how_to_become_weights(
    inside: bool, old: bool, tmp_path: Path
) -> None:
    model: object = torchvision_classifier("small", 3)
    path = tmp_path / "whole.pth"
    torch.save({"model": model} if inside else model, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match="holds a pickled") as caught:
        import_model(path, tmp_path / "out", arch="mobilenet_v3_small")
    assert str(caught.value) == (
        f"weights: {path} holds a pickled torchvision.models.mobilenetv3.MobileNetV3, not weights "
        "alone; load it where it was made and save its weights: torch.save(model.state_dict(), "
        "FILE)"
    )


def test_a_folder_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; give a \.pth or"):
        import_model(tmp_path, tmp_path / "out", arch="mobilenet_v3_small")


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet50", "'resnet50' is unknown; there are ssdlite320"),
        ("mobilenet_v2", "'mobilenet_v2' is unknown; there are ssdlite320"),
        ("mobilenetv3_smal_100", "did you mean 'mobilenetv3_small_100'\\? There are ssdlite320"),
        ("mobilenetv3_large", "did you mean 'mobilenet_v3_large'"),
    ],
)
def test_only_near_names_are_suggested(arch: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "w.pth", tmp_path / "out", arch=arch)


def test_an_impossible_place_is_found_before_reading(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another place: '/proc/out'"):
        import_model(tmp_path / "absent.pth", "/proc/out", arch="mobilenet_v3_small")


def test_an_existing_folder_is_left_alone(names: Path, tmp_path: Path) -> None:
    path, out, arch = tmp_path / "w.pth", tmp_path / "model", ARCHS["torchvision"]
    torch.save(torchvision_classifier("small", 3).state_dict(), path)
    out.mkdir()  # empty: may be used
    import_model(path, out, arch=arch, classes=names)
    before = (out / "model.json").read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        import_model(path, out, arch=arch, classes=names)
    assert (out / "model.json").read_bytes() == before
    import_model(path, out, arch=arch, classes=names, overwrite=True)
    assert (out / "model.json").read_bytes() == before  # the same to the byte
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="is no model"):
        import_model(path, tmp_path / "photos", arch=arch, classes=names, overwrite=True)
