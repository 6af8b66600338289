"""The numbers in README: written by the report alone, between two markers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastddpm.benchmarks.harness.case import find
from fastddpm.benchmarks.report import markdown as report

from fastddpm.diagnostics import environment
from fastddpm.files.atomic import write_files
from fastddpm.files.markers import replace_between

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_WARNING = "<!-- Written by `fastddpm bench --readme {}`; changes made by hand are lost. -->"
# Those whose baseline is diffusers.
SUBJECTS = ("sampling", "training_step")
Results = Mapping[str, Any]


def update(path: Path, results: Results) -> None:
    """Replace what lies between the markers of a file.

    Raises:
        ValueError: the run was a smoke run, or the file does not hold each marker once, in order.
    """
    check(path, smoke=results["smoke"])
    content = f"{_WARNING.format(path.as_posix())}\n\n{render(results)}\n"
    write_files({path: replace_between(path.read_text(encoding="utf-8"), BEGIN, END, content, path).encode()})


def check(path: Path, *, smoke: bool) -> None:
    """Refuse what `update` would, before anything is measured.

    Raises:
        ValueError: as `update` does.
    """
    if smoke:
        raise ValueError("a smoke run measures nothing; run fastddpm bench without --smoke to write a README's numbers")
    replace_between(path.read_text(encoding="utf-8"), BEGIN, END, "", path)


def render(results: Results) -> str:
    """Loops and training steps provider by provider, losses and ties among them, and what it was measured on."""
    kind = "on a CPU (not comparable with a GPU)" if results["device"] == "cpu" else "on CUDA"
    facts = results["machine"]
    origin = (
        f"Measured {results['date'][:10]} {kind}: {environment.summary(facts)}. Interleaved rounds; milliseconds "
        "(median), and how many times faster than diffusers as people run it (median of the rounds' ratios, 20th-80th "
        "percentile) and, '2nd', than diffusers' best settings. '1st s': the first call, with what it compiles and "
        "torch has not kept from an earlier run. ~: the rounds spread over more than 10 %."
    )
    parts = [textwrap.fill(origin, report.WIDTH), *report.warnings(results)]
    for name in SUBJECTS:
        rows = [row for row in results["rows"] if row["op"] == name]
        heading = f"**{find(name).title}: "
        parts += [
            report.case_section(case).replace("### ", heading, 1).replace("\n", "**\n", 1)
            for case in report.by_case(rows)
        ]
    return "\n\n".join(parts)
