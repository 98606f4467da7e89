"""`mbv3dist doctor` on a GPU: copies, steps, and what it tries besides."""

import json

import pytest
import torch

from mbv3dist.cli import main
from mbv3dist.tools import doctor as tool
from mbv3dist.tools.doctor_setting import Pace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_measures_the_gpu(task, request, monkeypatch, capfd):
    haste = Pace(disk=0.05, decode=0.05, copy=0.1, step=0.1, together=0.2)
    monkeypatch.setattr(tool, "QUICK", haste)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    recipe = request.getfixturevalue(f"{task}_recipe")
    main(["doctor", "--recipe", str(recipe), "--quick", "--json", "--device", "cuda", "--ranks=1"])
    result = json.loads(capfd.readouterr().out)
    assert result["environment"]["gpu"]["usable"]
    assert result["settings"]["device"] == "cuda"
    rates = result["rates"]
    assert rates["copy"]["mb_per_s"] > 100
    assert {*rates["ways"], *rates["ways_not_possible"]} == {"cpu", "hybrid", "gpu"}
    assert min(rates["ways"].values()) > 0
    assert rates["together"]["decode"] in rates["ways"]
    assert set(rates["limits"]) >= {"decode", "copy", "step"}
    # The recipe's batch in float32, the same in bfloat16, and twice the batch.
    assert [(s["batch_size"], s["precision"]) for s in rates["step"]] == [
        (6, "no"),
        (6, "bf16"),
        (12, "no"),
    ]
    assert 0 <= rates["together"]["device_wait"] <= 1
