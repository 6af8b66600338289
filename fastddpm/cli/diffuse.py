"""``fastddpm diffuse``: the picture of data dissolving into a Gaussian, and of samples coming back."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastddpm.checks import printable
from fastddpm.cli.parser import add_output, add_shared, examples, print_output, refuse_existing

if TYPE_CHECKING:
    from fastddpm.pictures.recording import Recording, RecordingSettings
    from fastddpm.sampling.sampler import Sampler

USAGE = "%(prog)s [--data DATA] [options]"
DESCRIPTION = """Draw the forward process of data in T steps, panel by panel, with alpha_bar_t and the signal-to-noise
ratio, and beneath it a reverse process: for points that of a small network trained on the spot, or of the exact
denoiser of the data (--exact); for images that of the exact denoiser, or of a --model."""

EPILOG = examples(
    "fastddpm diffuse --data swiss-roll --steps 8",
    "fastddpm diffuse --data two-moons --steps 100 --gif --outdir pictures",
    "fastddpm diffuse --data mnist --model digits",
)

DATA_HELP = """swiss-roll (default), two-moons, checkerboard; mnist, digits8x8; a .npy, .npz or .csv of points [N, 2];
an image, an image folder, or a .npy/.npz file of images"""

# States that the animation of a long process shows.
GIF_STATES = 51


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--data", default="swiss-roll", help=DATA_HELP)
    parser.add_argument("--steps", type=int, help="T (default: 8); with --model its network calls (default: 50)")
    schedule = "cosine (default), linear_rescaled, sigmoid_jabri, ... (with --model: its own)"
    parser.add_argument("--schedule", help=schedule)
    reverse = parser.add_mutually_exclusive_group()
    reverse.add_argument("--exact", action="store_true", help="reverse points by the exact denoiser too; no training")
    reverse.add_argument("--model", help="reverse images by a model: the name of a shipped one, or a directory")
    shown = "points (default: 2000) or images (default: 2) drawn"
    parser.add_argument("--show", dest="shown", metavar="SHOW", type=int, help=shown)
    parser.add_argument("--train-steps", type=int, default=4000, help="gradient steps of the points' network")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and noise")
    add_shared(parser, "outdir", outdir=Path())
    parser.add_argument("--out", type=Path, metavar="FILE", help="the PNG itself (default: OUTDIR/diffuse-DATA.png)")
    parser.add_argument("--gif", action="store_true", help="also write an animation, beside the PNG")
    measure = "points: also compare 8 x 10000 samples with data by the sliced Wasserstein distance"
    parser.add_argument("--measure", action="store_true", help=measure)
    add_shared(parser, "device", "backend")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that exist")
    add_output(parser, "numbers")


def run(args: argparse.Namespace) -> int:
    """Compute the process, draw it, and say whether it ended Gaussian."""
    from fastddpm.files.atomic import write_files
    from fastddpm.files.figures import new_figure
    from fastddpm.pictures import gif as animation
    from fastddpm.pictures import strip as drawing
    from fastddpm.pictures.recording import record

    settings = _settings(args)
    paths = _free_paths(args)
    new_figure(1, 1)  # a missing matplotlib is better found before than after the training
    _announce(args, _waiting_for(args, settings))
    recording, sampler = record(settings, progress=sys.stderr.isatty() and not args.quiet)
    pictures = [drawing.strip(recording)]
    if args.gif:
        _announce(args, "drawing the frames of the animation")
        pictures.append(animation.gif(recording))
    write_files(dict(zip(paths, pictures, strict=True)))
    _report(args, recording, paths, _measured(args, settings, sampler))
    return 0


def _settings(args: argparse.Namespace) -> RecordingSettings:
    from fastddpm.data.points import DATA_SETS
    from fastddpm.machine.devices import resolve_device
    from fastddpm.pictures.recording import RecordingSettings
    from fastddpm.pictures.strip import MAX_PANELS

    if args.model is not None and args.schedule is not None:
        raise ValueError(f"--schedule {args.schedule} and --model {args.model}: a model brings its own schedule")
    if args.measure and args.data not in DATA_SETS:
        raise ValueError(f"--measure needs data to draw anew, {', '.join(DATA_SETS)}; got {args.data}")
    if args.measure and args.exact:
        raise ValueError("--measure is for the trained network; --exact returns to the points it was given")
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(RecordingSettings)}
    given["states"] = GIF_STATES if args.gif else MAX_PANELS
    given["device"] = str(resolve_device(args.device))
    if args.model is not None and args.steps is None:
        given["steps"] = 50
    return RecordingSettings(**{name: value for name, value in given.items() if value is not None})


def _free_paths(args: argparse.Namespace) -> list[Path]:
    """Return the files to write.

    Raises:
        ValueError: --out is no PNG, or in no folder that can be written to.
        FileExistsError: one exists, and --overwrite was not given.
    """
    png = args.out or args.outdir / f"diffuse-{Path(args.data).stem}.png"
    if png.suffix != ".png":
        raise ValueError(f"--out {png} must end in .png")
    folder = next(parent for parent in png.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} is no folder that can be written to; choose another --outdir")
    paths = [png, png.with_suffix(".gif")] if args.gif else [png]
    refuse_existing(args, paths)
    return paths


def _waiting_for(args: argparse.Namespace, settings: RecordingSettings) -> str:
    from fastddpm.data.points import DATA_SETS

    if args.model is not None:
        return f"drawing with the model {args.model} in {settings.steps} steps (--steps)"
    if args.exact or args.data not in DATA_SETS:
        return f"walking {args.data} through {settings.steps} steps (--steps)"
    return f"training a small network on {args.data} in {args.train_steps} steps (--train-steps; --exact needs none)"


def _announce(args: argparse.Namespace, what: str) -> None:
    if not args.quiet:
        print(printable(f"fastddpm: {what} ..."), file=sys.stderr, flush=True)


def _measured(args: argparse.Namespace, settings: RecordingSettings, sampler: Sampler) -> dict[str, float]:
    if not args.measure:
        return {}
    from fastddpm.data.points import compare

    _announce(args, "measuring 8 x 10000 samples")
    of_samples, of_data = compare(
        settings.data, lambda n, seed: sampler.sample(seed=seed, batch_size=n), first_seed=settings.seed + 1
    )
    return {"sw_samples": of_samples, "sw_data": of_data, "sw_ratio": of_samples / of_data}


def _report(args: argparse.Namespace, recording: Recording, paths: list[Path], measured: dict[str, float]) -> None:
    process = recording.process
    alpha_bar = process.alpha_bar(process.steps)
    summary = {
        "steps": process.steps,
        "alpha_bar_T": alpha_bar,
        "ends_gaussian": process.ends_gaussian(),
        "prior_nats": process.prior_term(recording.x_0),
        **measured,
        "files": [str(path) for path in paths],
    }
    ends, relation = ("ends", "<") if process.ends_gaussian() else ("does not end", ">=")
    advice = "" if process.ends_gaussian() or args.schedule in (None, "cosine") else "; try --schedule cosine"
    lines = [f"T = {process.t[-1]}: {ends} Gaussian, alpha_bar_T = {alpha_bar:.3g} {relation} 0.001{advice}"]
    if measured:
        lines.append(
            f"sliced Wasserstein distance: samples and data {measured['sw_samples']:.4f}, two draws of the data "
            f"{measured['sw_data']:.4f}, ratio {measured['sw_ratio']:.2f}"
        )
    print_output(args, summary, "\n".join([*lines, f"wrote {', '.join(map(str, paths))}"]))
