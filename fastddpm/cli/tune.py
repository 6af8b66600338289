"""``fastddpm tune``: fit tables of few steps to a model."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from fastddpm.cli.parser import add_output, add_shared, examples, positive, positives, print_output

USAGE = "%(prog)s --model MODEL [options]"
DESCRIPTION = """Fit noise levels, timesteps and coefficients of few steps to a model, so that their result meets that
of many steps from the same x_T. The best table so far is written whenever there is a better one, to tuned.json in the
model's folder, where --sampler tuned finds it; a second run goes on from there."""

EPILOG = examples(
    "fastddpm tune --model runs/mine --steps 5,8", "fastddpm sample --model runs/mine --sampler tuned --steps 5"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--model", required=True, help="directory of a model, or the name of a shipped one")
    several, many = functools.partial(positives, low=2), functools.partial(positive, low=4)
    parser.add_argument("--steps", type=several, default="5", help="one number or several")
    add_shared(parser, "guidance")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each number of steps, at most")
    parser.add_argument("--samples", type=many, default=128, help="how many to fit to; as many are held out")
    parser.add_argument("--out", type=Path, help="another file than the model's own")
    add_shared(parser, "device")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, instead of going on from tuned.json")
    add_output(parser, "tables")


def run(args: argparse.Namespace) -> int:
    """Fit, write, print."""
    import torch
    from tqdm.auto import tqdm

    from fastddpm.checks import number
    from fastddpm.evaluation.tune import Targets, tune
    from fastddpm.files.atomic import write_files
    from fastddpm.machine.devices import resolve_device
    from fastddpm.sampling.network import diffusion_of
    from fastddpm.sampling.tuned import TUNED, Tuned, read_tuned, tuned_bytes
    from fastddpm.unet.load import load

    minutes, guidance = number("--minutes", args.minutes, gt=0), number("--guidance", args.guidance)
    model = load(args.model)
    config = diffusion_of(model)
    assert model.folder is not None
    path = args.out or model.folder / TUNED
    tables = {}
    if path.exists() and not args.overwrite:
        tables = {(len(tuned.levels), tuned.guidance): tuned for tuned in read_tuned(path, model, config)}

    def line(tuned: Tuned) -> str:
        before, after = 100 * tuned.error_before, 100 * tuned.error_after
        return f"{len(tuned.levels)} steps: {before:.3g} % from the result of many steps before, {after:.3g} % after"

    def keep(tuned: Tuned) -> None:
        tables[len(tuned.levels), tuned.guidance] = tuned
        write_files({path: tuned_bytes([tables[key] for key in sorted(tables)], model, config)})
        if not args.quiet:
            tqdm.write(line(tuned), file=sys.stderr)

    model = model.to(resolve_device(args.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    with tqdm(desc="many steps", unit="call", file=sys.stderr, disable=args.quiet or None) as bar:
        targets = Targets(model, guidance=guidance, samples=args.samples, progress=bar.update)
        for steps in args.steps:
            bar.set_description_str(f"{steps} steps")
            tuned = tune(targets, steps, minutes=minutes, start=tables.get((steps, guidance)), found=keep)
            if (steps, guidance) not in tables:
                keep(tuned)
    summary = {"file": str(path), "tables": [vars(tables[key]) for key in sorted(tables)]}
    print_output(args, summary, "\n".join([*(line(tables[steps, guidance]) for steps in args.steps), f"in {path}"]))
    return 0
