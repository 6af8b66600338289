"""The report's pictures: throughput against batch size, time against steps, the roofline. Needs matplotlib."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fastddpm.benchmarks.counts.step_counts import OpCounter
from fastddpm.benchmarks.peers import networks
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.files.figures import new_figure, to_png

Results = Mapping[str, Any]
_COLOURS = {
    "diffusers": "#999999",
    "diffusers, tuned": "#666666",
    "diffusers, tuned, bf16": "#333333",
    "diffusers, reduce-overhead, bf16": "#000000",
    "PyTorch": "#c9b37c",
    "PyTorch, compiled": "#a88b3d",
    "lucidrains": "#b58fc2",
    "OpenVINO": "#7fb0d8",
    "OpenVINO, bf16": "#3f7fb0",
    "fastddpm": "#e4866b",
    "fastddpm, bf16": "#c8442a",
}


def draw(results: Results) -> dict[str, bytes]:
    """Draw what the results hold, PNGs by file name; pictures without data are left out."""
    drawn = {}
    for name, plot in (("throughput", throughput), ("steps", steps), ("roofline", roofline)):
        figure = new_figure(8, 5, dpi=120, layout="constrained")
        axes = figure.subplots()
        if plot(axes, results):
            axes.grid(alpha=0.3)
            figure.legend(fontsize=8, loc="outside right upper")
            figure.supxlabel(_footnote(results), x=0.995, ha="right", fontsize=6, color="#666666")
            drawn[f"{name}.png"] = to_png(figure)
    return drawn


def _footnote(results: Results) -> str:
    kind = "CPU, not comparable with GPU" if results["device"] == "cpu" else "CUDA"
    text = f"{results['date'][:10]}, {kind}, {results['machine']['cpu']['model']}"
    return text + (" SMOKE RUN: no measurement" if results["smoke"] else "")


def throughput(axes: Any, results: Results) -> bool:
    """Images per second of whole loops against batch size."""
    rows = [row for row in _loops(results) if row["case"]["network"] != "digits" and not row["case"]["sweep"]]
    for name, points in _series(rows, lambda row: (row["case"]["batch"], 1e3 * row["case"]["batch"] / row["p50_ms"])):
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=_COLOURS.get(name))
    batches = sorted({row["case"]["batch"] for row in rows})
    axes.set(xlabel="batch size", ylabel="images per second", xscale="log", yscale="log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(f"Sampling, {rows[0]['case']['steps']} steps, {rows[0]['case']['network']}" if rows else "")
    return bool(rows)


def steps(axes: Any, results: Results) -> bool:
    """Seconds of a whole loop against its number of steps."""
    series = {row["case"]["network"] for row in _loops(results) if row["case"]["sweep"]}
    rows = [row for row in _loops(results) if row["case"]["network"] in series]
    swept = {row["provider"] for row in rows if row["case"]["sweep"]}
    rows = [row for row in rows if row["provider"] in swept]
    for name, points in _series(rows, lambda row: (row["case"]["steps"], row["p50_ms"] / 1e3)):
        axes.plot(*zip(*points, strict=True), marker="o", label=name, color=_COLOURS.get(name))
    axes.set(xlabel="steps", ylabel="seconds per batch")
    axes.set_title(f"Sampling, batch {rows[0]['case']['batch']}, {rows[0]['case']['network']}" if rows else "")
    return bool(rows)


def roofline(axes: Any, results: Results) -> bool:
    """The network's rate against its intensity, under this machine's measured roofs."""
    rows = [row for row in results["rows"] if row["op"] == "unet" and row["checked"]]
    if not rows:
        return False
    bandwidth = results["bandwidth"]["copy_gb_per_s"]
    series = _series(rows, _point)
    lowest, highest = 0.5, 4 * max(intensity for _, points in series for intensity, _, _ in points)
    for style, (dtype, peak) in zip(("--", ":"), results["bandwidth"]["gflop_per_s"].items(), strict=False):
        ridge = max(peak / bandwidth, lowest)
        axes.plot(
            [lowest, ridge, max(highest, 2 * ridge)],
            [lowest * bandwidth, peak, peak],
            style,
            color="black",
            label=f"{dtype}: {peak:.0f} GFLOP/s, {bandwidth:.0f} GB/s",
        )
    for name, points in series:
        intensities, rates, areas = zip(*points, strict=True)
        axes.scatter(intensities, rates, s=areas, label=name, color=_COLOURS.get(name), alpha=0.7)
    axes.set(xlabel="FLOP per byte that must move", ylabel="GFLOP/s", xscale="log", yscale="log")
    axes.set_title("The network under the roofline (area: batch size)")
    return True


def _point(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Place a row of the network under the roofline: FLOP per byte, GFLOP/s, and the area of its mark."""
    flops, size = _network_cost(row["case"]["network"], row["case"]["batch"])
    size *= 0.5 if row["dtype"] in ("bfloat16", "float16") else 1.0
    return flops / size, flops / row["p50_ms"] / 1e6, 20 + 30 * row["case"]["batch"] ** 0.5


# Operations whose operands must travel however well the rest is fused: convolutions, matrix products, attention.
_HEAVY = ("convolution", "mm", "addmm", "bmm", "baddbmm", "scaled_dot_product")


class _HeavyTraffic(OpCounter):
    """Counts the operands of heavy operations only; elementwise work is taken as fused, and free."""

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if name.lstrip("_").startswith(_HEAVY):
            super()._count(name, func, args, kwargs, result)


@functools.lru_cache(maxsize=16)
def _network_cost(name: str, batch: int) -> tuple[float, float]:
    """FLOPs of one call, and float32 bytes that its convolutions, matrix products and attention must move."""
    model = networks.build(name)
    x = torch.zeros(batch, *networks.shape(name))
    t = torch.zeros(batch, dtype=torch.int64)
    labels = networks.labels(name, batch)
    counter, flops = _HeavyTraffic(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, flops:
        model(x, t, class_labels=labels)
    return float(flops.get_total_flops()), float(counter.counts.bytes_read + counter.counts.bytes_written)


def _loops(results: Results) -> list[Mapping[str, Any]]:
    rows = results["rows"]
    return [r for r in rows if r["op"] == "sampling" and r["checked"] and r["case"]["sampler"] == "ddpm"]


def _series(rows: Iterable[Mapping[str, Any]], xy: Any) -> list[tuple[str, list[tuple[float, ...]]]]:
    lines: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        lines.setdefault(row["provider"], []).append(xy(row))
    return [(name, sorted(points)) for name, points in lines.items()]
