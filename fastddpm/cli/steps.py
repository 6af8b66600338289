"""``fastddpm steps``: how many network calls a model needs."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

from fastddpm.cli import parser as shared

USAGE = "%(prog)s [--model MODEL] [options]"
DESCRIPTION = """Draw the same samples with few and with many network calls, and print how far apart they are: each
sampler's error against the number of calls, and the fewest calls within 5 % of the many-step result. An error is a root
mean square distance over the samples' standard deviation, of pixels and, for the shipped digits, of a classifier's
features. OUTDIR holds steps.json, and steps.png where matplotlib is installed."""

EPILOG = shared.examples(
    "fastddpm steps --model digits", "fastddpm steps --model runs/mine --samplers ddim --calls 10,20,50"
)

REPORT, PLOT = "steps.json", "steps.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    shared.add_shared(parser, "model")
    parser.add_argument("--samplers", default="ddim,dpm++2m,unipc3", help="deterministic ones")
    parser.add_argument("--calls", type=shared.positives, default="4,5,6,8,10,15,20,30,50", help="default: %(default)s")
    parser.add_argument("--many", type=shared.positive, default=200, help="steps of the many-step result")
    parser.add_argument("--within", type=float, default=5.0, help="per cent of error that is enough")
    parser.add_argument("--samples", type=functools.partial(shared.positive, low=2), default=16, help="how many")
    shared.add_shared(parser, "seed", "guidance", "outdir", "dtype", "device", "backend", "compile", "overwrite")
    parser.set_defaults(outdir=Path("steps"))
    shared.add_output(parser, "report")


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    import torch
    from tqdm.auto import tqdm

    from fastddpm.checks import number
    from fastddpm.evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier
    from fastddpm.evaluation.steps import measure_steps, steps_plot, steps_text
    from fastddpm.files.atomic import write_files
    from fastddpm.files.run_folder import RunFolder
    from fastddpm.sampling.network import diffusion_of
    from fastddpm.unet.load import load

    samplers = _deterministic(args.samplers)
    within = number("--within", args.within, gt=0) / 100
    model, features = load(args.model), None
    if args.model == "digits":
        features = torch.no_grad()(load_classifier(SHIPPED_CLASSIFIER).features)
    T = diffusion_of(model).num_timesteps
    written, plot = (args.outdir / name for name in (REPORT, PLOT))
    folder = RunFolder(args.outdir, ())
    with folder.locked(), tqdm(unit="call", desc="drawing", file=sys.stderr, disable=args.quiet or None) as bar:
        shared.refuse_existing(args, [written, plot])
        report = measure_steps(
            model,
            samplers=samplers,
            calls=[n for n in args.calls if n <= T],
            many=min(args.many, T),
            seeds=range(args.seed, args.seed + args.samples),
            guidance=args.guidance,
            within=within,
            features=features,
            progress=bar.update,
            device=args.device,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            backend=args.backend,
            compile=shared.COMPILE[args.compile],
        )
        report = {"model": args.model, "samples": args.samples, "guidance": args.guidance, **report}
        files = {written: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
        try:
            files[plot] = steps_plot(report)
        except ImportError:
            plot.unlink(missing_ok=True)
        write_files(files)
    head = f"{args.model}: {args.samples} samples, guidance {args.guidance:g},"
    shared.print_output(args, report, f"{head}\n{steps_text(report)}")
    return 0


def _deterministic(text: str) -> list[str]:
    from fastddpm.tables.names import NAMES, canonical

    names = list(dict.fromkeys(canonical(part.strip()) for part in text.split(",")))
    for entry in NAMES:
        if entry.stochastic and entry.name in names:
            raise ValueError(f"--samplers: {entry.name} draws noise; its samples have no solution to compare with")
    return names
