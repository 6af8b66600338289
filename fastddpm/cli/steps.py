"""``fastddpm steps``: how many network calls a model needs."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import TYPE_CHECKING, Any

from fastddpm.cli.parser import COMPILE, add_machine, add_outdir, add_output, examples, positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DESCRIPTION = """Draw the same samples with few and with many network calls, and print how far apart they are: each
sampler's error against the number of calls, and the fewest calls within 5 % of the many-step result. An error is a root
mean square distance over the samples' standard deviation, of pixels and, for the shipped digits, of a classifier's
features. OUTDIR holds steps.json, and steps.png where matplotlib is installed."""

EXAMPLES = examples(
    "fastddpm steps --model digits", "fastddpm steps --model runs/mine --samplers ddim --calls 10,20,50"
)

FILES = REPORT, PLOT = "steps.json", "steps.png"


def add_parser(subparsers: Any) -> None:
    """Attach the subcommand."""
    parser = subparsers.add_parser(
        "steps",
        usage="%(prog)s [--model MODEL] [options]",
        help="how many network calls a model needs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    several = functools.partial(positive, low=2)
    parser.add_argument("--model", default="digits", help="name of a shipped model, or a directory (default: digits)")
    parser.add_argument("--samplers", default="ddim,dpm++2m,unipc3", help="deterministic ones (default: %(default)s)")
    parser.add_argument("--calls", type=_numbers, default="4,5,6,8,10,15,20,30,50", help="default: %(default)s")
    parser.add_argument("--many", type=positive, default=200, help="steps of the many-step result (default: 200)")
    parser.add_argument("--within", type=float, default=5.0, help="per cent of error that is enough (default: 5)")
    parser.add_argument("--samples", type=several, default=16, help="how many (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="the first of as many seeds (default: 0)")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of classifier-free guidance (default: 1)")
    add_outdir(parser, "steps")
    add_machine(parser, "dtype", "device", "backend", "compile")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the directory")
    add_output(parser, "report")


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    import torch
    from tqdm.auto import tqdm

    from fastddpm.checks import number
    from fastddpm.evaluation.steps import measure_steps, steps_plot, steps_text
    from fastddpm.files.atomic import write_files
    from fastddpm.files.run_folder import RunFolder
    from fastddpm.sampling.network import diffusion_of
    from fastddpm.unet.load import load

    samplers = _deterministic(args.samplers)
    within = number("--within", args.within, gt=0) / 100
    model = load(args.model)
    T = diffusion_of(model).num_timesteps
    folder = RunFolder(args.outdir, FILES)
    hidden = args.quiet or not sys.stderr.isatty()
    with folder.locked(), tqdm(unit="call", desc="drawing", file=sys.stderr, disable=hidden) as bar:
        folder.refuse_unless_free(resume=False, overwrite=args.overwrite)
        report = measure_steps(
            model,
            samplers=samplers,
            calls=[n for n in args.calls if n <= T],
            many=min(args.many, T),
            seeds=range(args.seed, args.seed + args.samples),
            guidance=args.guidance,
            within=within,
            features=_features(args.model),
            progress=bar.update,
            device=args.device,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            backend=args.backend,
            compile=COMPILE[args.compile],
        )
        report = {"model": args.model, "samples": args.samples, "guidance": args.guidance, **report}
        files = {folder.path / REPORT: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
        try:
            files[folder.path / PLOT] = steps_plot(report)
        except ImportError:
            (folder.path / PLOT).unlink(missing_ok=True)
        write_files(files)
    if args.json:
        print(json.dumps(report))
    elif not args.quiet:
        print(f"{args.model}: {args.samples} samples, guidance {args.guidance:g},\n{steps_text(report)}")
    return 0


def _features(model: str) -> Callable[[Tensor], Tensor] | None:
    import torch

    from fastddpm.evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier

    return torch.no_grad()(load_classifier(SHIPPED_CLASSIFIER).features) if model == "digits" else None


def _deterministic(text: str) -> list[str]:
    from fastddpm.tables.names import NAMES, canonical

    names = list(dict.fromkeys(canonical(part.strip()) for part in text.split(",")))
    for entry in NAMES:
        if entry.stochastic and entry.name in names:
            raise ValueError(f"--samplers: {entry.name} draws noise; its samples have no solution to compare with")
    return names


def _numbers(text: str) -> list[int]:
    return sorted({positive(part.strip()) for part in text.split(",")})
