"""The report of an evaluation: text that fits 80 columns, and the plot of several guidance weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from fastddpm.evaluation.measures import ACCURACY, DIVERSITY, FRECHET, NEAR, NEAREST
from fastddpm.files.figures import INK, MUTED, new_figure, to_png

# The files of an evaluation: the report, and in the folder of each guidance weight a picture and the speed.
REPORT, PLOT, PICTURE, SPEED = "eval.json", "guidance.png", "samples.png", "speed.json"

TITLES = {
    ACCURACY: "accuracy",
    FRECHET: "Frechet distance",
    NEAREST: "nearest training image",
    DIVERSITY: "diversity in a class",
}
_WEAK_SHOWN = 3


def text_report(report: Mapping[str, Any]) -> str:
    """Write the JSON report of `fastddpm eval` as text."""
    sections = [_section(report, result) for result in report["results"]]
    if "bits_per_dim" in report:
        sections.append(fill(f"Bits per dimension, at most: {bits_line(report['bits_per_dim'])}.", 80))
    return "\n\n".join(sections)


def bits_line(bits: Mapping[str, Mapping[str, float]]) -> str:
    """Write the bounds of unseen and of training images."""
    names = {"held_out": "held-out images", "train": "training images"}
    return ", ".join(f"{names[name]} {show(estimate)}" for name, estimate in bits.items())


def _section(report: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    run = result["run"]
    head = [
        f"{report['model']}: {report['samples']} samples beside {report['data']}",
        f"{run['sampler']}, {run['steps']} steps, guidance {run['guidance']:g}, {run['dtype']}, {run['device']}, "
        f"seeds {run['seeds']}",
        "",
        f"{'':23}{'samples':21}{'real images':20}{'ratio'}",
    ]
    for name, title in TITLES.items():
        if name in result:
            row = result[name]
            cells = [show(row[key], percent=name == ACCURACY) for key in ("samples", "real", "ratio")]
            head.append(f"{title:23}{cells[0]:21}{cells[1]:20}{cells[2]}".rstrip())
    near = f"{100 * result['near']:.1f} % of the samples"
    remarks = [f"{near} are nearer to a training image than {100 * (1 - NEAR):.0f} % of unseen images are."]
    if weak := weakest(result["accuracy_by_class"]):
        remarks.append(f"Least often recognised: {weak}.")
    if result["fid"] is not None:
        remarks.append(f"FID {result['fid']:.2f} (Inception v3).")
    if result["images_per_second"] is not None:
        remarks.append(f"{result['images_per_second']:.3g} images a second.")
    remarks += [f"Not measured: {note}." for note in result["notes"]]
    remarks.append(f"N = {result['compared']} of each kind; in brackets 95 % intervals.")
    return "\n".join([*head, "", *(fill(remark, 80, break_long_words=False) for remark in remarks)])


def weakest(by_class: Mapping[str, float]) -> str:
    """Name the classes that are recognised least often, those that are always recognised left out."""
    worst = sorted((share, name) for name, share in by_class.items() if share < 1)[:_WEAK_SHOWN]
    return ", ".join(f"{name} ({100 * share:.0f} %)" for share, name in worst)


def show(estimate: Mapping[str, float] | None, *, percent: bool = False) -> str:
    """Write an estimate with its interval: "97.1 % (95.9-98.0)", "3.21 (2.90-3.55)", "321 (290-355)"; "" for None."""
    if estimate is None:
        return ""
    value, low, high = (estimate[key] * (100 if percent else 1) for key in ("value", "low", "high"))
    # Three digits, and never an exponent.
    digits = 1 if percent else max(0, 2 - max(0, math.floor(math.log10(max(value, 1)))))
    return f"{value:.{digits}f}{' %' if percent else ''} ({low:.{digits}f}-{high:.{digits}f})"


def guidance_plot(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the results of several weights side by side, each curve with the level of real images, as a PNG."""
    figure = new_figure(8, 3.2, layout="constrained")
    names = [name for name in (ACCURACY, DIVERSITY) if all(name in result for result in results)]
    results = sorted(results, key=lambda result: result["run"]["guidance"])
    weights = [result["run"]["guidance"] for result in results]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        samples, real = [result[name]["samples"] for result in results], results[0][name]
        values = [estimate["value"] for estimate in samples]
        errors = [[e["value"] - e["low"] for e in samples], [e["high"] - e["value"] for e in samples]]
        axes.errorbar(weights, values, yerr=errors, color=INK, marker="o", capsize=3, label="samples")
        axes.axhline(real["real"]["value"], color=MUTED, linestyle="--", label=f"{real['against']} images")
        axes.set(xlabel="guidance weight", title=name)
        axes.legend(frameon=False)
    return to_png(figure)
