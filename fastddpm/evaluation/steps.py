"""How many network calls a model needs: the error of a few, beside the result of many from the same x_T.

A deterministic sampler solves one differential equation, whose solution depends on x_T alone. So the distance between
what few and what many calls make of the same x_T is the solver's error, sample by sample, without the statistical noise
of a comparison of distributions. It is given as a share of the samples' own spread, their standard deviation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.files.figures import new_figure, to_png
from fastddpm.sampling.network import Model
from fastddpm.sampling.sample import plan_run

# The solver of order 2 whose error after this many calls is far below that of any number of calls that is tried.
CONVERGED, MANY = "dpm++2m", 200


def measure_steps(
    model: Model,
    *,
    samplers: Sequence[str],
    calls: Sequence[int],
    many: int = MANY,
    seeds: Sequence[int] = range(16),
    guidance: float = 1.0,
    within: float = 0.05,
    features: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] = lambda calls: None,
    **options: Any,
) -> dict[str, Any]:
    """Measure error and time against the number of calls.

    Args:
        model: the network.
        samplers: names of deterministic samplers.
        calls: the numbers of steps to try.
        many: steps of the result that the others are compared with.
        seeds: one per sample, at least two.
        guidance: weight of classifier-free guidance.
        within: the error that is small enough.
        features: of samples [N, C, H, W], float [N, D], whose distances are measured too.
        progress: called with the number of network calls made.
        **options: of `fastddpm.sample`: batch_size, device, dtype, ...

    Returns:
        "rows", one for each sampler and number of steps: sampler, calls (of the network), error, feature_error (with
        features), seconds (a sample); "many", such a row of the converged result; "enough", the row of the fewest calls
        within the error asked for by both measures, or None.
    """

    def draw(sampler: str, steps: int) -> tuple[Tensor, dict[str, Any]]:
        run = plan_run(model, seeds=seeds, steps=steps, sampler=sampler, guidance=guidance, **options)
        started = time.perf_counter()
        x = torch.cat([run.draw(batch, lambda _: progress(1)) for batch in run.batches]).cpu()
        seconds = (time.perf_counter() - started) / len(seeds)
        return x, {"sampler": sampler, "calls": len(run.sampler.table), "seconds": seconds}

    def errors(x: Tensor) -> dict[str, float]:
        found = {"error": relative_distance(x, converged)}
        if features is not None:
            found["feature_error"] = relative_distance(features(x), features(converged))
        return found

    converged, reference = draw(CONVERGED, many)
    rows = []
    for sampler in samplers:
        for steps in calls:
            x, row = draw(sampler, steps)
            rows.append({**row, **errors(x)})
    enough = [row for row in rows if max(row["error"], row.get("feature_error", 0.0)) <= within]
    fewest = min(enough, key=lambda row: (row["calls"], row["error"]), default=None)
    return {"many": reference, "within": within, "rows": rows, "enough": fewest}


def relative_distance(x: Tensor, converged: Tensor) -> float:
    """Root mean square of x - converged over the standard deviation of `converged` among its samples."""
    x, converged = x.double(), converged.double()
    spread = (converged - converged.mean(dim=0)).square().mean().sqrt()
    return float((x - converged).square().mean().sqrt() / spread)


def steps_text(report: Mapping[str, Any]) -> str:
    """Write a report as tables of at most 80 columns."""
    rows, many, enough = report["rows"], report["many"], report["enough"]
    titles = {"error": "error of the samples, % of their spread", "feature_error": "of a classifier's features, %"}
    lines = [f"beside {many['calls']} calls of {many['sampler']} from the same x_T ({many['seconds']:.3g} s a sample)"]
    for key, title in titles.items():
        if key in rows[0]:
            lines += ["", title, *_table(rows, key)]
    if enough is None:
        lines += ["", f"none is within {100 * report['within']:g} %; try more --calls"]
    else:
        lines += [
            "",
            f"within {100 * report['within']:g} % with the fewest calls: --sampler {enough['sampler']}, "
            f"{enough['calls']} calls,",
            f"{enough['seconds']:.3g} s a sample, {many['seconds'] / enough['seconds']:.3g} times sooner than "
            f"{many['calls']} calls",
        ]
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    calls = sorted({row["calls"] for row in rows})
    found = {(row["sampler"], row["calls"]): f"{100 * row[key]:.3g}" for row in rows}
    samplers = dict.fromkeys(row["sampler"] for row in rows)
    head = f"{'calls':<12}" + "".join(f"{n:>7}" for n in calls)
    return [head, *(f"{s:<12}" + "".join(f"{found.get((s, n), ''):>7}" for n in calls) for s in samplers)]


def steps_plot(report: Mapping[str, Any]) -> bytes:
    """Draw error against calls, a curve for each sampler, as a PNG.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(6.4, 4, dpi=120, layout="constrained")
    axes = figure.subplots()
    for sampler in dict.fromkeys(row["sampler"] for row in report["rows"]):
        rows = sorted((r for r in report["rows"] if r["sampler"] == sampler), key=lambda row: row["calls"])
        axes.plot([r["calls"] for r in rows], [100 * r["error"] for r in rows], marker="o", label=sampler)
    axes.axhline(100 * report["within"], color="grey", linestyle="--", linewidth=1)
    calls = sorted({row["calls"] for row in report["rows"]})
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel="error, % of the samples' spread")
    axes.set_xticks(calls, labels=[str(n) for n in calls])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    return to_png(figure)
