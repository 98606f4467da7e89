"""The steps of a lent GPU machine: limited in time, saved at once, with words that scripts take."""

import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import end_to_end
import gpu_session
import train_step
from gpu_session import STEPS, Step


def test_scripts_take_the_words_of_every_step(tmp_path):
    assert len({step.name for step in STEPS}) == len(STEPS)
    seen = []
    for step in STEPS:
        script = step.words[0]
        if script not in ("benchmarks/train_step.py", "benchmarks/end_to_end.py"):
            continue
        module = train_step if "train_step" in script else end_to_end
        words = [word.replace("RESULTS", str(tmp_path)) for word in step.words[1:]]
        module.parse([*words, "--device", "cpu"])
        seen.append(step.name)
    assert seen == ["large", "detectors", "end_to_end", "layers", "small", "inference", "modes"]
    for step in STEPS:
        for words in filter(None, (step.words, step.rehearsal)):
            assert words[0] == "-m" or (gpu_session.ROOT / words[0]).is_file()


def test_a_step_that_takes_too_long_is_interrupted_and_what_it_said_is_kept(
    tmp_path, capsys, monkeypatch
):
    code = "import time\nprint('begun', flush=True)\ntry:\n    time.sleep(60)\n"
    code += "finally:\n    print('told to end')"
    monkeypatch.setattr(
        gpu_session,
        "STEPS",
        (
            Step("long", 1, ("-c", code)),
            Step("broken", 60, ("-c", "import sys; sys.exit('no room')")),
            Step("fine", 60, ("-c", "import os, mbv3dist; print(os.environ['PYTHONPATH'])")),
        ),
    )
    packed = tmp_path / "out" / "all.tgz"
    words = ["long", "broken", "fine", "--results", str(tmp_path / "r"), "--pack", str(packed)]
    assert gpu_session.main(words) == 1
    said = capsys.readouterr().out
    assert "begun" in said and "told to end" in said and "no room" in said
    assert "long: exit code" in said and "after its 1 s" in said
    assert "broken: exit code 1," in said and "fine: exit code 0," in said
    with tarfile.open(packed) as file:
        logs = {name: file.extractfile(f"results/{name}.log").read() for name in ("long", "fine")}
    assert b"told to end" in logs["long"]
    paths = logs["fine"].decode().strip().split(":")
    assert paths[:2] == [str(gpu_session.SITE), str(gpu_session.ROOT)]
    assert gpu_session.main(["fine", "--results", str(tmp_path / "r")]) == 0


@pytest.mark.parametrize(("words", "said"), [(["all"], "no step 'all'"), ([], "name steps: ")])
def test_wrong_words_are_told(words, said, capsys):
    assert gpu_session.main(words) == 2
    assert said in capsys.readouterr().err
