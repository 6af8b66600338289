"""The options that the commands which draw samples have in common, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastddpm.cli.parser import COMPILE, add_output, add_shared, positive
from fastddpm.tables.names import NAMES, listing

if TYPE_CHECKING:
    from fastddpm.sampling.request import Conditions
    from fastddpm.sampling.sample import Run
    from fastddpm.unet.unet import UNet

# Arguments of the samplers' tables.
TABLE_OPTIONS = (
    ("eta", float, "noise of ddim: 0 none, 1 as much as ddpm's (default: 0)"),
    (
        "spacing",
        str,
        "which timesteps are visited: linspace, leading, trailing, quadratic; and but for ddpm and ddim "
        "logsnr, karras, ays-sd15, ays-sdxl (default: linspace for ddpm and ddim, else trailing)",
    ),
    ("tau", float, "noise of sa_solver and dpm++: 0 none, 1 the reverse SDE (default: by sampler)"),
    ("jump_length", int, "RePaint's resampling for --mask: rows per jump (default: none; else 10)"),
    ("jump_n_sample", int, "how often each stretch is walked (default: none; else 10)"),
)


def add_options(parser: argparse.ArgumentParser, *, outdir: str) -> None:
    """Add them, ``outdir`` being the default of --outdir."""
    add_shared(parser, "model")
    parser.add_argument("--steps", type=positive, help="steps per sample (default: fast's own, else all timesteps)")
    parser.add_argument("--batch", type=positive, help="the most samples per batch (default: by size and device)")
    sampler = parser.add_argument("--sampler", default="fast", help="one of those below, or another of its names")
    sampler.completer = lambda **_: [entry.name for entry in NAMES]  # type: ignore[attr-defined]  # argcomplete's
    for name, kind, text in TABLE_OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)
    condition = "seen beside x: .npy or .npz, a row per seed or one"
    parser.add_argument("--condition", type=Path, metavar="FILE", help=condition)
    add_shared(parser, "outdir", "dtype", "device", "backend", "compile", outdir=Path(outdir))
    compiled = "run the network with a file of `fastddpm compile`: native code, so trust it"
    parser.add_argument("--compiled", metavar="FILE", help=compiled)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="complete an interrupted run of the same arguments")
    add_shared(existing, "overwrite")
    add_output(parser, "summary")
    parser.add_argument_group("samplers (network calls a step, what for; = other names)", listing())


def plan(
    args: argparse.Namespace,
    model: UNet,
    seeds: Sequence[int],
    *,
    class_labels: list[int] | None = None,
    conditions: Conditions | None = None,
) -> Run:
    """Plan the run that the options ask for.

    Raises:
        ValueError: they do not fit the model, the device or each other.
    """
    import torch

    from fastddpm.data.array_file import read_condition
    from fastddpm.machine.ranks import device_of_rank
    from fastddpm.sampling.network import shape_of
    from fastddpm.sampling.sample import plan_run

    beside = model.config.in_channels - shape_of(model)[0]
    if beside and args.condition is None:
        raise ValueError(f"the model sees {beside} channels beside x: give them as --condition FILE")
    if not beside and args.condition is not None:
        raise ValueError("--condition: the model sees nothing beside x; leave it out")
    conditions = conditions or {}
    if args.condition is not None:
        condition = {"condition": read_condition(args.condition, len(seeds))}
        conditions |= {"model_kwargs": condition, "null_kwargs": {"condition": 0.0}}
    given = {name: getattr(args, name) for name, _, _ in TABLE_OPTIONS if getattr(args, name) is not None}
    try:
        return plan_run(
            model,
            seeds=seeds,
            steps=args.steps,
            sampler=args.sampler,
            sampler_options=given,
            class_labels=class_labels,
            **conditions,
            batch_size=args.batch,
            device=device_of_rank(args.device),
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            backend=args.backend,
            compile=COMPILE[args.compile],
            compiled=args.compiled,
        )
    except TypeError as error:
        for name in given:
            if any(f"{what} '{name}'" in str(error) for what in ("has no option", "unexpected keyword argument")):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option}: the sampler {args.sampler} has no such option; leave it out") from None
        raise
