"""What a user's mistakes look like, and how fast the light commands start."""

import json
import resource
import subprocess
import sys

import pytest
from conftest import environment, run_mbv3dist, write_imagefolder, write_voc
from PIL import Image

from mbv3dist.cli import main


def fails(capfd, *words) -> str:
    """Runs the command in this process; it must exit with 2 and one line, which is returned."""
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1, error
    return error


def cpu_seconds() -> float:
    """Processor time of the processes this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("words", [["--help"], ["inspect", "DATA", "--json"], ["plan", "DATA"]])
def test_light_commands_start_without_torch(words, detection_data):
    words = [str(detection_data) if word == "DATA" else word for word in words]
    if words[0] == "plan":
        words += ["--split", "train", "--global-batch", "6", "--json"]
    code = f"""
import sys
from mbv3dist.cli import main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code
heavy = sorted({{"torch", "timm", "accelerate", "matplotlib"}} & set(sys.modules))
print(heavy, file=sys.stderr)
"""
    seconds = []
    for _ in range(3):
        start = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(cpu_seconds() - start)
        assert done.stderr.strip() == "[]"
    assert min(seconds) < 0.5  # of processor time: wall time depends on who else is running


def test_inspect_and_verify_json(detection_data, capfd):
    main(["inspect", str(detection_data), "--json"])
    facts = json.loads(capfd.readouterr().out)
    assert facts["task"] == "detection"
    assert facts["splits"]["train"]["samples"] == 12
    main(["verify", str(detection_data), "--json"])
    assert json.loads(capfd.readouterr().out)["ok"] is True


def test_plan_keys_are_the_same_global_batches_on_any_world_size(detection_data, capfd):
    def batches(world_size: int) -> list[list[str]]:
        words = ["--split", "train", "--global-batch", "12", "--epochs", "3", "--keys"]
        main(["plan", str(detection_data), *words, "--world-size", str(world_size)])
        steps: dict[int, list[str]] = {}
        for line in capfd.readouterr().out.splitlines():
            step, _, *keys = line.split("\t")
            steps.setdefault(int(step), []).extend(keys)
        return [steps[step] for step in sorted(steps)]

    whole = batches(1)
    epochs = [sorted(batch) for batch in whole]
    assert epochs == [sorted(f"{i:09d}" for i in range(12))] * 3
    assert len({tuple(batch) for batch in whole}) == 3
    for world_size in (2, 3, 4, 6, 12):
        assert batches(world_size) == whole


def test_missing_and_empty_folders(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    out = ["--out", tmp_path / "out", "--split", "train"]
    assert "nowhere" in fails(capfd, "convert", "imagefolder", tmp_path / "nowhere", *out)
    assert "empty" in fails(capfd, "convert", "imagefolder", tmp_path / "empty", *out)
    assert "nowhere" in fails(capfd, "convert", "voc", tmp_path / "nowhere", *out)
    assert "empty" in fails(capfd, "convert", "voc", tmp_path / "empty", *out)
    assert "nowhere" in fails(capfd, "inspect", tmp_path / "nowhere")
    assert "empty" in fails(capfd, "inspect", tmp_path / "empty")
    assert "nowhere" in fails(capfd, "train", tmp_path / "nowhere.yaml")
    assert not (tmp_path / "out").exists()


def test_no_such_split(detection_data, capfd):
    line = fails(capfd, "plan", detection_data, "--split", "tset", "--global-batch", "4")
    assert "tset" in line
    assert "train" in line
    assert "val" in line


def test_unknown_key(detection_recipe, capfd):
    line = fails(capfd, "train", detection_recipe, "--optim.learning_rate", "1")
    assert "optim.learning_rate" in line
    assert "did you mean" in line


def test_unknown_command_and_flag(capfd):
    assert "trian" in fails(capfd, "trian")
    assert "--jsn" in fails(capfd, "inspect", "x", "--jsn")


def test_class_list_that_differs(tmp_path, capfd):
    first = write_imagefolder(tmp_path / "first", per_class=2)
    second = write_imagefolder(tmp_path / "second", per_class=2)
    (second / "red").rename(second / "yellow")
    out = ["--out", str(tmp_path / "data"), "--workers", "1"]
    main(["convert", "imagefolder", str(first), *out, "--split", "train"])
    capfd.readouterr()
    line = fails(capfd, "convert", "imagefolder", second, *out, "--split", "val")
    assert "yellow" in line


def test_unreadable_picture_is_named(tmp_path, capfd):
    folder = write_imagefolder(tmp_path / "pictures", per_class=2)
    data = (folder / "red" / "1.jpg").read_bytes()
    (folder / "red" / "1.jpg").write_bytes(data[: len(data) // 2])
    flags = ["--split", "train", "--workers", "1"]
    with pytest.raises(SystemExit) as caught:
        main(["convert", "imagefolder", str(folder), "--out", str(tmp_path / "data"), *flags])
    assert caught.value.code == 2
    error = capfd.readouterr().err
    assert "red/1.jpg" in error
    assert "--on-error skip" in error
    assert "Traceback" not in error


def test_batch_that_does_not_divide(detection_data, detection_recipe, capfd, monkeypatch):
    words = ["plan", detection_data, "--split", "train", "--world-size", "4"]
    line = fails(capfd, *words, "--global-batch", "6")
    assert "6" in line
    assert "4 processes" in line
    line = fails(capfd, "train", detection_recipe, "--optim.accumulation_steps", "4")
    assert "accumulation" in line
    assert "global_batch_size" in line


def test_task_of_model_and_data_differ(detection_recipe, classification_data, tmp_path, capfd):
    line = fails(
        capfd, "train", detection_recipe, "--data.path", classification_data, "--out", tmp_path
    )
    assert "classification" in line
    assert "detection" in line


def test_a_run_is_not_overwritten(classification_recipe, tmp_path, capfd):
    words = ["train", str(classification_recipe), "--out", str(tmp_path / "runs"), "--epochs", "1"]
    main(words)
    capfd.readouterr()
    line = fails(capfd, *words)
    assert "--resume auto" in line
    main([*words, "--overwrite", "true"])
    capfd.readouterr()
    # What cannot be continued is said, with both values.
    line = fails(capfd, *words, "--resume", "auto", "--epochs", "2")
    assert "epochs was 1 and is now 2" in line
    assert "nosuchmodel" in fails(capfd, "eval", tmp_path / "nosuchmodel", "x", "--split", "val")


def test_checkpoint_of_another_task(
    classification_recipe, detection_recipe, detection_data, tmp_path, capfd
):
    main(["train", str(classification_recipe), "--out", str(tmp_path / "runs"), "--epochs", "1"])
    capfd.readouterr()
    model = tmp_path / "runs" / "tiny_classifier" / "last"
    out = ["--out", tmp_path / "runs"]
    # A detector starts from a classifier's backbone; a classifier does not start from a detector.
    words = ["train", detection_recipe, *out, "--epochs", "1", "--model.init_from", model]
    main([str(word) for word in words])
    assert "made afresh: box_heads, class_heads, extras" in capfd.readouterr().out
    found = tmp_path / "runs" / "tiny_detector" / "last"
    words = ["train", classification_recipe, *out, "--name", "other", "--model.init_from", found]
    assert "give a model of the same task" in fails(capfd, *words)
    line = fails(capfd, "eval", model, detection_data, "--split", "val")
    assert "classification" in line
    assert "detection" in line


def test_a_picture_that_is_none_is_named_by_predict(classification_recipe, tmp_path, capfd):
    main(["train", str(classification_recipe), "--out", str(tmp_path / "runs"), "--epochs", "1"])
    model = tmp_path / "runs" / "tiny_classifier" / "last"
    (tmp_path / "notes.jpg").write_text("no picture")
    capfd.readouterr()
    words = ["predict", model, tmp_path / "notes.jpg", "--out", tmp_path / "seen"]
    assert "notes.jpg" in fails(capfd, *words)
    words = ["predict", model, tmp_path / "nowhere" / "*.jpg", "--out", tmp_path / "seen"]
    assert "nowhere" in fails(capfd, *words)
    Image.new("RGB", (40, 30), (220, 50, 40)).save(tmp_path / "red.png")
    words = [str(model), f"{tmp_path}/*.*g", "--out", str(tmp_path / "s"), "--on-error", "skip"]
    main(["predict", *words])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("1 picture(s) and predictions.json in ")
    assert lines[1].startswith(f"left out: {tmp_path}/notes.jpg: not a picture")
    main(["predict", *words, "--json"])
    answer = json.loads(capfd.readouterr().out)
    assert [item["file"] for item in answer["skipped"]] == [f"{tmp_path}/notes.jpg"]
    assert [len(picture["top"]) for picture in answer["pictures"]] == [3]


def test_a_missing_gpu_is_said(classification_recipe, detection_data, tmp_path, capfd):
    main(["train", str(classification_recipe), "--out", str(tmp_path / "runs"), "--epochs", "1"])
    capfd.readouterr()
    model = tmp_path / "runs" / "tiny_classifier" / "last"
    words = ["eval", model, detection_data, "--split", "val", "--device", "cuda:7"]
    assert "cuda:7" in fails(capfd, *words)


def test_module_and_script_are_the_same_command(voc_folder, tmp_path):
    assert write_voc(tmp_path / "unused", num_pictures=5).is_dir()
    done = run_mbv3dist("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("mbv3dist ")


def test_help_of_export_shows_how_many_pictures(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "of --int8; default: 128" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
@pytest.mark.parametrize(("name", "cure"), [("w.pth", "mbv3dist import"), ("m.pt2", "no command")])
def test_a_file_that_is_no_model_is_told_what_it_is(command, name, cure, tmp_path, capfd):
    model = tmp_path / name
    model.write_bytes(b"anything")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    more = {
        "eval": ["DATA", "--split", "val"],
        "predict": [str(picture), "--out", str(tmp_path / "out")],
        "export": [str(tmp_path / "out.onnx")],
    }
    error = fails(capfd, command, model, *more[command])
    assert f"{model} is a file; " in error and cure in error
