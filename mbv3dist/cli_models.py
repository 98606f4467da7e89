"""Subcommands that take or make a model: eval, predict, import, export and anchors.

Like `cli.py`: parsing and hand-over only; what a command needs is imported when it runs.
"""

import argparse
from typing import Any

from mbv3dist.cli_output import Progress, positive, print_json


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Flags of `eval`."""
    parser.add_argument("model", help="model directory (runs/NAME/best) or .onnx file")
    parser.add_argument("data", help="data set made by convert, folder or URL")
    parser.add_argument("--split", required=True)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--num-threads", type=positive, default=2)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Flags of `predict`."""
    parser.add_argument("model", help="model directory (runs/NAME/best) or .onnx file")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="picture, folder or glob")
    parser.add_argument("--out", required=True, help="folder for pictures and predictions.json")
    parser.add_argument("--score-threshold", type=float, help="show detections above this score")
    parser.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="pictures that cannot be read: name them and stop (default), or leave them out and "
        "list them",
    )
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_eval(args: argparse.Namespace) -> None:
    """Score a model on a split."""
    from mbv3dist.tools.score import score

    with Progress("evaluating") as progress:
        result = score(
            args.model,
            args.data,
            split=args.split,
            batch_size=args.batch_size,
            num_threads=args.num_threads,
            device=args.device,
            progress=progress,
        )
    if result is None:  # a rank other than 0
        return
    if args.json:
        print_json(result)
        return
    for name, value in result.items():
        if name != "per_class":
            print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    for name, scores in result.get("per_class", {}).items():
        shown = "  ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
            for key, value in scores.items()
        )
        print(f"  {name}: {shown}")


def run_predict(args: argparse.Namespace) -> None:
    """Find or name what is in pictures."""
    from mbv3dist.inference.predict import predict
    from mbv3dist.inference.sources import problem_lines

    with Progress("predicting") as progress:
        result = predict(
            args.model,
            args.sources,
            args.out,
            score_threshold=args.score_threshold,
            batch_size=args.batch_size,
            device=args.device,
            on_error=args.on_error,
            progress=progress,
        )
    if args.json:
        print_json(result)
        return
    print(f"{len(result['pictures'])} picture(s) and predictions.json in {args.out}")
    for line in problem_lines({item["file"]: item["reason"] for item in result["skipped"]}):
        print(f"left out: {line}")


def add_import(parser: argparse.ArgumentParser) -> None:
    """Flags of `import`."""
    parser.add_argument("checkpoint", help="state dict of torchvision or timm: .pth, .safetensors")
    parser.add_argument("out", help="model directory to write")
    parser.add_argument(
        "--arch", required=True, help="the library's own name, such as mobilenet_v3_large"
    )
    parser.add_argument("--classes", help="file with one foreground class name per line")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing model directory"
    )


def run_import(args: argparse.Namespace) -> None:
    """Turn a checkpoint of another library into a model directory."""
    from mbv3dist.inference.importing import import_model

    for line in import_model(
        args.checkpoint, args.out, arch=args.arch, classes=args.classes, overwrite=args.overwrite
    ):
        print(line)


def add_export(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    from mbv3dist.inference.formats import EXPORT_FORMATS  # a tuple of names, without torch

    parser.add_argument("model", help="model directory, such as runs/NAME/best")
    parser.add_argument("out", help="file to write")
    parser.add_argument(
        "--format", choices=EXPORT_FORMATS, help="default: by the file's ending (.onnx, .pt2)"
    )
    parser.add_argument(
        "--raw", action="store_true", help="detectors: logits and deltas, without post-process"
    )
    parser.add_argument("--int8", metavar="DATA", help="onnx: quantise on this data set")
    parser.add_argument("--split", help="of --int8; default: train or trainval")
    parser.add_argument(
        "--num-pictures", type=positive, default=128, help="of --int8; default: 128"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_export(args: argparse.Namespace) -> None:
    """Write a model for other programs."""
    from mbv3dist.inference.export import export_model

    result = export_model(
        args.model,
        args.out,
        format=args.format,
        raw=args.raw,
        int8=args.int8,
        split=args.split,
        num_pictures=args.num_pictures,
        overwrite=args.overwrite,
    )
    _print(result, as_json=args.json)


def add_anchors(parser: argparse.ArgumentParser) -> None:
    """Flags of `anchors`."""
    parser.add_argument("data", help="data set made by convert, folder")
    parser.add_argument("--split", help="default: train, trainval or the only one")
    parser.add_argument("--recipe", help="YAML file: judge its anchors on its training view")
    parser.add_argument("--input-size", type=positive, help="canvas side in pixels; default: 320")
    parser.add_argument(
        "--out", metavar="DIR", help="folder for plots and anchors.json; default: write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_anchors(args: argparse.Namespace) -> None:
    """Show how well anchors cover a data set's boxes, and propose better ones."""
    from mbv3dist.tools.anchors import judge_anchors

    result = judge_anchors(
        args.data, split=args.split, recipe=args.recipe, input_size=args.input_size, out=args.out
    )
    _print(result, as_json=args.json)


def _print(result: dict[str, Any], *, as_json: bool) -> None:
    """A result as JSON, or the lines under its key `lines`."""
    lines = result.pop("lines")
    if as_json:
        print_json(result)
    else:
        print("\n".join(lines))


# name, its flags, what it does, its help
COMMANDS = (
    ("eval", add_eval, run_eval, "Score a model on a split."),
    ("predict", add_predict, run_predict, "Find or name what is in pictures."),
    ("import", add_import, run_import, "Turn weights of torchvision or timm into a model."),
    ("export", add_export, run_export, "Write a model for other programs: ONNX, int8, .pth."),
    ("anchors", add_anchors, run_anchors, "Show how anchors cover a data set; propose better."),
)
