"""Write the numbers of evaluations into a model card, between its markers, and the pictures beside it.

python -m tests.evaluation.model_card CARD EVAL [EVAL ...] --images FOLDER [--training RUN]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddpm.evaluation.measures import ACCURACY, DIVERSITY, FRECHET, NEAREST
from fastddpm.evaluation.report import PICTURE, PLOT, REPORT, bits_line, show, weakest
from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import read_object
from fastddpm.training.log import loss_plot, read_log

BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"

_CAPTIONS = {
    "samples": "Samples, in columns by class",
    "loss": "Training loss",
    "guidance": "Accuracy and diversity by guidance weight",
}

_HEAD = """| sampler | N | accuracy | Frechet distance | nearest image | diversity |
| --- | --- | --- | --- | --- | --- |"""

_LEGEND = """In brackets 95 % intervals. Accuracy: how often the classifier sees the digit that was asked for; of the
held-out images it recognises {held_out}. The rest are ratios. Frechet distance to held-out images: of the samples over
that of as many training images. Nearest image: median distance to the nearest training image, of samples over that of
held-out images. Diversity: mean distance between two images of a digit, of samples over that of training images.
Weights {weights}."""


def main(argv: Sequence[str] | None = None) -> None:
    """Update a card.

    Raises:
        ValueError: the card has no markers, or the evaluations are of different weights.
        FileNotFoundError: an evaluation, the card or the training's log is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.evaluation.model_card", description=__doc__)
    parser.add_argument("card", type=Path)
    parser.add_argument("evals", type=Path, nargs="+", help="folders of fastddpm eval; pictures are the first one's")
    parser.add_argument("--images", type=Path, required=True, help="folder for pictures")
    parser.add_argument(
        "--training", type=Path, help="folder of the training run, for its loss; without it that picture stays"
    )
    args = parser.parse_args(argv)
    reports = [read_object(folder / REPORT) for folder in args.evals]
    results = [result for report in reports for result in report["results"]]
    first = args.evals[0] / f"guidance-{results[0]['run']['guidance']:g}" / PICTURE
    pictures = {"samples": first.read_bytes()}
    if args.training is not None:
        pictures["loss"] = _loss_picture(args.training)
    for folder in args.evals:
        if (folder / PLOT).exists():
            pictures["guidance"] = (folder / PLOT).read_bytes()
    paths = {kind: args.images / f"{args.card.resolve().parent.name}-{kind}.png" for kind in _CAPTIONS}
    text = numbers(results)
    for report in reports:
        if "bits_per_dim" in report:
            text += f"\n\nBits per dimension, at most: {bits_line(report['bits_per_dim'])}."
    shown = {kind: path for kind, path in paths.items() if kind in pictures or path.exists()}
    links = {kind: os.path.relpath(path, args.card.parent) for kind, path in shown.items()}
    text += "\n\n" + "\n".join(f"![{_CAPTIONS[kind]}]({link})" for kind, link in links.items())
    card = replace_between(args.card.read_text(encoding="utf-8"), BEGIN, END, text, args.card)
    write_files({**{paths[kind]: data for kind, data in pictures.items()}, args.card: card.encode()})


def _loss_picture(run: Path) -> bytes:
    plot = loss_plot(list(read_log(run)))
    if plot is None:
        raise FileNotFoundError(f"{run}: no log to plot, or no matplotlib to plot it with")
    return plot


def numbers(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of evaluations as Markdown.

    Raises:
        ValueError: they are of different weights.
    """
    weights = {result["run"]["weights"] for result in results}
    if len(weights) != 1:
        raise ValueError(f"the evaluations are of {len(weights)} models with different weights")
    rows = "\n".join(_row(result) for result in results)
    held_out = show(results[0][ACCURACY]["real"], percent=True)
    legend = _LEGEND.format(held_out=held_out, weights=weights.pop()[:16])
    weak = weakest(results[0]["accuracy_by_class"])
    return f"{_HEAD}\n{rows}\n\n{legend}" + (f" Least often recognised, in the first line: {weak}." if weak else "")


def _row(result: Mapping[str, Any]) -> str:
    run = result["run"]
    guidance = "" if run["guidance"] == 1 else f", guidance {run['guidance']:g}"
    cells = [
        f"{run['sampler']}, {run['steps']} steps{guidance}",
        str(result["compared"]),
        show(result[ACCURACY]["samples"], percent=True),
        *(show(result[name]["ratio"]) for name in (FRECHET, NEAREST, DIVERSITY)),
    ]
    return f"| {' | '.join(cells)} |"


def replace_between(text: str, begin: str, end: str, content: str, name: object) -> str:
    """Replace what stands between two markers; the markers stay, on lines of their own.

    Args:
        name: what an error calls the text, such as its path.

    Raises:
        ValueError: the text does not hold each marker once, in order.
    """
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    if text.count(begin) != 1 or text.count(end) != 1 or end in before:
        raise ValueError(f"{name} must hold {begin} and, after it, {end}, once each: the numbers go between them")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    main()
