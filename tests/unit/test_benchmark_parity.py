"""`python benchmarks/parity.py` runs, and would notice a difference."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def parity(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    import parity

    yield parity
    torch.set_num_threads(threads)


def run(parity, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    code = parity.main([*words, "--pictures", "3"])
    return code, json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_the_report(parity, capsys, tmp_path: Path) -> None:
    files = tmp_path / "report.json", tmp_path / "report.md"
    code, report = run(
        parity,
        capsys,
        *("--models", "mobilenet_v3_small", "--json", str(files[0]), "--markdown", str(files[1])),
    )
    assert code == 0
    assert report["verdict"]["met"] is True
    assert json.loads(files[0].read_text()) == report
    (row,) = report["models"]
    assert row["pictures"] == 3
    assert row["state_dict_equal"] is True
    assert row["largest_difference"]["input"] == 0.0
    assert str(tmp_path) not in files[0].read_text() + files[1].read_text()
    assert "mobilenet_v3_small" in files[1].read_text()


def test_a_difference_is_noticed(parity, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    load_model = parity.load_model

    def slightly_wrong(path: Path):
        loaded = load_model(path)
        with torch.no_grad():
            loaded.model.conv_stem.weight.mul_(1.001)
        return loaded

    monkeypatch.setattr(parity, "load_model", slightly_wrong)
    code, report = run(parity, capsys, "--models", "mobilenetv3_small_050")
    assert code == 1
    assert report["verdict"]["met"] is False
    assert report["verdict"]["state_dicts_equal"] is False
    assert report["verdict"]["largest_difference"]["raw"] > 1e-6


def test_too_few_pictures_are_one_line(parity, capsys, tmp_path: Path) -> None:
    assert parity.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: 0 pictures" in capsys.readouterr().err
    assert parity.main([str(tmp_path), str(tmp_path / "absent")]) == 2
    assert f"parity: {tmp_path / 'absent'}: no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parity.main(["--models", "resnet50"])
