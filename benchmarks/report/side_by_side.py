"""Two runs side by side: what a change, or another machine, makes of each row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from fastddpm.benchmarks.report import markdown as report
from fastddpm.benchmarks.report.merge import differing

Results = Mapping[str, Any]
_NOTE = """A/B above 1: the second run is faster. The runs did not take turns, so a machine that slowed down in between
shows as a difference; "tie": the middle rounds of the two overlap. What must be known to a few per cent is measured in
one run, whose rounds are interleaved."""


def render(a: Results, b: Results, names: tuple[str, str]) -> str:
    """Write down the rows that both runs timed, as Markdown.

    Raises:
        ValueError: one is a smoke run, or no row is in both.
    """
    if a["smoke"] or b["smoke"]:
        raise ValueError("a smoke run measures nothing, so there is nothing to compare")
    timed = [{(row["id"], row["provider"]): row for row in run["rows"] if row["checked"]} for run in (a, b)]
    both = [row for key, row in timed[0].items() if key in timed[1]]
    if not both:
        raise ValueError(f"{names[0]} and {names[1]} timed no provider on the same case")
    parts = [f"# {names[0]} (A) and {names[1]} (B)", textwrap.fill(" ".join(_NOTE.split()), report.WIDTH)]
    if (what := differing(a, b)) is not None:
        parts.append(textwrap.fill(f"**Different {what}**: not only the code is compared.", report.WIDTH))
    for rows in report.by_case(both):
        pairs = [(row, timed[1][row["id"], row["provider"]]) for row in rows]
        columns = [
            ("provider", [row["provider"] for row in rows]),
            ("A ms", [report.number(row["p50_ms"]) for row, _ in pairs]),
            ("B ms", [report.number(row["p50_ms"]) for _, row in pairs]),
            ("A/B", [_ratio(*pair) for pair in pairs]),
            ("A MB", [report.optional(row["peak_mem_mb"], "{:.0f}") for row, _ in pairs]),
            ("B MB", [report.optional(row["peak_mem_mb"], "{:.0f}") for _, row in pairs]),
        ]
        parts += [f"## {rows[0]['id']}", report.table(columns)]
    return "\n\n".join(parts) + "\n"


def _ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    overlap = a["p20_ms"] <= b["p80_ms"] and b["p20_ms"] <= a["p80_ms"]
    return f"{a['p50_ms'] / b['p50_ms']:.2f}{' tie' if overlap else ''}"
