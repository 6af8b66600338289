"""``fastddpm sample``: draw images from a model into files."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.seed_ranges import format_seeds, parse_seeds

if TYPE_CHECKING:
    from fastddpm.outputs import Outputs
    from fastddpm.sampling import Run
    from fastddpm.unet import UNet

DESCRIPTION = """Draw one sample per seed. A seed gives the same noise in any batch, on any device and with any number
of processes. Started by torchrun, each process draws its share of the batches (RANK, WORLD_SIZE, LOCAL_RANK)."""

EPILOG = """Existing output is never overwritten unless --overwrite is given; --resume completes a run that was
interrupted, with the bytes that it would have written, and refuses if anything about it has changed. Exit status: 0, 1
(error), 2 (usage), 130 or 143 (interrupted; finished files are kept)."""


def add_parser(subparsers: Any) -> None:
    """Attach the subcommand."""
    parser = subparsers.add_parser("sample", help="draw images", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--model", default="digits", help="name of a shipped model, or a directory (default: digits)")
    parser.add_argument("--steps", type=_positive, help="network calls per sample (default: all the model's timesteps)")
    parser.add_argument("--seeds", type=_seeds, default="0-15", help="for example 0-15,20 (default: 0-15)")
    parser.add_argument("--batch", type=_positive, help="the most samples per batch (default: by size and device)")
    parser.add_argument(
        "--class",
        dest="classes",
        type=_classes,
        help="class, or classes in turn (3 or 0,1,2), or none for the null class; by default a class-conditional "
        "model draws class seed %% number of classes",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of classifier-free guidance (default: 1)")
    parser.add_argument("--sampler", default="ddpm", help="ddpm, ddim, ... (default: ddpm)")
    parser.add_argument("--outdir", type=Path, default=Path("samples"), help="default: samples")
    parser.add_argument("--format", choices=("png", "npz"), default="png", help="one PNG per seed, or samples.npz")
    parser.add_argument("--grid", action="store_true", help="also write grid.png with all images")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the network (default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="for the fused step")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the network")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="complete an interrupted run of the same arguments")
    existing.add_argument("--overwrite", action="store_true", help="replace what is in the directory")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary line")


def run(args: argparse.Namespace) -> int:
    """Draw the samples and write them."""
    from fastddpm.outputs import Outputs, locked
    from fastddpm.weights import load

    rank, world = rank_and_world(os.environ)
    model = load(args.model)
    planned = _plan(args, model)
    outputs = Outputs(
        args.outdir,
        args.format,
        planned.seeds,
        planned.labels,
        planned.batches,
        planned.batches[rank::world],
        shared=world > 1,
    )
    with locked(args.outdir, shared=outputs.shared):
        outputs.begin(_config(args, model, planned), resume=args.resume, overwrite=args.overwrite)
        started = time.perf_counter()
        drawn = _draw(planned, outputs, quiet=args.quiet)
        seconds = time.perf_counter() - started
        outputs.finish(grid=args.grid)
    _report(args, planned, drawn, seconds)
    return 0


def _plan(args: argparse.Namespace, model: UNet) -> Run:
    import torch

    from fastddpm.images import has_image_shape
    from fastddpm.network import null_class_of
    from fastddpm.sampling import plan_run

    planned = plan_run(
        model,
        seeds=list(dict.fromkeys(args.seeds)),
        steps=args.steps,
        sampler=args.sampler,
        class_labels=_labels(args.classes, len(dict.fromkeys(args.seeds)), null_class_of(model)),
        guidance=args.guidance,
        batch_size=args.batch,
        device=_device(args.device, os.environ),
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        backend=args.backend,
        compile={"auto": "auto", "on": True, "off": False}[args.compile],
    )
    if args.format == "png" and not has_image_shape(planned.sampler.shape):
        raise ValueError(f"samples of shape {planned.sampler.shape} are no images; use --format npz")
    return planned


def _draw(planned: Run, outputs: Outputs, *, quiet: bool) -> int:
    """Draw the batches that are not complete, and return how many samples that made."""
    from tqdm import tqdm

    todo = [batch for batch in outputs.mine if not outputs.complete(batch)]
    drawn = 0
    total = len(todo) * len(planned.sampler.table)
    with tqdm(total=total, unit="step", file=sys.stderr, disable=quiet or not sys.stderr.isatty()) as bar:
        for batch in todo:
            x = planned.draw(batch, lambda _: bar.update() and None)
            _refuse_non_finite(x, [planned.seeds[i] for i in batch])
            outputs.save(batch, x)
            drawn += len(batch)
    return drawn


def _refuse_non_finite(x: Any, seeds: list[int]) -> None:
    finite = x.isfinite().flatten(1).all(dim=1).tolist()
    bad = [seed for seed, good in zip(seeds, finite, strict=True) if not good]
    if bad:
        raise ValueError(
            f"the sample of seed {bad[0]} is not finite ({len(bad)} of {len(seeds)} in its batch); "
            "check the model, or use --dtype float32"
        )


def _config(args: argparse.Namespace, model: UNet, planned: Run) -> dict[str, Any]:
    """Return everything that decides the bytes of the output."""
    from fastddpm.manifest import config_hash, model_digest, table_digest
    from fastddpm.noise import NOISE_VERSION

    sampler = planned.sampler
    return {
        "noise": NOISE_VERSION,
        "model": config_hash(dataclasses.asdict(model.config)),
        "weights": model_digest(model),
        "sampler": args.sampler,
        "steps": len(sampler.table),
        "table": table_digest(sampler.table),
        "shape": list(sampler.shape),
        "seeds": format_seeds(planned.seeds),
        "batch": len(planned.batches[0]),
        "classes": args.classes if args.classes != [None] else "none",
        "guidance": planned.guidance,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "device": sampler.device.type,
        "backend": "triton" if sampler.uses_triton else "torch",
        "compile": sampler.compiles,
        "format": args.format,
    }


def _report(args: argparse.Namespace, planned: Run, drawn: int, seconds: float) -> None:
    sampler = planned.sampler
    summary = {
        "images": drawn,
        "steps": len(sampler.table),
        "seconds": round(seconds, 3),
        "images_per_second": round(drawn / seconds, 4),
        "device": str(sampler.device),
        "backend": "triton" if sampler.uses_triton else "torch",
        "seeds": format_seeds(planned.seeds),
        "outdir": str(args.outdir),
    }
    if args.json:
        print(json.dumps(summary))
    elif not args.quiet:
        print(
            f"{drawn} images, {summary['steps']} steps, {seconds:.1f} s, {drawn / seconds:.3g} images/s, "
            f"{summary['device']}, {summary['backend']}, seeds {summary['seeds']}"
        )


def rank_and_world(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this process's rank and the number of processes, from torchrun's variables; (0, 1) without them.

    Raises:
        ValueError: the variables contradict each other.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if "RANK" not in environment:
        raise ValueError(f"WORLD_SIZE is {world} and RANK is not set; start with torchrun, or unset WORLD_SIZE")
    rank = int(environment["RANK"])
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}; RANK must be below it")
    return rank, world


def _device(name: str, environment: Mapping[str, str]) -> Any:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{environment['LOCAL_RANK']}" if name == "cuda" and "LOCAL_RANK" in environment else name


def _labels(classes: list[int | None] | None, n: int, null_class: int | None) -> list[int] | None:
    if classes is None:
        return None
    known = [null_class if label is None else label for label in classes]
    if None in known:
        raise ValueError("--class none: the model has no null class")
    return [label for label in itertools.islice(itertools.cycle(known), n) if label is not None]


def _seeds(text: str) -> list[int]:
    try:
        return parse_seeds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _classes(text: str) -> list[int | None]:
    if text == "none":
        return [None]
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no class; write 3, or 0,1,2, or none")
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)
