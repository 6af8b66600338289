"""One report from several runs: the suite takes hours, and a quiet machine may be had for minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastddpm.benchmarks.report.markdown import by_case

from fastddpm.files.safejson import read_object

Results = Mapping[str, Any]

# What is counted rather than timed, and so may come from any of the runs.
_COUNTED = ("step_counts", "cuda")


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


def merge(runs: Sequence[Results]) -> dict[str, Any]:
    """Join runs of one machine. All rows of a case are from one run, the last that has it: others do not compare.

    Args:
        runs: what `suite.run` returned, at least one.

    Returns:
        The same kind of thing; its load is that of the busiest run, its bandwidth that of the first.

    Raises:
        ValueError: the runs are of different machines, devices, threads or versions, or one of them is a smoke run.
    """
    if len(runs) == 1:
        return dict(runs[0])
    # The load of a run that only counted is no measure of the others.
    timed = [run for run in runs if run["rows"]] or list(runs)
    first = timed[0]
    for run in timed:
        if run["smoke"]:
            raise ValueError("a smoke run measures nothing; leave it out of the merge")
        if (differs := differing(first, run)) is not None:
            raise ValueError(f"cannot merge runs of different {differs}; run them again on one machine, set up alike")
    cases = {case[0]["id"]: case for run in timed for case in by_case(run["rows"])}
    busiest = max(timed, key=lambda run: run["machine"]["load_average"] or [0.0])
    return {
        **first,
        **{key: run[key] for run in runs for key in _COUNTED if key in run},
        "date": min(run["date"] for run in timed),
        "seconds": sum(run["seconds"] for run in runs),
        "machine": busiest["machine"],
        "load_average_after": max(run["load_average_after"] or [0.0] for run in timed),
        "rows": [row for case in cases.values() for row in case],
    }


def differing(a: Results, b: Results) -> str | None:
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
