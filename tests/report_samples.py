"""Made-up results of the kinds that no committed run has yet, for test_benchmark_report.py."""

from __future__ import annotations

from typing import Any

GPU = "NVIDIA H200"
HEAD = {
    "command": "python benchmarks/{}.py --json FILE",
    "machine": {"cpu": "A CPU", "cores": 16, "system": "Linux", "python": "3.12.3", "load_1min": 1},
    "commit": "0123456789abcdef",
    "versions": {"torch": "2.11.0"},
    "seconds": 61.0,
    "threads": 8,
}


def ratio(value: float, spread: float = 0.1) -> dict[str, float]:
    """A ratio with an interval around it."""
    return {"ratio": value, "low": round(value - spread, 3), "high": round(value + spread, 3)}


def figures(value: float) -> dict[str, Any]:
    """A median over three rounds."""
    rounds = [value, value * 0.95, value * 1.05]
    return {"median": value, "p10": value * 0.96, "p90": value * 1.04, "rounds": rounds}


def report(benchmark: str, sections: dict[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A report with sections that say where they ran."""
    head = {**HEAD, "command": HEAD["command"].format(benchmark), **more}
    return {
        "benchmark": benchmark,
        **head,
        "sections": {name: {**head, **part} for name, part in sections.items()},
    }


def end_to_end() -> dict[str, Any]:
    """Files to trained steps on the CPU: behind one peer, not to be told apart from another."""
    rows = {
        "ours": ("mbv3dist", 60.0, 0.95),
        "torchvision": ("torchvision, PIL", 63.0, 1.0),
        "timm": ("timm", 75.0, 1.19),
    }
    systems = {
        name: {
            "title": title,
            "images_per_s": figures(speed),
            "data_wait": figures(0.04),
            "times_base": ratio(times, 0.01 if name != "torchvision" else 0),
        }
        for name, (title, speed, times) in rows.items()
    }
    part = {"systems": systems, "base": "torchvision", "batch": 16, "device": "cpu"}
    return report("end_to_end", {"classifier small": part})


def gpu_train_step() -> dict[str, Any]:
    """A classifier's step on a GPU, with each library's best, and the roofline."""
    settings = {
        "ours channels_last bf16 compiled": (17000.0, 3.4),
        "timm channels_last bf16 compiled": (15000.0, 3.0),
        "torchvision channels_last bf16": (8000.0, 1.6),
        "torchvision contiguous bf16": (5000.0, 1.0),
    }
    systems = {
        name: {
            "title": name.replace(" contiguous", "").replace(" ", ", "),
            "images_per_s": figures(speed),
            "ms": {"forward": figures(5.0), "backward": figures(9.0)},
            "times_base": ratio(times),
            "times_same": ratio(times),
        }
        for name, (speed, times) in settings.items()
    }
    part = {
        "batch": 256,
        "base": "torchvision contiguous bf16",
        "systems": systems,
        "amp": "bf16",
        "best": {
            "ours": "ours channels_last bf16 compiled",
            "timm": "timm channels_last bf16 compiled",
            "torchvision": "torchvision channels_last bf16",
        },
        "best_ratio": {"timm": ratio(1.133), "torchvision": ratio(2.125)},
        "failed": {"timm graph": "out of memory"},
        "clocks": {"load": {"sm_mhz": 1980, "throttle": ["power cap"]}},
        "trace": {
            "file": "trace.json.gz",
            "system": "ours channels_last bf16 compiled",
            "kernels": [{"name": "depthwise", "calls": 12, "ms": 3.1, "share": 0.31}],
        },
    }
    copy = {"best_gb_s": 4100.0, "median_gb_s": 4080.0}
    points = [
        ("training", "ours", 17000.0, 123903632, 1299538560, 33090.0, 0.514),
        ("training", "timm", 15000.0, 123903632, 1299538560, 33090.0, 0.453),
        ("inference", "ours", 120000.0, 17835568, 433179520, 229900.0, 0.522),
    ]
    keys = ("what", "library", "images_per_s", "bytes_per_image", "flop_per_image")
    roofline = {
        "bandwidth": {"copy": copy, "triad": copy, "buffer_bytes": 1 << 30},
        "matmul_tflop_s": {"bf16": 700.0},
        "points": [
            {
                "model": "classifier large",
                "system": f"{row[1]} channels_last bf16 compiled",
                **dict(zip((*keys, "limit_images_per_s", "fraction"), row, strict=True)),
            }
            for row in points
        ],
    }
    return report("train_step", {"classifiers large": part, "roofline": roofline}, device=GPU)


def _measured(efficiency: float) -> dict[str, Any]:
    ranks: dict[str, Any] = {}
    for count, found in (("1", 1.0), ("2", efficiency)):
        ranks[count] = {
            "step_ms": figures(120.0 / found),
            "images_per_s": figures(130.0 * int(count) * found),
            "speedup": ratio(int(count) * found, 0.05),
            "efficiency": ratio(found, 0.03),
        }
    ranks["2"]["communication"] = {"share": {"share": 0.12, "low": 0.1, "high": 0.15}}
    return {"models": {"mobilenetv3_small": {"size": 96, "batch": 16, "ranks": ranks}}}


def scaling() -> dict[str, Any]:
    """Two ranks measured, up to 1024 predicted, one check that fails."""
    check = {
        "kind": "weak",
        "ranks": 2,
        "measured_ms": {"value": 131.0, "low": 128.0, "high": 135.0},
        "predicted_ms": {"value": 160.0, "low": 150.0, "high": 170.0},
        "error": {"error": 0.22, "low": 0.17, "high": 0.26},
        "within": False,
    }
    prediction = {
        "limit": 0.15,
        "assumptions": ["every rank is as fast as this one"],
        "models": {
            "mobilenetv3_small": {"checks": [check]},
            "ssdlite_mobilenetv3_small": {"checks": [], "reason": "one GPU"},
        },
    }
    curves = [
        {
            "name": name,
            "title": title,
            "points": {
                "weak": [
                    {"ranks": 2**n, "efficiency": round(1 - 0.01 * cost * n, 3)}
                    for n in range(0, 11)
                ],
                "strong": [
                    {"ranks": 2**n, "efficiency": round(1 / (1 + cost * 2**n / 500), 3)}
                    for n in range(0, 9)
                ],
            },
        }
        for name, title, cost in (
            ("measured", "ranks like this machine's", 2),
            ("given", "a GPU of 13,500 images/s", 1),
        )
    ]
    curve = {"assumptions": [], "models": {"mobilenetv3_small": {"curves": curves}}}
    sections = {
        "weak": _measured(0.92),
        "strong": _measured(0.81),
        "prediction": prediction,
        "curve": curve,
    }
    return report("scaling", sections, device="cpu", backend="gloo")


ALL = {
    "2999-12-01-end-to-end.json": end_to_end,
    "2999-12-01-train-step.json": gpu_train_step,
    "2999-12-01-scaling.json": scaling,
}
