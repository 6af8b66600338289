"""``fastddpm train``: train a network on the built-in digits, an image folder or an array file."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

HELP: dict[str, tuple[Any, str]] = {
    "model": (str, "UNet configuration (JSON); default: one that suits the images' size"),
    "init": (str, "model to start from: a folder or a shipped name; default: fresh weights"),
    "steps": (int, "gradient steps in all (10000)"),
    "batch": (int, "images per gradient step (64)"),
    "accumulate": (int, "passes a step's batch is divided among (1)"),
    "lr": (float, "AdamW's learning rate (0.001)"),
    "warmup": (int, "steps over which the learning rate rises (500)"),
    "decay": (float, "last fraction of the steps, over which the learning rate falls to 0 (0.3)"),
    "weight-decay": (float, "AdamW's weight decay (0.01)"),
    "grad-clip": (float, "largest norm of the gradient, 0 for no bound (1)"),
    "ema": (float, "decay of the weights' moving average (0.999)"),
    "dropout": (float, "dropout in the residual blocks (0.1)"),
    "class-dropout": (float, "how often a label becomes 'no class', for guidance (0.1)"),
    "seed": (int, "seed of weights, image order, timesteps, noise and dropout (0)"),
    "schedule": (str, "beta schedule: linear (default), cosine, sigmoid_jabri, ..."),
    "timesteps": (int, "T, the number of diffusion steps (1000)"),
    "prediction": (str, "what the network predicts: epsilon (default), v or x_0"),
    "variance": (str, "sigma while sampling: fixed_small (default), fixed_large, or trained: learned_range, learned"),
    "vlb-weight": (float, "weight of the variational bound, which trains the variance (0.001)"),
    "loss-weight": (str, "weight of the timesteps: uniform (default), min-snr or p2"),
    "gamma": (float, "of --loss-weight (min-snr: 5, p2: 1)"),
    "resolution": (int, "crop and resize a folder's images to this side"),
    "dtype": (str, "float32 (default), or bfloat16 for mixed precision"),
    "device": (str, "auto (default), cpu, cuda, cuda:1, ..."),
    "save-every": (int, "steps between checkpoints, 0 for one at the end (1000)"),
    "sample-every": (int, "steps between sample grids and loss plots, 0 for none (0)"),
    "log-every": (int, "steps per line of log.jsonl (10)"),
}
SWITCHES = {
    "flip": "mirror images at random",
    "compile": "compile the network with torch.compile",
    "tensorboard": "write TensorBoard scalars too (needs tensorboard)",
}
MODES = {
    "resume": "continue the run in --out with its settings",
    "overwrite": "replace the run in --out",
}


def add_parser(subparsers: Any) -> None:
    """Attach the parser of ``fastddpm train``; options that are not given keep their stored or default value."""
    parser = subparsers.add_parser(
        "train",
        usage="%(prog)s --data DATA --out OUT [options]",
        help="train a model",
        description="Train a network by Algorithm 1 of Ho et al. 2020. An interrupted run continues with --resume, to "
        "the same result.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--data", help="mnist, digits8x8, an image folder, or a .npy/.npz file")
    parser.add_argument("--out", required=True, help="folder for checkpoints, log and model")
    for name, (kind, text) in HELP.items():
        parser.add_argument(f"--{name}", type=kind, help=text)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    for name, text in MODES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no closing line")


def run(args: argparse.Namespace) -> int:
    """Train, and return 0, or 128 + the signal that interrupted it."""
    from fastddpm.training.config import TrainConfig
    from fastddpm.training.folder import read_settings
    from fastddpm.training.trainer import train

    given = {k: v for k, v in vars(args).items() if k not in ("command", "quiet")}
    quiet = "quiet" in args
    stored = read_settings(Path(args.out)) if "resume" in args else {}
    settings = {**stored, "resume": False, "overwrite": False, **given}
    if "data" not in settings:
        raise ValueError("give --data: mnist, digits8x8, an image folder, or a .npy/.npz file")
    config = TrainConfig.from_dict(settings)
    result = train(config, quiet=quiet)
    if result.signal is not None:
        name = signal.Signals(result.signal).name
        print(f"fastddpm: stopped by {name} at step {result.steps}; continue with --resume", file=sys.stderr)
        return 128 + result.signal
    if not quiet:
        print(f"{result.steps} steps, loss {result.loss:.4f}, model in {config.out}")
    return 0
