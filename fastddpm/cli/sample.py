"""``fastddpm sample``: draw images from a model into files."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.cli import sampling_options
from fastddpm.cli.parser import add_shared, examples, positive, print_output

if TYPE_CHECKING:
    from torch import Tensor

    from fastddpm.sampling.sample import Run
    from fastddpm.unet.unet import UNet

USAGE = "%(prog)s [--model MODEL] [--seeds SEEDS] [options]"
DESCRIPTION = """Draw one sample per seed. A seed gives the same noise in any batch, on any device and with any number
of processes. Those that torchrun starts share the work: each draws the next batch when it is free."""

EPILOG = """Existing output is never overwritten unless --overwrite is given; --resume completes a run that was
interrupted, with the bytes that it would have written, and refuses if anything about it has changed. Exit status: 0, 1
(error), 2 (usage), 130 or 143 (interrupted: finished files are kept, and the batch in flight after its current step,
from which --resume goes on; a second signal stops at once).

Under torchrun the last process to finish joins the parts and draws the --grid. With --resume (and torchrun's
--max-restarts) a run survives the death of its processes, and goes on with any number of them.

""" + examples(
    "fastddpm sample --seeds 0-15 --grid --outdir samples",
    "fastddpm sample --class 7 --guidance 2 --sampler ddim --steps 50 --outdir 7",
    "torchrun --nproc-per-node 8 -m fastddpm sample --seeds 0-49999 --format npz",
)

X_T = "the start of each sample, [N, ...], instead of noise from its seed: a .npy, .npz or .safetensors file"
CLASS = """class, or classes in turn (3 or 0,1,2), or none for the null class; by default a class-conditional model
draws class seed %% number of classes"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    file: Any = {"type": Path, "metavar": "FILE"}
    add("--seeds", type=_seeds, help="for example 0-15,20 (default: 0-15, or one per start of --x-T)")
    add("--x-T", **file, help=X_T)
    add("--class", dest="classes", type=_classes, help=CLASS)
    add_shared(parser, "guidance")
    add("--init-image", **file, help="begin from this image, noised as far as --strength says")
    add("--strength", type=float, default=1.0, help="share of the steps that is taken, the last ones")
    add("--mask", **file, help="image that is white where to draw; elsewhere --init-image stays")
    outside = "timesteps outside of which the weight is 1: 100 800"
    add("--guidance-interval", type=float, nargs=2, metavar="T", help=outside)
    add("--guidance-rescale", type=float, metavar="PHI", help="how far guidance keeps the spread, 0 to 1")
    add("--format", choices=("png", "npz"), default="png", help="one PNG per seed, or samples.npz")
    add("--grid", action="store_true", help="also write grid.png with all images")
    add("--scale", type=positive, default=1, metavar="N", help="enlarge the grid N times")
    sampling_options.add_options(parser, outdir="samples")


def run(args: argparse.Namespace) -> int:
    """Draw the samples and write them."""
    from fastddpm.machine.ranks import join_ranks
    from fastddpm.noise.seeds import format_seeds
    from fastddpm.sampling.outputs import Outputs
    from fastddpm.sampling.to_files import begun, draw, images_per_second
    from fastddpm.unet.load import load

    ranks = join_ranks({**vars(args), "seeds": args.seeds and format_seeds(args.seeds)})
    model = load(args.model)
    planned = _plan(args, model)
    outputs = Outputs(args.outdir, args.format, planned.seeds, planned.labels, planned.batches)
    settings = {
        "sampler": args.sampler,
        "classes": args.classes if args.classes != [None] else "none",
        "resume": args.resume,
        "overwrite": args.overwrite,
    }
    with begun(model, planned, outputs, ranks, **settings) as (_, missing):
        started = time.perf_counter()
        drawn = draw(planned, outputs, missing, ranks, quiet=args.quiet)
        # Of all ranks together, in millionths.
        rate = ranks.add("images a second", round((images_per_second(drawn) or 0) * 1e6)) / 1e6
        if ranks.add("finished") < ranks.world:
            return 0
        seconds = time.perf_counter() - started
        outputs.finish(grid=args.grid, scale=args.scale)
    _report(args, planned, sum(len(planned.batches[i]) for i in missing), seconds, rate or None, ranks.world)
    return 0


def _plan(args: argparse.Namespace, model: UNet) -> Run:
    from fastddpm.files.images import has_image_shape
    from fastddpm.files.tensors import read_numbers
    from fastddpm.sampling.network import null_class_of

    if args.strength != 1.0 and args.init_image is None and args.x_T is None:
        raise ValueError("--strength begins part-way: give --init-image, or an --x-T of that level")
    if args.mask is not None and args.init_image is None:
        raise ValueError("--mask needs --init-image, which stays where the mask is dark")
    if args.mask is None and (args.jump_length, args.jump_n_sample) != (None, None):
        raise ValueError("--jump-length and --jump-n-sample make a mask's parts fit: give --mask, or leave them out")
    x_T = None if args.x_T is None else read_numbers(args.x_T, "x_T")
    seeds = list(dict.fromkeys(args.seeds or range(16 if x_T is None else len(x_T))))
    labels = _labels(args.classes, len(seeds), null_class_of(model))
    given = {name: getattr(args, name) for name in ("guidance", "guidance_interval", "guidance_rescale")}
    starts = {"x_T": x_T, "init": _image(args.init_image, model), "mask": _image(args.mask, model, mask=True)}
    conditions: Any = {name: value for name, value in {**given, **starts}.items() if value is not None}
    conditions["strength"] = args.strength
    planned = sampling_options.plan(args, model, seeds, class_labels=labels, conditions=conditions)
    if (args.format == "png" or args.grid) and not has_image_shape(planned.sampler.shape):
        raise ValueError(f"samples of shape {planned.sampler.shape} are no images; use --format npz, without --grid")
    return planned


def _image(path: Path | None, model: UNet, *, mask: bool = False) -> Tensor | None:
    """Return the image of a file as a sample [1, C, H, W] in [-1, 1], or as a mask: true where it is light."""
    import torch

    from fastddpm.data.values import range_of, to_x_0
    from fastddpm.files.image_reader import read_image
    from fastddpm.sampling.network import shape_of

    if path is None:
        return None
    pixels = read_image(path)
    x = torch.from_numpy(to_x_0(pixels, range_of(pixels.dtype, pixels.min(), pixels.max(), None)))
    x = (x[None] if x.dim() == 2 else x.permute(2, 0, 1))[None]
    shape = shape_of(model)
    if tuple(x.shape[2:]) != shape[1:] or (not mask and x.shape[1] not in (1, shape[0])):
        raise ValueError(f"{path} is an image {list(x.shape[1:])}, and samples are {list(shape)}; resize or convert it")
    return x.mean(dim=1, keepdim=True) > 0 if mask else x.expand(1, *shape)


def _report(
    args: argparse.Namespace, planned: Run, images: int, seconds: float, rate: float | None, world: int
) -> None:
    from fastddpm.noise.seeds import format_seeds

    sampler = planned.sampler
    summary: dict[str, Any] = {
        "images": images,
        "steps": len(sampler.table),
        "seconds": round(seconds, 3),
        "images_per_second": rate,
        "device": str(sampler.device),
        "backend": "triton" if sampler.options.uses_triton else "torch",
        "compiled": planned.settle(),
        "processes": world,
        "seeds": format_seeds(planned.seeds),
        "outdir": str(args.outdir),
    }
    text = [
        *(f"{images} images", f"{summary['steps']} steps", f"{seconds:.1f} s"),
        *([] if rate is None else [f"{rate:.3g} images/s"]),
        *([f"{world} processes"] if world > 1 else []),
        *(summary["device"], summary["backend"], "compiled" if summary["compiled"] else "not compiled"),
        f"seeds {summary['seeds']}",
    ]
    print_output(args, summary, ", ".join(text))


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
