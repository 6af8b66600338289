"""``fastddpm train``: train a network on the built-in digits, an image folder or an array file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastddpm.cli import parser as shared
from fastddpm.training.config import TrainConfig

USAGE = "%(prog)s --data DATA --outdir DIR [options]"
DESCRIPTION = """Train a network by Algorithm 1 of Ho et al. 2020. Ctrl-C ends a run after its current step with a
checkpoint, and --resume continues it; then options that are not given keep the run's values. Processes that torchrun
starts share each step's batch, and take the steps that one process takes, but for dropout and the order of sums."""

EPILOG = shared.examples(
    "fastddpm train --data mnist --outdir runs/digits",
    "fastddpm train --data pictures/ --resolution 32 --flip --outdir runs/pictures",
    "fastddpm train --outdir runs/digits --resume --steps 20000",
    "torchrun --nproc-per-node 8 -m fastddpm train --data mnist --outdir runs/many",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; those that are not given keep their stored or default value."""
    parser.argument_default = argparse.SUPPRESS
    for setting in dataclasses.fields(TrainConfig):
        _add_option(parser, setting)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no closing line")


def _add_option(parser: argparse.ArgumentParser, setting: dataclasses.Field[Any]) -> None:
    name, kind, text = f"--{setting.name.replace('_', '-')}", setting.metadata["kind"], setting.metadata["help"]
    if setting.name == "out":
        text = "where to write; --out is its old name"
        parser.add_argument("--outdir", "--out", dest="out", metavar="DIR", help=text)
    elif setting.name == "compile":
        # Alone it means "on", and --no-compile "off", as they did before there was a choice.
        parser.add_argument(name, nargs="?", const="on", choices=tuple(shared.COMPILE), help=f"{text} (default: off)")
        parser.add_argument("--no-compile", dest="compile", action="store_const", const="off", help=argparse.SUPPRESS)
    elif setting.name in ("resume", "overwrite"):
        parser.add_argument(name, action="store_true", help=text)
    elif kind is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
    else:
        known = setting.default not in (None, dataclasses.MISSING)
        metavar = {int: "N", float: "X", str: setting.name.upper()}[kind]
        text = f"{text} (default: {setting.default})" if known else text
        parser.add_argument(name, type=kind, metavar=metavar, help=text)


def run(args: argparse.Namespace) -> int:
    """Train, and return 0, or 128 + the signal that interrupted it."""
    from fastddpm.machine.ranks import rank_and_world
    from fastddpm.training.folder import read_settings
    from fastddpm.training.trainer import train

    given = {k: v for k, v in vars(args).items() if k not in ("command", "quiet")}
    if "out" not in given:
        raise ValueError("give --outdir, the folder for checkpoints, log and model")
    if "compile" in given:
        given["compile"] = shared.COMPILE[given["compile"]]
    quiet = "quiet" in args
    stored = read_settings(Path(args.out)) if "resume" in args else {}
    settings = {**stored, "resume": False, "overwrite": False, **given}
    if "data" not in settings:
        raise ValueError("give --data: mnist, digits8x8, an image folder, or a .npy/.npz file")
    config = TrainConfig.from_dict(settings)
    first = rank_and_world(os.environ)[0] == 0
    shared.announce(f"reading {config.data}", quiet=quiet or not first)
    result = train(config, quiet=quiet)
    if result.signal is not None:
        name = signal.Signals(result.signal).name
        if first:
            print(f"fastddpm: stopped by {name} at step {result.steps}; continue with --resume", file=sys.stderr)
        return 128 + result.signal
    if first and not quiet:
        print(f"{result.steps} steps, loss {result.loss:.4f}, model in {config.out}")
    return 0
