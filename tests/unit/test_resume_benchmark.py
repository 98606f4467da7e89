"""`python benchmarks/resume.py --quick` runs, and nothing is read again on resume."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


def test_quick_run(tmp_path):
    page = tmp_path / "resume.md"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--markdown", str(page)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert {(row["samples"], row["ranks"]) for row in report["warm"]} == {
        (1_281_167, 8),
        (10**9, 10_000),
    }
    assert all(row["cpu_ms"]["min"] > 0 for row in report["warm"])
    assert [row["bytes_again"] for row in report["reads"]] == [0, 0, 0]
    assert [row["shards_not_needed"] for row in report["reads"]] == [0, 0, 0]
    assert all(row["bytes_this_step"] > 0 for row in report["reads"])
    billion = report["cold"][1]
    assert 20 < billion["before_step_mb"] <= billion["process_mb"] < 200
    # Sorting a hundred thousand shards takes room, a billion samples would take gigabytes.
    assert 0.8 < billion["step_peak_mb"] < 50
    (opened,) = report["manifest"]
    assert opened["manifest_mb"] < opened["json_mb"]
    for heading in ("## Warm", "## Cold", "## What a resumed loader reads", "| 20,000 |"):
        assert heading in page.read_text()
