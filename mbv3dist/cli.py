"""The `mbv3dist` command: parses, hands over, and turns a user's mistake into one line.

Every subcommand imports what it needs when it runs, so that --help, inspect and plan start without
torch. Exit code 0 is success, 2 wrong usage or input.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import mbv3dist
from mbv3dist import cli_models
from mbv3dist.cli_output import Progress, positive, print_json


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and no abbreviated flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with 2 and one line for a user's mistake."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.takes_config_flags:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.config_flags = rest
    try:
        args.run(args)
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output has left: no mistake
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0) from None
        if os.environ.get("MBV3DIST_TRACEBACK"):
            raise
        rank = os.environ.get("RANK", "0")
        who = "mbv3dist" if rank == "0" else f"mbv3dist (rank {rank})"
        print(f"{who}: error: {_describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("mbv3dist: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="mbv3dist",
        description="Train MobileNetV3 classifiers and SSDLite detectors on many GPUs.",
    )
    parser.add_argument("--version", action="version", version=f"mbv3dist {mbv3dist.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], text: str, **kwargs: Any
    ) -> Any:
        child = commands.add_parser(name, help=text, description=text, **kwargs)
        child.set_defaults(run=run, takes_config_flags=False)
        return child

    _add_convert(command("convert", _convert, "Turn labelled pictures into tar shards."))

    inspect = command("inspect", _inspect, "Show what is in a data set.")
    inspect.add_argument("data", help="data set made by convert, folder or URL")
    inspect.add_argument("--split", action="append", help="only this split (URLs by http need it)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")

    verify = command("verify", _verify, "Check every byte of a data set.")
    verify.add_argument("data", help="data set made by convert")
    verify.add_argument("--json", action="store_true", help="print one JSON object")

    _add_plan(command("plan", _plan, "Show who reads what, when, without reading a picture."))

    train = command(
        "train",
        _train,
        "Train a model by a recipe; every key of it can be set by a flag.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", help="YAML file, for instance from configs/")
    train.set_defaults(takes_config_flags=True)
    train.format_help = lambda: _train_help(train)

    for name, add, run, text in cli_models.COMMANDS:
        add(command(name, run, text))

    _add_doctor(command("doctor", _doctor, "Measure this machine; say what bounds training."))

    quickstart = command("quickstart", _quickstart, "The whole job on a data set made here.")
    quickstart.add_argument("--out", default="runs/quickstart", help="folder for all of it")
    quickstart.add_argument("--processes", type=positive, default=2)
    return parser


def _train_help(parser: argparse.ArgumentParser) -> str:
    """The help of `train` with all keys of a recipe; only made when asked for."""
    from mbv3dist.recipe import config_help

    text = argparse.ArgumentParser.format_help(parser)
    return f"{text}\nkeys of a recipe, and flags:\n{config_help()}\n"


def _add_convert(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=_Parser)
    imagefolder = kinds.add_parser("imagefolder", help="a folder per class")
    imagefolder.add_argument("sources", nargs=1, metavar="SRC")
    voc = kinds.add_parser("voc", help="Pascal VOC layout, labelImg's XML")
    voc.add_argument("sources", nargs="+", metavar="ROOT")
    voc.add_argument("--task", choices=["detection", "classification"], default="detection")
    voc.add_argument(
        "--object-crops",
        action="store_true",
        help="classification: a sample per object, cut out; else the largest object is the label",
    )
    for kind in (imagefolder, voc):
        kind.add_argument("--out", required=True, help="folder of the data set, or URL")
        kind.add_argument("--split", required=True, help="name of the split")
        kind.add_argument("--classes", help="file with one class name per line")
        kind.add_argument("--val-fraction", type=float, default=0.0, help="share cut off as `val`")
        kind.add_argument("--seed", type=int, default=0)
        kind.add_argument("--resize", type=positive, help="shrink the shorter side to this")
        kind.add_argument("--max-side", type=positive, help="shrink the longer side to this")
        kind.add_argument("--quality", type=int, default=90, help="JPEG quality of what is shrunk")
        kind.add_argument(
            "--format",
            choices=["jpeg", "raw"],
            default="jpeg",
            help="raw: store pixels (.npy); many times the bytes, no decoding in training",
        )
        kind.add_argument("--on-error", choices=["fail", "skip"], default="fail")
        kind.add_argument("--overwrite", action="store_true", help="replace an existing split")
        kind.add_argument("--workers", type=positive, help="processes; default: all cores")
        kind.add_argument("--shard-mb", type=positive, default=128, help="MiB in a shard, about")
        kind.add_argument("--part", metavar="I/N", help="do only the I-th of N parts, from 1")
        kind.add_argument("--work", metavar="DIR", help="local folder for an --out URL")
        kind.add_argument("--keep-local", action="store_true", help="keep what --work holds")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", help="data set made by convert; several are joined")
    parser.add_argument("--split", help="of the data sets")
    parser.add_argument("--samples", type=positive, help="imagine so many, without a data set")
    parser.add_argument("--shard-samples", type=positive, default=1000, help="of --samples")
    parser.add_argument("--sample-bytes", type=positive, default=110_000, help="of --samples")
    parser.add_argument("--weights", type=float, nargs="+", default=(), help="one per data set")
    parser.add_argument("--balance-classes", action="store_true")
    parser.add_argument("--world-size", type=positive, default=1, help="ranks")
    parser.add_argument("--ranks-per-node", type=positive, help="default: 8, or what divides")
    parser.add_argument("--cache-gb", type=float, default=64.0, help="of a node, for remote shards")
    parser.add_argument("--global-batch", type=positive, required=True)
    parser.add_argument("--epochs", type=positive, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=positive)
    parser.add_argument("--block-shards", type=positive, default=4)
    parser.add_argument("--tail", choices=["carry", "drop"], default="carry")
    parser.add_argument("--steps", metavar="A:B", help="only these steps, B left out")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--keys", action="store_true", help="one line per step and rank: its keys")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="*", help="data set made by convert; default: drawn pictures")
    parser.add_argument("--recipe", help="YAML file, such as runs/NAME/config.yaml")
    parser.add_argument("--split", help="default: the recipe's, or train, trainval, the only one")
    parser.add_argument("--architecture", help="network; default: the recipe's, or Large")
    parser.add_argument("--batch-size", type=positive, help="pictures per rank and forward pass")
    parser.add_argument("--num-threads", type=positive, help="decoding threads per rank")
    parser.add_argument("--ranks", type=positive, help="of this node; default: one per GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="a third of the time, less exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _convert(args: argparse.Namespace) -> None:
    from mbv3dist.convert.imagefolder import convert_imagefolder
    from mbv3dist.convert.records import parse_part
    from mbv3dist.convert.summary import summary_lines
    from mbv3dist.convert.voc import convert_voc
    from mbv3dist.data.class_names import read_class_file

    options = {
        "split": args.split,
        "classes": read_class_file(args.classes) if args.classes else None,
        "val_fraction": args.val_fraction,
        "seed": args.seed,
        "resize": args.resize,
        "max_side": args.max_side,
        "quality": args.quality,
        "format": args.format,
        "on_error": args.on_error,
        "workers": args.workers,
        "shard_bytes": args.shard_mb * 2**20,
        "overwrite": args.overwrite,
        "part": parse_part(args.part) if args.part is not None else None,
        "work": args.work,
        "keep_local": args.keep_local,
    }
    with Progress("converting") as progress:
        if args.kind == "imagefolder":
            report = convert_imagefolder(args.sources[0], args.out, progress=progress, **options)
        else:
            report = convert_voc(
                args.sources,
                args.out,
                task=args.task,
                object_crops=args.object_crops,
                progress=progress,
                **options,
            )
    for line in summary_lines(report, args.out):
        print(line)


def _inspect(args: argparse.Namespace) -> None:
    from mbv3dist.convert.inspect import inspect_dataset

    facts = inspect_dataset(args.data, args.split)
    if args.json:
        print_json(facts)
        return
    print(f"{args.data}: {facts['task']}, {len(facts['classes'])} classes")
    print(f"classes: {', '.join(facts['classes'])}")
    for name, split in facts["splits"].items():
        boxes = f"{split['boxes']} boxes, " if facts["task"] == "detection" else ""
        print(
            f"{name}: {split['samples']} samples, {boxes}{split['shards']} shard(s), "
            f"{split['bytes'] / 1e6:.1f} MB" + (", raw" if split["format"] == "raw" else "")
        )


def _verify(args: argparse.Namespace) -> None:
    from mbv3dist.convert.verify import verify_dataset

    with Progress("verifying") as progress:
        result = verify_dataset(args.data, progress=progress)
    if args.json:
        print_json(result)
    else:
        for problem in result["problems"]:
            print(problem)
        verdict = "is whole" if result["ok"] else f"has {len(result['problems'])} problem(s)"
        print(f"{args.data}: {result['samples']} samples checked; the data set {verdict}")
    if not result["ok"]:
        raise SystemExit(2)


def _plan(args: argparse.Namespace) -> None:
    from mbv3dist.tools.planning import print_plan

    print_plan(args)


def _train(args: argparse.Namespace) -> None:
    from mbv3dist.recipe import load_config

    config = load_config(args.recipe, args.config_flags)
    from mbv3dist.training.run import train

    result = train(config)
    if os.environ.get("RANK", "0") == "0" and not result["stopped"]:
        models = [name for name in ("best", "last") if (Path(result["run"]) / name).is_dir()]
        print(f"models: {', '.join(str(Path(result['run']) / name) for name in models)}")


def _doctor(args: argparse.Namespace) -> None:
    from mbv3dist.tools.doctor import print_doctor

    with Progress("measuring") as progress:
        print_doctor(args, progress=progress)


def _quickstart(args: argparse.Namespace) -> None:
    from mbv3dist.tools.quickstart import quickstart

    quickstart(out=args.out, processes=args.processes)
