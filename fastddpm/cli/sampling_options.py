"""The options that the commands which draw samples have in common, and what they mean."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.sampling.sample import Run
    from fastddpm.unet.unet import UNet

_COMPILE: Mapping[str, bool | str] = {"auto": "auto", "on": True, "off": False}


def add_options(parser: argparse.ArgumentParser, *, outdir: str) -> None:
    """Add them, ``outdir`` being the default of --outdir."""
    parser.add_argument("--model", default="digits", help="name of a shipped model, or a directory (default: digits)")
    parser.add_argument("--steps", type=positive, help="network calls per sample (default: all the model's timesteps)")
    parser.add_argument("--batch", type=positive, help="the most samples per batch (default: by size and device)")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, ... (default: ddpm)")
    parser.add_argument("--outdir", type=Path, default=Path(outdir), help=f"default: {outdir}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the network (default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="for the fused step")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the network")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="complete an interrupted run of the same arguments")
    existing.add_argument("--overwrite", action="store_true", help="replace what is in the directory")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def plan(
    args: argparse.Namespace,
    model: UNet,
    seeds: Sequence[int],
    *,
    class_labels: list[int] | None = None,
    guidance: float = 1.0,
) -> Run:
    """Plan the run that the options ask for.

    Raises:
        ValueError: they do not fit the model, the device or each other.
    """
    import torch

    from fastddpm.sampling.sample import plan_run

    return plan_run(
        model,
        seeds=seeds,
        steps=args.steps,
        sampler=args.sampler,
        class_labels=class_labels,
        guidance=guidance,
        batch_size=args.batch,
        device=_device(args.device, os.environ),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        backend=args.backend,
        compile=_COMPILE[args.compile],
    )


def _device(name: str, environment: Mapping[str, str]) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{environment['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in environment else name


def positive(text: str) -> int:
    """Read an integer of at least 1; an argparse type.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)
