"""``fastddpm sample``: draw images from a model into files."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastddpm.cli import sampling_options
from fastddpm.cli.parser import examples, positive

if TYPE_CHECKING:
    from fastddpm.sampling.sample import Run
    from fastddpm.unet.unet import UNet

DESCRIPTION = """Draw one sample per seed. A seed gives the same noise in any batch, on any device and with any number
of processes. Started by torchrun, each process draws its share of the batches (RANK, WORLD_SIZE, LOCAL_RANK)."""

EPILOG = """Existing output is never overwritten unless --overwrite is given; --resume completes a run that was
interrupted, with the bytes that it would have written, and refuses if anything about it has changed. Exit status: 0, 1
(error), 2 (usage), 130 or 143 (interrupted; finished files are kept).

Processes of torchrun leave part-*.npz of --format npz, and no grid: the same command with --resume and without torchrun
then joins the parts, and draws the --grid, drawing no sample again.

""" + examples(
    "fastddpm sample --seeds 0-15 --grid --outdir samples",
    "fastddpm sample --class 7 --guidance 2 --sampler ddim --steps 50 --outdir 7",
    "torchrun --nproc-per-node 8 -m fastddpm sample --seeds 0-49999 --format npz",
)


def add_parser(subparsers: Any) -> None:
    """Attach the subcommand."""
    parser = subparsers.add_parser(
        "sample",
        usage="%(prog)s [--model MODEL] [--seeds SEEDS] [options]",
        help="draw images",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("--seeds", type=_seeds, default="0-15", help="for example 0-15,20 (default: 0-15)")
    parser.add_argument(
        "--class",
        dest="classes",
        type=_classes,
        help="class, or classes in turn (3 or 0,1,2), or none for the null class; by default a class-conditional "
        "model draws class seed %% number of classes",
    )
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of classifier-free guidance (default: 1)")
    parser.add_argument("--format", choices=("png", "npz"), default="png", help="one PNG per seed, or samples.npz")
    parser.add_argument("--grid", action="store_true", help="also write grid.png with all images")
    parser.add_argument("--scale", type=positive, default=1, metavar="N", help="enlarge the grid N times (default: 1)")
    sampling_options.add_options(parser, outdir="samples")


def run(args: argparse.Namespace) -> int:
    """Draw the samples and write them."""
    from fastddpm.sampling.outputs import Outputs
    from fastddpm.sampling.to_files import describe, draw_missing
    from fastddpm.unet.load import load

    rank, world = rank_and_world(os.environ)
    if world > 1 and args.grid:
        raise ValueError("--grid needs all images in one process; add it to a last run with --resume, without torchrun")
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
    with outputs.folder.locked():
        if world == 1:  # before the network is compiled
            outputs.folder.refuse_unless_free(resume=args.resume, overwrite=args.overwrite)
        classes = args.classes if args.classes != [None] else "none"
        config = describe(model, planned, outputs, sampler=args.sampler, classes=classes, overwrite=args.overwrite)
        outputs.folder.begin(config, resume=args.resume, overwrite=args.overwrite)
        started = time.perf_counter()
        drawn = draw_missing(planned, outputs, quiet=args.quiet)
        seconds = time.perf_counter() - started
        outputs.finish(grid=args.grid, scale=args.scale)
    _report(args, planned, drawn, seconds)
    return 0


def _plan(args: argparse.Namespace, model: UNet) -> Run:
    from fastddpm.files.images import has_image_shape
    from fastddpm.sampling.network import null_class_of

    seeds = list(dict.fromkeys(args.seeds))
    labels = _labels(args.classes, len(seeds), null_class_of(model))
    planned = sampling_options.plan(args, model, seeds, class_labels=labels, guidance=args.guidance)
    if args.format == "png" and not has_image_shape(planned.sampler.shape):
        raise ValueError(f"samples of shape {planned.sampler.shape} are no images; use --format npz")
    return planned


def _report(args: argparse.Namespace, planned: Run, drawn: list[tuple[int, float]], seconds: float) -> None:
    from fastddpm.noise.seeds import format_seeds
    from fastddpm.sampling.to_files import images_per_second

    sampler, images, rate = planned.sampler, sum(n for n, _ in drawn), images_per_second(drawn)
    summary = {
        "images": images,
        "steps": len(sampler.table),
        "seconds": round(seconds, 3),
        "images_per_second": rate,
        "device": str(sampler.device),
        "backend": "triton" if sampler.options.uses_triton else "torch",
        "compiled": planned.settle(),
        "seeds": format_seeds(planned.seeds),
        "outdir": str(args.outdir),
    }
    if args.json:
        print(json.dumps(summary))
    elif not args.quiet:
        speed = "" if rate is None else f"{rate:.3g} images/s, "
        print(
            f"{images} images, {summary['steps']} steps, {seconds:.1f} s, {speed}"
            f"{summary['device']}, {summary['backend']}, {'' if summary['compiled'] else 'not '}compiled, "
            f"seeds {summary['seeds']}"
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


def _labels(classes: list[int | None] | None, n: int, null_class: int | None) -> list[int] | None:
    if classes is None:
        return None
    known = [null_class if label is None else label for label in classes]
    if None in known:
        raise ValueError("--class none: the model has no null class")
    return [label for label in itertools.islice(itertools.cycle(known), n) if label is not None]


def _seeds(text: str) -> list[int]:
    from fastddpm.noise.seeds import parse_seeds

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
