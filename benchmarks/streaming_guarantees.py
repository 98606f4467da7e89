"""Does a sample get lost, doubled or moved? Ours beside webdataset, MosaicML, LitData, Accelerate.

One command measures every system on the same small data set: whole epochs on 1 to 8 ranks, the
order on other numbers of ranks, resume on the same ranks and on others, evaluation, the shards that
an order needs on 8 and 32 nodes (planned, without data), and damaged files. Ranks are processes.
The peers run in an environment of their own (`make bench-peers`); `--quick` measures only ours.
The last line of standard output is one JSON object, the tables go to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from options import output_file
from peers.damage import CASES, digest
from peers.data import make_data
from peers.samples import read_pictures
from peers.table import markdown, summarise, traffic_table

HERE = Path(__file__).resolve().parent
SYSTEMS = {
    "ours": ("peers.ours_peer", "mbv3dist"),
    "webdataset": ("peers.webdataset_peer", "webdataset"),
    "mosaicml": ("peers.mosaicml_peer", "MosaicML Streaming"),
    "litdata": ("peers.litdata_peer", "LitData"),
    "accelerate": ("peers.accelerate_peer", "Accelerate"),
}
LIMIT_S = 240  # for one system


def settings(*, quick: bool) -> dict[str, Any]:
    """Return what is measured: the same for every system."""
    return {
        "quick": quick,
        "num_samples": 211 if quick else 1009,  # primes, so that nothing divides them
        "global_batch": 12 if quick else 48,
        "world_sizes": [1, 2, 3] if quick else [1, 2, 3, 4, 6, 8],
        "epochs": 2 if quick else 3,
        "stops": [3] if quick else [5, 16],
        "elastic": [[2, 1, 2]] if quick else [[8, 2, 8], [4, 3]],
        "elastic_steps": 5,
        "evaluation_world_sizes": [2, 3] if quick else [2, 3, 4],
        "limit_s": 40,
        "damage": list(CASES),
        "damage_limit_s": 20,
        "scale": {
            "num_samples": 12_812 if quick else 1_281_167,
            "num_shards": 40 if quick else 400,
            "global_batch": 256,
            "nodes": [8, 32],
            "ranks": 8,
            "shares": [0.01, 0.5, 0.99],
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the systems that were asked for, one after the other.

    Raises:
        ValueError: if the peers' environment is missing.
        RuntimeError: if a system's process fails.
    """
    names, peers_python = args.names, args.peers_python
    if any(name != "ours" for name in names) and not peers_python.is_file():
        raise ValueError(
            f"no interpreter {peers_python} for the peers; run `make bench-peers`, or name one "
            "with --peers-python, or measure --only ours"
        )
    started = time.perf_counter()
    job = settings(quick=args.quick)
    results = {}
    with tempfile.TemporaryDirectory(prefix="sg-") as folder:
        root = Path(folder)
        source = make_data(root, num_samples=job["num_samples"]) / "train"
        pictures = read_pictures(source)
        truth = {key: digest(picture) for key, picture in pictures.items()}
        mean_bytes = sum(map(len, pictures.values())) / len(pictures)
        for name in names:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
            python = Path(sys.executable) if name == "ours" else peers_python
            raw = run_system(name, python, {**job, "source": str(source)}, root)
            results[name] = summarise(raw, truth=truth, epochs=job["epochs"], mean_bytes=mean_bytes)
        num_shards = len(list(source.glob("*.tar")))
    return {
        **harness.header("streaming_guarantees", args.words),
        "settings": {**job, "num_shards": num_shards},
        "names": {name: _title(name, results[name]["versions"]) for name in results},
        "seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }


def _title(name: str, versions: dict[str, str]) -> str:
    return f"{SYSTEMS[name][1]} {next(iter(versions.values()))}"


def run_system(name: str, python: Path, job: dict[str, Any], root: Path) -> dict[str, Any]:
    """Run one adapter in its interpreter and return what it printed."""
    work = root / name
    (work / "tmp").mkdir(parents=True)
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOBAL_RANK", "NNODES")
    environment = {key: value for key, value in os.environ.items() if key not in launcher}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(work / "tmp"),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        # Nothing of this needs a network; these two would ask.
        "LITDATA_DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = work / "log.txt"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [str(python), "-m", SYSTEMS[name][0]],
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            text = json.dumps({**job, "root": str(work / "data")})
            output, _ = process.communicate(text, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it ends its ranks on the way out
            process.wait(timeout=20)
            raise RuntimeError(f"{name} did not end within {LIMIT_S} s") from None
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{name} failed with exit code {process.returncode}:\n{tail}")
    # Messages name files; what stands before them differs from run to run.
    result: dict[str, Any] = json.loads(output.replace(str(work), "WORK"))
    return result


def report_text(report: dict[str, Any]) -> str:
    """Return the report as a document: machine, command, settings, tables, messages."""
    host = report["machine"]
    job = report["settings"]
    lines = [
        "# Streaming guarantees",
        "",
        f"`{report['command']}`, {report['seconds']:.0f} s, commit {report['commit']}.",
        f"Machine: {host['cpu']}, {host['cores']} cores, load {host['load_1min']} at the end, "
        f"{host['system']}, Python {host['python']}.",
        f"Data: {job['num_samples']} drawn pictures in {job['num_shards']} tars (about as many "
        f"shards in the other formats), global batch {job['global_batch']}, {job['epochs']} "
        f"epochs. Planned without data: {job['scale']['num_samples']} samples in "
        f"{job['scale']['num_shards']} shards, global batch {job['scale']['global_batch']}, "
        "one rank a node.",
        "",
        markdown(report),
        "",
        traffic_table(report),
        "",
        "Resume, other numbers of ranks and evaluation: two workers a rank (ours: five threads); "
        "damage: one rank, no workers.",
        "",
        "What was set, and versions:",
        "",
    ]
    for name, result in report["results"].items():
        versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items())
        lines.append(f"- {report['names'][name]} ({versions}; {result['seconds']} s)")
        lines += [f"  - {what}: {text}" for what, text in result["settings"].items()]
        if "resume_what" in result["scale"]:
            lines.append(f"  - planning a resume: {result['scale']['resume_what']}")
    lines += ["", "What was said about the damage:", ""]
    for name, result in report["results"].items():
        for variant, rows in result["damage"].items():
            said = {case: row["message"] for case, row in rows.items() if row and row["message"]}
            for case, text in said.items():
                words = " ".join(text.replace("`", "'").split())
                lines.append(f"- {name} ({variant}), {case}: `{words}`")
    return "\n".join(lines) + "\n"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ValueError: For a system that there is not.
    """
    parser = argparse.ArgumentParser(description="Streaming guarantees, ours beside the peers'.")
    parser.add_argument("--quick", action="store_true", help="a few seconds, only ours")
    parser.add_argument("--only", metavar="NAMES", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="save the results")
    parser.add_argument("--markdown", type=output_file, metavar="FILE", help="save the report")
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="log the figures to this project of Weights & Biases"
    )
    parser.add_argument(
        "--peers-python",
        type=Path,
        default=harness.PEERS_PYTHON,
        metavar="PATH",
        help="interpreter that has the peers (default: .venv-peers, made by `make bench-peers`)",
    )
    args = parser.parse_args(words)
    args.words = list(words)
    args.names = (args.only or ("ours" if args.quick else ",".join(SYSTEMS))).split(",")
    for name in args.names:
        if name not in SYSTEMS:
            raise ValueError(f"no system {name!r}; --only takes {', '.join(SYSTEMS)}")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Measure and report; return the exit code."""
    return harness.run(
        "streaming_guarantees", words, parse=parse, measure=measure, report_text=report_text
    )


if __name__ == "__main__":
    sys.exit(main())
