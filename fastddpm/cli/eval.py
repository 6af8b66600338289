"""``fastddpm eval``: how good a model's samples are, in numbers that anyone can print again."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastddpm.checks import number
from fastddpm.cli import sampling_options
from fastddpm.cli.parser import add_shared, announce, examples, positive, print_output

if TYPE_CHECKING:
    from fastddpm.data.datasets import Dataset
    from fastddpm.evaluation.classifier import Classifier
    from fastddpm.evaluation.real_images import Reference
    from fastddpm.machine.ranks import Ranks
    from fastddpm.sampling.sample import Run
    from fastddpm.unet.unet import UNet

USAGE = "%(prog)s [--model MODEL] [--data DATA] [options]"
DESCRIPTION = """Draw samples and measure them beside real images: how often a small classifier sees the digit that was
asked for, the Frechet distance of its features, how near samples come to training images, and how much they differ.
For images of your own (--data) also FID, where torch-fidelity and its weights are at hand."""

EPILOG = """Samples are written batch by batch; --resume completes a run that was interrupted, to the same numbers (but
images a second, which are those of the batches drawn last). OUTDIR holds eval.json and pictures. The processes
of torchrun share the work, to the same numbers. Exit status: 0, 1 (error), 2 (usage), 130 or 143 (interrupted; finished
batches are kept).

""" + examples(
    "fastddpm eval --samples 1000 --sampler ddim --steps 50",
    "fastddpm eval --guidance 1,1.5,2 --outdir guidance",
    "fastddpm eval --model runs/mine --data pictures/ --download",
)

# Ten of each digit.
PICTURED, COLUMNS = 100, 10


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--samples", type=functools.partial(positive, low=2), default=1000, help="how many")
    add_shared(parser, "seed")
    guidance = "weight of classifier-free guidance, or several to compare and plot"
    add("--guidance", type=_weights, default="1", metavar="W[,W...]", help=guidance)
    add("--data", default="mnist", help="mnist (default), digits8x8, or your images: a folder, or a .npy/.npz file")
    add("--value-range", metavar="LO,HI", help="values of black and white, of data that do not say it")
    add("--background", metavar="COLOUR", help="behind transparent pixels of --data")
    add("--channels", choices=("first", "last"), help="of an array whose shape does not say it")
    add("--classifier", type=Path, help="one trained on --data (default: the shipped one, of mnist)")
    add("--bits-per-dim", action="store_true", help="also bound the likelihood of real images")
    add("--download", action="store_true", help="fetch FID's network if it is missing (96 MB)")
    sampling_options.add_options(parser, outdir="eval")


def run(args: argparse.Namespace) -> int:
    """Evaluate a model."""
    from fastddpm.data.values import parse_range
    from fastddpm.evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier
    from fastddpm.evaluation.measures import real_bits
    from fastddpm.evaluation.real_images import load_reference
    from fastddpm.evaluation.report import PLOT, REPORT, guidance_plot, text_report
    from fastddpm.files.atomic import write_files
    from fastddpm.files.run_folder import RunFolder
    from fastddpm.machine.ranks import join_ranks
    from fastddpm.sampling.network import shape_of
    from fastddpm.unet.load import load

    ranks = join_ranks(vars(args))
    model = load(args.model)
    reading = {"value_range": parse_range(args.value_range), "background": args.background, "channels": args.channels}
    announce(f"reading {args.data}", quiet=args.quiet or ranks.rank > 0)
    reference = load_reference(args.data, shape_of(model), **reading)
    classifier = None
    if args.classifier is not None or args.data == "mnist":
        if reference.held_out is None:
            raise ValueError(f"--classifier: of {args.data} nothing is held out, so nothing says how good it is")
        classifier = load_classifier(args.classifier or SHIPPED_CLASSIFIER, len(reference.train.classes))
    planned = sampling_options.plan(args, model, range(args.seed, args.seed + args.samples))
    with RunFolder(args.outdir, ()).locked() if ranks.rank == 0 else contextlib.nullcontext(), ranks.connected():
        results = []
        for weight in args.guidance:
            run = dataclasses.replace(planned, conditions={**planned.conditions, "guidance": weight})
            results.append(_result(args, model, run, reference, classifier, ranks))
        if ranks.rank:
            return 0
        report = {"model": args.model, "data": args.data, "samples": args.samples, "results": results}
        if args.bits_per_dim:
            bits = real_bits(model, reference, args.samples, planned.sampler.device)
            report["bits_per_dim"] = {name: dataclasses.asdict(estimate) for name, estimate in bits.items()}
        files = {args.outdir / REPORT: (json.dumps(report, indent=2, allow_nan=False) + "\n").encode()}
        if len(results) > 1:
            files[args.outdir / PLOT] = guidance_plot(results)
        write_files(files)
    print_output(args, report, text_report(report))
    return 0


def _result(
    args: argparse.Namespace, model: UNet, plan: Run, reference: Reference, classifier: Classifier | None, ranks: Ranks
) -> dict[str, Any]:
    """Draw the samples of one guidance weight, and measure them; rank 0 writes what is found."""
    from fastddpm.evaluation.fid import compute_fid, fid_obstacle
    from fastddpm.evaluation.measures import measure
    from fastddpm.evaluation.report import PICTURE, SPEED
    from fastddpm.files.images import save_grid
    from fastddpm.sampling.outputs import Outputs
    from fastddpm.sampling.to_files import begun, draw, images_per_second

    directory = args.outdir / f"guidance-{plan.guidance:g}"
    outputs = Outputs(directory, "npz", plan.seeds, plan.labels, plan.batches)
    settings = {"sampler": args.sampler, "classes": None, "resume": args.resume, "overwrite": args.overwrite}
    with begun(model, plan, outputs, ranks, **settings) as (config, missing):
        rate = images_per_second(draw(plan, outputs, missing, ranks, quiet=args.quiet))
        # Of all ranks together, in millionths.
        rate = ranks.add(f"{directory}: images a second", round((rate or 0) * 1e6)) / 1e6
        ranks.wait_for_all()
        if ranks.rank == 0:
            outputs.finish(grid=False)
        ranks.wait_for_all()
    samples = _samples(outputs.samples_path, plan.labels, model, reference)
    announce("measuring", quiet=args.quiet or ranks.rank > 0)
    measures = measure(samples, reference, classifier, ranks)
    if ranks.rank:
        return {}
    save_grid(samples.images[:PICTURED], directory / PICTURE, columns=COLUMNS, scale=1)
    if reference.held_out is None:
        if obstacle := fid_obstacle(download=args.download):
            measures.notes.append(obstacle)
        else:
            measures.fid = compute_fid(samples, reference.train)
    return {"run": config, "images_per_second": _speed(directory / SPEED, rate), **measures.to_json()}


def _samples(path: Path, labels: list[int] | None, model: UNet, reference: Reference) -> Dataset:
    """Return the samples as the 8-bit images that a viewer shows, with the reference's classes where it has as many."""
    import torch

    from fastddpm.data.datasets import Dataset
    from fastddpm.files.images import to_uint8
    from fastddpm.sampling.network import num_classes_of
    from fastddpm.sampling.outputs import read_x

    images, classes = to_uint8(torch.from_numpy(read_x(path))), reference.train.classes
    if labels is None or num_classes_of(model) != len(classes):
        return Dataset("samples", images)
    return Dataset("samples", images, torch.tensor(labels), classes)


def _speed(path: Path, rate: float) -> float | None:
    """Return images a second; if none was drawn, those of the last run."""
    from fastddpm.files.atomic import write_files
    from fastddpm.files.safejson import read_object

    if rate:
        write_files({path: json.dumps({"images_per_second": rate}).encode()})
    return read_object(path).get("images_per_second") if path.exists() else None


def _weights(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(number("weight", float(part)) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no weight; write 2, or 1,1.5,2") from None
