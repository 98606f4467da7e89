"""import: checkpoints of torchvision and timm become model directories, and go back unchanged."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file

from mbv3dist.inference.class_names import find_classes
from mbv3dist.inference.importing import import_model
from mbv3dist.inference.libraries import ARCHS, find_source
from mbv3dist.inference.state_dicts import write_state_dict
from mbv3dist.models.directory import (
    LoadedModel,
    Preprocess,
    Thresholds,
    load_model,
    model_from_spec,
    new_spec,
)
from tests.foreign import (
    drawn_images,
    timm_classifier,
    torchvision_classifier,
    torchvision_detector,
)

DETECTOR = "ssdlite320_mobilenet_v3_large"
TIMM = [name for name in ARCHS if name.startswith("mobilenetv3_")]


def build(arch: str, num_outputs: int, *, reduced_tail: bool = False) -> torch.nn.Module:
    """The library's model of a name; num_outputs counts a detector's background."""
    if arch == DETECTOR:
        return torchvision_detector(num_outputs, reduced_tail=reduced_tail)
    if arch.startswith("mobilenet_v3_"):
        variant = arch.rpartition("_")[2]
        return torchvision_classifier(variant, num_outputs, reduced_tail=reduced_tail)
    return timm_classifier(arch, num_outputs)


def save(state: dict, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def write_names(path: Path, count: int) -> Path:
    path.write_text("".join(f"thing {number}\n" for number in range(count)))
    return path


CASES = [(name, False) for name in ARCHS] + [
    (name, True) for name in ARCHS if not name.startswith("mobilenetv3_")
]


@pytest.mark.parametrize(("arch", "reduced_tail"), CASES)
def test_there_and_back(arch: str, reduced_tail: bool, tmp_path: Path) -> None:
    theirs = build(arch, 6, reduced_tail=reduced_tail)
    suffix = "safetensors" if reduced_tail else "pth"
    path = save(theirs.state_dict(), tmp_path / f"theirs.{suffix}")
    num_classes = 6 - (arch == DETECTOR)
    lines = import_model(
        path, tmp_path / "model", arch=arch, classes=write_names(tmp_path / "names", num_classes)
    )
    assert lines[0].startswith(f"{tmp_path / 'model'}: ")
    assert f"{sum(p.numel() for p in theirs.parameters())} parameters" in lines[0]
    loaded = load_model(tmp_path / "model")
    spec = loaded.spec
    assert spec.classes == tuple(f"thing {number}" for number in range(num_classes))
    assert spec.reduced_tail is reduced_tail
    assert spec.bn_eps == (1e-5 if arch in TIMM else 1e-3)
    imported = spec.provenance["imported"]
    assert (imported["arch"], imported["file"]) == (arch, f"theirs.{suffix}")

    size = spec.input_size if arch == DETECTOR else 96
    images = drawn_images(size)[:2]
    with torch.no_grad():
        mine = loaded.model(images)
        if arch == DETECTOR:
            expected = theirs.head(list(theirs.backbone(images).values()))
            expected = (expected["cls_logits"], expected["bbox_regression"])
        else:
            mine, expected = (mine,), (theirs(images),)
    for one, its in zip(mine, expected, strict=True):
        assert its.std() > 0.01
        # torchvision's classifier sums its head in another order; the rest is equal to the bit.
        tolerance = 1e-6 * float(its.abs().max()) if arch.startswith("mobilenet_v3_") else 0.0
        torch.testing.assert_close(one, its, rtol=0.0, atol=tolerance)

    library = "timm" if arch in TIMM else "torchvision"
    for name in ("back.pth", "back.safetensors"):
        result = write_state_dict(loaded, tmp_path / name, format=library)
        back = load_any(tmp_path / name)
        assert result["entries"] == len(back)
        assert result["bytes"] == (tmp_path / name).stat().st_size
        assert_same_state(back, theirs.state_dict(), ordered=name.endswith("pth"))
    theirs.load_state_dict(torch.load(tmp_path / "back.pth", weights_only=True), strict=True)


def load_any(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def assert_same_state(mine: dict, theirs: dict, *, ordered: bool) -> None:
    sequence = list if ordered else sorted
    assert sequence(mine) == sequence(theirs)
    for name, value in theirs.items():
        assert mine[name].dtype == value.dtype
        assert mine[name].shape == value.shape
        assert torch.equal(mine[name], value), name
        if name.endswith("num_batches_tracked"):
            assert value > 0


def test_the_way_back_refuses_what_no_model_of_the_library_takes(tmp_path: Path) -> None:
    def model(architecture: str, **options: object) -> LoadedModel:
        spec = new_spec(architecture, ["a", "b"], **options)
        return LoadedModel(model_from_spec(spec).eval(), spec)

    narrow = model("mobilenetv3_small", width=0.5)
    reduced = model("ssdlite_mobilenetv3_large", reduced_tail=True)
    odd = model("mobilenetv3_small", width=0.4)
    out = tmp_path / "x.pth"
    for loaded, format, message in (
        (narrow, "torchvision", r"width 0\.5.*--format timm"),
        (reduced, "timm", "reduced tail.*--format torchvision"),
        (odd, "timm", "width 0.4"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            write_state_dict(loaded, out, format=format)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\.pth, \.pt, \.safetensors"):
        write_state_dict(narrow, tmp_path / "x.bin", format="timm")
    assert os.listdir(tmp_path) == []
    write_state_dict(narrow, out, format="timm")
    before = out.read_bytes()
    with pytest.raises(ValueError, match="--overwrite"):
        write_state_dict(odd, out, format="timm", overwrite=False)
    assert out.read_bytes() == before
    write_state_dict(narrow, out, format="timm", overwrite=True)
    assert os.listdir(tmp_path) == ["x.pth"]


@pytest.mark.parametrize("variant", ["small", "large"])
def test_a_detector_in_timms_format_is_its_backbone(variant: str, tmp_path: Path) -> None:
    spec = new_spec(f"ssdlite_mobilenetv3_{variant}", ["a"], reduced_tail=False)
    loaded = LoadedModel(model_from_spec(spec).eval(), spec)
    lines = write_state_dict(loaded, tmp_path / "backbone.pth", format="timm")["lines"]
    assert any("without the heads" in line for line in lines)
    assert any("epsilon is 0.001" in line for line in lines)
    state = torch.load(tmp_path / "backbone.pth", weights_only=True)
    name = f"mobilenetv3_{variant}_100"
    timm.create_model(name, features_only=True).load_state_dict(state, strict=True)
    theirs = timm.create_model(name, bn_eps=1e-3).eval()
    left = theirs.load_state_dict(state, strict=False)
    assert left.unexpected_keys == []
    assert {key.partition(".")[0] for key in left.missing_keys} == {"conv_head", "classifier"}
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(images), loaded.model.backbone(images)[1])


def test_what_a_state_dict_cannot_hold_is_said(tmp_path: Path) -> None:
    spec = new_spec("ssdlite_mobilenetv3_large", ["a"], pretrained=True, input_size=256)
    spec = type(spec)(**{**spec.__dict__, "thresholds": Thresholds(score=0.2)})
    loaded = LoadedModel(model_from_spec(spec).eval(), spec)
    text = "\n".join(write_state_dict(loaded, tmp_path / "x.pth", format="torchvision")["lines"])
    for what in ("epsilon is 1e-05", "image_mean", "256 pixels wide", "score=0.2", "num_classes=2"):
        assert what in text


def test_preprocessing_is_the_librarys(tmp_path: Path) -> None:
    detector = find_source(DETECTOR, file_name="")
    theirs = torchvision_detector(3).transform
    wanted = detector.preprocess
    assert (wanted.dtype, wanted.antialias, wanted.interpolation) == ("float32", False, "bilinear")
    assert [list(wanted.mean), list(wanted.std)] == [theirs.image_mean, theirs.image_std]
    assert (detector.input_size,) * 2 == theirs.fixed_size
    for tag in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
        source = find_source(f"mobilenet_v3_large.{tag}", file_name="")
        preset = torchvision.models.MobileNet_V3_Large_Weights[tag].transforms()
        assert [source.preprocess.resize, source.input_size] == [
            *preset.resize_size,
            *preset.crop_size,
        ]
    assert source.preprocess.resize == 232
    by_file = find_source("mobilenet_v3_large", file_name="mobilenet_v3_large-5c1a4163.pth")
    assert by_file.preprocess.resize == 232
    assert by_file.remarks == ()
    assert find_source("mobilenet_v3_large", file_name="my.pth").preprocess.resize == 256
    assert "IMAGENET1K_V2" in find_source("mobilenet_v3_large", file_name="my.pth").remarks[0]

    for name in timm.list_models("mobilenetv3_*", pretrained=True):
        if name.partition(".")[0] not in ARCHS:
            continue
        source = find_source(f"timm/{name}", file_name="")
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        assert source.input_size == data["input_size"][1]
        assert source.preprocess == Preprocess(
            math.floor(data["input_size"][1] / data["crop_pct"]),
            interpolation=data["interpolation"],
            mean=data["mean"],
            std=data["std"],
            whole=True,
        )
    tagged = find_source(
        "mobilenetv3_large_100", file_name="mobilenetv3_large_100_1k_miil_78_0-66471c13.pth"
    )
    assert tagged.tag == "miil_in21k_ft_in1k"
    larger = find_source("mobilenetv3_large_100.ra4_e3600_r224_in1k", file_name="")
    assert any("256 pixels" in line for line in larger.remarks)


def test_thresholds_are_torchvisions(tmp_path: Path) -> None:
    theirs = torchvision_detector(91)
    path = save(theirs.state_dict(), tmp_path / "coco.pth")
    import_model(path, tmp_path / "model", arch=DETECTOR)
    spec = load_model(tmp_path / "model").spec
    assert spec.thresholds == Thresholds(
        score=theirs.score_thresh,
        nms=theirs.nms_thresh,
        topk_candidates=theirs.topk_candidates,
        max_detections=theirs.detections_per_img,
    )
    # Names of COCO: label 1 there is 0 here, and its empty places stay where they are.
    names = torchvision.models.detection.SSDLite320_MobileNet_V3_Large_Weights.COCO_V1.meta[
        "categories"
    ]
    assert len(spec.classes) == len(set(spec.classes)) == 90
    for label, name in enumerate(names[1:], start=1):
        assert spec.classes[label - 1] == (f"N/A {label}" if name == "N/A" else name)
    content = json.loads((tmp_path / "model" / "model.json").read_text())
    assert content["preprocess"]["dtype"] == "float32"


def test_imagenets_names_are_known() -> None:
    names, source = find_classes(None, 1000, is_detector=False, checkpoint=Path("x.pth"))
    assert names[0] == "tench" and len(set(names)) == 1000 and "ImageNet" in source


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("mobilenet_v3_larg", "did you mean 'mobilenet_v3_large'"),
        ("ssdlite320_mobilenet_v3", "did you mean 'ssdlite320_mobilenet_v3_large'"),
        ("mobilenetv3_small_100.nobody", "no weights of this tag.*lamb_in1k"),
        ("mobilenet_v3_small.IMAGENET1K_V9", "no weights of this tag.*IMAGENET1K_V1"),
        ("mobilenetv3_rw", "cannot be imported, because its squeeze.*mobilenetv3_large_100"),
        ("mobilenetv3_large_150d.ra4_e3600_r256_in1k", "more layers"),
        ("tf_mobilenetv3_small_100.in1k", "TensorFlow"),
        ("tf_mobilenetv3_large_minimal_100", "activations"),
        ("", "unknown"),
        ("a\nb" * 1000, "unknown"),
    ],
)
def test_unknown_names(arch: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        import_model(tmp_path / "absent.pth", tmp_path / "out", arch=arch)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize("name", timm.list_models("*mobilenetv3*"))
def test_every_mobilenetv3_of_timm_is_taken_or_refused(name: str) -> None:
    if name in ARCHS:
        assert find_source(name, file_name="").arch == name
    else:
        with pytest.raises(ValueError, match="cannot be imported, because"):
            find_source(name, file_name="")


@pytest.fixture(scope="module")
def small() -> dict:
    """A classifier of torchvision with three classes."""
    return torchvision_classifier("small", 3).state_dict()


def refused(path: Path, message: str, *, arch: str, classes: Path | None = None) -> None:
    out = path.parent / "out"
    with pytest.raises(ValueError, match=message) as caught:
        import_model(path, out, arch=arch, classes=classes)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_weights_of_another_model_are_named(small: dict, tmp_path: Path) -> None:
    names = write_names(tmp_path / "names.txt", 3)
    path = save(small, tmp_path / "w.pth")
    hint = "are those of --arch mobilenet_v3_small$"
    for arch in ("mobilenet_v3_large", DETECTOR):
        refused(path, f"no weights of {arch}.*{hint}", arch=arch, classes=names)
    narrow = timm.create_model("mobilenetv3_small_075", num_classes=3).state_dict()
    hint = "instead of.*are those of --arch mobilenetv3_small_075$"
    path = save(narrow, tmp_path / "narrow.pth")
    refused(path, hint, arch="mobilenetv3_small_100", classes=names)
    lacking = {k: v for k, v in small.items() if not k.startswith("features.4")}
    path = save(lacking, tmp_path / "lacking.pth")
    refused(path, "missing entries: .*one of ssdlite", arch="mobilenet_v3_small", classes=names)
    path = save({**small, "stranger": torch.zeros(2)}, tmp_path / "more.pth")
    refused(path, "unexpected entries: stranger", arch="mobilenet_v3_small", classes=names)
    broken = {**small, "features.0.1.bias": torch.full((16,), float("nan"))}
    path = save(broken, tmp_path / "nan.pth")
    refused(path, "no finite numbers", arch="mobilenet_v3_small", classes=names)
    flat = {**small, "classifier.3.weight": torch.zeros(3)}
    path = save(flat, tmp_path / "flat.pth")
    refused(path, "missing entries", arch="mobilenet_v3_small", classes=names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.double(), "is float64"),
        (lambda w: w.to(torch.complex64), "is complex64"),
        (lambda w: w.to_sparse(), "is sparse_coo|cannot be read as weights"),
        (lambda w: w.int(), "is int32"),
        (lambda w: w[0], "other shapes"),
        (lambda w: w[..., None], "other shapes"),
    ],
)
def test_tensors_of_other_kinds(change, message: str, small: dict, tmp_path: Path) -> None:
    state = {**small, "features.0.0.weight": change(small["features.0.0.weight"])}
    path = save(state, tmp_path / "kinds.pth")
    names = write_names(tmp_path / "names.txt", 3)
    refused(path, message, arch="mobilenet_v3_small", classes=names)


def test_half_precision_is_exact_in_float32(small: dict, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in small.items()}
    path = save(half, tmp_path / "half.pth")
    names = write_names(tmp_path / "names.txt", 3)
    import_model(path, tmp_path / "model", arch="mobilenet_v3_small", classes=names)
    model = load_model(tmp_path / "model").model
    assert model.conv_stem.weight.dtype == torch.float32
    assert torch.equal(model.conv_stem.weight, half["features.0.0.weight"].float())


class Code:
    """Runs something when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


def test_damaged_and_hostile_files(
    small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = save(small, tmp_path / "good.pth").read_bytes()
    tensors = save(small, tmp_path / "good.safetensors").read_bytes()
    files = {
        "cut.pth": good[: len(good) // 2],
        "cut.safetensors": tensors[: len(tensors) // 2],
        "text.pth": b"hello",
        "empty.safetensors": b"",
        "code.pth": pickle.dumps(Code()),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, name, arch="mobilenet_v3_small")
    torch.save({"model": Code()}, tmp_path / "zip.pth")
    refused(tmp_path / "zip.pth", "cannot be read as weights", arch="mobilenet_v3_small")
    refused(tmp_path / "absent.pth", "does not exist", arch="mobilenet_v3_small")
    assert not (tmp_path / "pwned").exists()


def test_class_files(small: dict, tmp_path: Path) -> None:
    arch = "mobilenet_v3_small"
    path = save(small, tmp_path / "w.pth")
    refused(path, "3 classes.*--classes FILE", arch=arch)
    refused(path, "no class file", arch=arch, classes=tmp_path / "nothing")
    refused(path, "4 names.*3 classes", arch=arch, classes=write_names(tmp_path / "four", 4))
    names = tmp_path / "names.txt"
    for content, message in (
        ("a\na\nb\n", "'a' twice"),
        ("a\n\nb\n", "name 2 is ''"),
        ("__background__\na\nb\n", "foreground"),
        ("", "names 0 classes"),
    ):
        names.write_text(content)
        refused(path, message, arch=arch, classes=names)
    names.write_bytes(b"\xff\xfe\x00")
    refused(path, "UTF-8", arch=arch, classes=names)
    names.write_text("\ufeffäh\r\nbe\r\nce\r\n\r\n", encoding="utf-8", newline="")
    import_model(path, tmp_path / "model", arch=arch, classes=names)
    assert load_model(tmp_path / "model").spec.classes == ("äh", "be", "ce")
