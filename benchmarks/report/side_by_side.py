"""Two runs side by side: what a change, or another machine, makes of each row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.benchmarks.report import markdown as report

from fastddpm.files.safejson import read_object

Results = Mapping[str, Any]
_NOTE = """A/B above 1: the second run is faster. The runs did not take turns, so a machine that slowed down in between
shows as a difference; "tie": the middle rounds of the two overlap. What must be known to a few per cent is measured in
one run, whose rounds are interleaved."""
# Rows of the full suite take about 1 kB each.
_MAX_BYTES = 64 << 20
_KEYS = frozenset(("date", "seconds", "device", "smoke", "machine", "load_average_after", "bandwidth", "rows"))
_ROW_KEYS = frozenset(("op", "id", "case", "provider", "checked", "note"))


def read(path: Path) -> dict[str, Any]:
    """Read the bench.json of a run.

    Raises:
        ValueError: it is no bench.json; the message begins with the path.
    """
    run = read_object(path, max_bytes=_MAX_BYTES)
    if missing := sorted(_KEYS - run.keys()):
        raise ValueError(f"{path}: not a bench.json of fastddpm bench; it has no {', '.join(missing)}")
    rows = run["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) and row.keys() >= _ROW_KEYS for row in rows):
        raise ValueError(f"{path}: not a bench.json of fastddpm bench; its rows lack some of {', '.join(_ROW_KEYS)}")
    return run


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
    if (what := _differing(a, b)) is not None:
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


def _differing(a: Results, b: Results) -> str | None:
    """Name what would make times of two runs incomparable; None if nothing does."""
    if a["device"] != b["device"]:
        return "devices"
    for name in ("cpu", "threads", "versions", "python", "environment", "cuda"):
        if _settings(a["machine"][name]) != _settings(b["machine"][name]):
            return name
    return None


def _settings(facts: Any) -> Any:
    """Leave out what makes no time differ: a GPU's clocks of the moment, and where compiled code is kept."""
    if not isinstance(facts, Mapping):
        return facts
    if "devices" in facts:
        return [device["name"] for device in facts["devices"]]
    return {name: _settings(fact) for name, fact in facts.items() if not name.endswith("_CACHE_DIR")}
