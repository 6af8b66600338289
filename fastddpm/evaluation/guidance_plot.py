"""Accuracy and diversity against the guidance weight, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastddpm.evaluation.measures import ACCURACY, DIVERSITY
from fastddpm.pictures.strip import INK, MUTED, new_figure


def guidance_plot(results: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the results of several weights side by side, each curve with the level of real images, as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(8, 3.2)
    figure.set_layout_engine("constrained")
    names = [name for name in (ACCURACY, DIVERSITY) if all(name in result for result in results)]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _curve(axes, name, sorted(results, key=lambda result: result["run"]["guidance"]))
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _curve(axes: Any, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    weights = [result["run"]["guidance"] for result in results]
    samples = [result[name]["samples"] for result in results]
    values = [estimate["value"] for estimate in samples]
    errors = [[e["value"] - e["low"] for e in samples], [e["high"] - e["value"] for e in samples]]
    real = results[0][name]
    axes.errorbar(weights, values, yerr=errors, color=INK, marker="o", capsize=3, label="samples")
    axes.axhline(real["real"]["value"], color=MUTED, linestyle="--", label=f"{real['against']} images")
    axes.set(xlabel="guidance weight", title=name)
    axes.legend(frameon=False)
