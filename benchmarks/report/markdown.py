"""The report: what `suite.run` found, as Markdown that reads at 80 columns."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastddpm.benchmarks.harness.case import NAMES, find
from fastddpm.benchmarks.harness.compare import NOISY
from fastddpm.benchmarks.peers import networks

from fastddpm.diagnostics import environment

WIDTH = 80
Row = Mapping[str, Any]
Results = Mapping[str, Any]


def render(results: Results) -> str:
    """The whole report."""
    parts = [heading(results), *warnings(results)]
    for name in NAMES:
        rows = [row for row in results["rows"] if row["op"] == name]
        if rows:
            parts.append(f"## {find(name).title}")
            parts += [case_section(case_rows) for case_rows in by_case(rows)]
    for name, section in (("step_counts", step_counts_section), ("cuda", cuda_section), ("offline", offline_section)):
        if results.get(name):
            parts.append(section(results[name]))
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(results: Results) -> str:
    """Date, machine, method."""
    device = "CPU, not comparable with GPU" if results["device"] == "cpu" else "CUDA"
    limits, facts = results["bandwidth"], results["machine"]
    load = facts["load_average"]
    rates = ", ".join(f"{rate:.0f} GFLOP/s {dtype}" for dtype, rate in limits["gflop_per_s"].items())
    lines = [
        f"{results['date'][:10]}, {device}. {environment.summary(facts)}.",
        f"Measured in this run: copying {limits['copy_gb_per_s']:.1f} GB/s (read plus write, "
        f"{limits['copy_mb']:.0f} MB tensors), multiplying matrices {rates}.",
        f"Load average {' '.join(map(str, load)) if load else 'unknown'} before, "
        f"{' '.join(map(str, results['load_average_after'] or ['unknown']))} after. "
        f"Allocator: {_environment(facts['environment']['allocator'])}. "
        f"Thread settings: {_environment(facts['environment']['threads'])}.",
        "Interleaved rounds; a time is their median, a ratio the median of the rounds' own ratios (20th-80th "
        "percentile in brackets), above 1 faster than the first row; or, in the column '2nd', than diffusers' best "
        "settings in the same type (loops, network) or torch.compile of plain PyTorch (the others). Every row passed "
        "its gate before it was timed; 'err' is what the gate found. '1st s' is the first call, with what it "
        "compiles; torch keeps compiled code on disk, so that a second run's is shorter. MB: the most that the "
        "process held, Python and its libraries not counted.",
    ]
    title = "# fastddpm bench" + (" (SMOKE RUN: no measurement)" if results["smoke"] else "")
    return "\n\n".join([title, *(textwrap.fill(line, WIDTH) for line in lines)])


def _environment(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items()) or "default"


def warnings(results: Results) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = []
    noisy = [row for row in results["rows"] if row.get("noisy")]
    timed = [row for row in results["rows"] if row["checked"]]
    if noisy:
        worst = max(row["spread"] for row in noisy)
        found.append(
            f"**Noisy machine**: in {len(noisy)} of {len(timed)} rows the middle rounds spread over more than "
            f"{100 * NOISY:.0f} % of the median (worst {100 * worst:.0f} %); they are marked ~. Close other programs "
            "and run again."
        )
    cores = results["machine"]["cpu"]["usable_cores"]
    load = results["machine"]["load_average"]
    if load and load[0] > 0.5 * cores:
        found.append(f"**Busy machine**: load average {load[0]} on {cores} cores when the run began.")
    return [textwrap.fill(text, WIDTH) for text in found]


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows by case, which follow each other."""
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["id"])]


def case_section(rows: Sequence[Row]) -> str:
    """One case: a table of the providers that were timed, and why the others were not."""
    case = rows[0]["case"]
    timed = [row for row in rows if row["checked"]]
    columns = _columns(timed, loop=bool(case["network"]))
    silent: dict[str, list[str]] = {}
    for row in rows:
        if row["note"]:
            silent.setdefault(row["note"], []).append(row["provider"])
    notes = [
        textwrap.fill(f"- {'; '.join(who)}: {note}", WIDTH, subsequent_indent="  ") for note, who in silent.items()
    ]
    parts = [
        f"### {_case_title(rows[0])}",
        _case_remark(case, timed),
        table(columns) if timed else "",
        "\n".join(notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _case_title(row: Row) -> str:
    case = row["case"]
    parts = [case["original"], case["network"], f"batch {case['batch']}", "x".join(map(str, case["shape"]))]
    if case["steps"] and row["op"] != "unet":
        parts.append(f"{case['steps']} {case['sampler'].upper()} steps")
    return ", ".join(part for part in parts if part)


def _case_remark(case: Row, timed: Sequence[Row]) -> str:
    parts = [networks.TITLES[case["network"]]] if case["network"] else []
    if timed:
        parts.append(f"rounds: {max(row['n'] for row in timed)}")
        parts += sorted({row["how"] for row in timed} - {"wall time"})
    return textwrap.fill("; ".join(parts), WIDTH)


Columns = Sequence[tuple[str, Sequence[str]]]


def _columns(rows: Sequence[Row], *, loop: bool) -> Columns:
    unit, scale = ("ms", 1.0) if loop else ("us", 1e3)
    columns = [
        ("provider", [row["provider"] for row in rows]),
        (unit, [number(scale * row["p50_ms"]) + ("~" if row["noisy"] else "") for row in rows]),
        ("ratio", [ratio(row.get("ratio")) for row in rows]),
        ("2nd", ["-" if row.get("ratio_second") is None else f"{row['ratio_second']['median']:.2f}" for row in rows]),
        ("1st s", [f"{row['first_call_s']:.1f}" for row in rows]),
    ]
    if loop:
        columns.append(("MB", [optional(row["peak_mem_mb"], "{:.0f}") for row in rows]))
        columns.append(("err", [f"{row['check']['error']:.0e}" for row in rows]))
    else:
        columns.append(("GB/s", [optional(row["gb_per_s"], "{:.1f}") for row in rows]))
        columns.append(("% copy", [optional(row.get("pct_peak"), "{:.0f}") for row in rows]))
    return columns


def ratio(value: Mapping[str, Any] | None) -> str:
    """A ratio with its range, and "tie" or "slower" where it is one: nothing is hidden in a digit."""
    if value is None:
        return "-"
    text = f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
    return text if value["verdict"] == "faster" or value["median"] == 1.0 else f"{text} {value['verdict']}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def optional(value: float | None, form: str) -> str:
    """A formatted number, "-" for None."""
    return "-" if value is None else form.format(value)


def table(columns: Columns) -> str:
    """A Markdown table, its cells padded; the first column to the left, the others to the right."""
    padded = []
    for k, (name, cells) in enumerate(columns):
        width, align = max(map(len, (name, *cells))), str.rjust if k else str.ljust
        rule = "-" * (width - 1) + (":" if k else "-")
        padded.append([align(name, width), rule, *(align(cell, width) for cell in cells)])
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*padded, strict=True))


def step_counts_section(rows: Sequence[Row]) -> str:
    """Operations of one step beside the network."""
    counted = [row for row in rows if "note" not in row]
    columns: Columns = [
        ("one step beside the network", [row["who"] for row in counted]),
        ("calls", [str(row["calls"]) for row in counted]),
        ("large", [str(row["large"]) for row in counted]),
        ("read", [optional(row["images_read"], "{:.1f}") for row in counted]),
        ("written", [optional(row["images_written"], "{:.1f}") for row in counted]),
        ("host reads", [str(row["host_reads"]) for row in counted]),
    ]
    remark = (
        "ATen calls, those on image-sized tensors, images read and written; counted by a TorchDispatchMode on the CPU, "
        "inside our operator too; what code of Inductor's reads and writes is not seen (-). On CUDA our step is one "
        "kernel and a counter's increment, in one graph replay, and for a network that is not our UNet t's lookup."
    )
    notes = [f"- {row['who']}: {row['note']}" for row in rows if "note" in row]
    return "\n\n".join(["## Work of a step", table(columns), textwrap.fill(remark, WIDTH), *notes])


def cuda_section(cuda: Row) -> str:
    """Launches and synchronisations per step on a GPU; or why there is none."""
    if "skipped" in cuda:
        return "## CUDA\n\n" + textwrap.fill(f"Skipped: {cuda['skipped']}", WIDTH)
    columns: Columns = [
        ("sampling loop", [row["who"] for row in cuda["rows"]]),
        ("launches/step", [f"{row['launches_per_step']:.1f}" for row in cuda["rows"]]),
        ("kernels/step", [f"{row['kernels_per_step']:.1f}" for row in cuda["rows"]]),
        ("host syncs/step", [f"{row['syncs_per_step']:.2f}" for row in cuda["rows"]]),
    ]
    waiting = [row["who"] for row in cuda["rows"] if row["syncs_per_step"] and row["who"].startswith("fastddpm")]
    remarks = [f"**The host waits for the GPU** in each step of {', '.join(waiting)}."] if waiting else []
    return "\n\n".join(["## CUDA: launches", table(columns), *remarks])


def offline_section(offline: Row) -> str:
    """Instructions and bytes per element, from compiled code."""
    parts = [f"## Compiled for {offline['arch']} without a GPU"]
    rows = offline["rows"]
    if rows:
        columns: Columns = [
            ("kernel", [f"{row['who']} {row['kernel']}: {row['variant']}" for row in rows]),
            ("instr", [optional(row["executed"], "{:.1f}") for row in rows]),
            ("B", [optional(row["bytes_per_element"], "{:.3g}") for row in rows]),
            ("regs", [str(row["registers"]) for row in rows]),
            ("smem", [str(row["shared"]) for row in rows]),
            ("bar", [str(row["barriers"]) for row in rows]),
        ]
        parts.append(table(columns))
        parts.append(
            textwrap.fill(
                "SASS instructions executed and bytes moved per element, registers per thread, shared memory and "
                "barriers per program. Counts, not times: where DRAM binds, kernels of equal bytes tie.",
                WIDTH,
            )
        )
    parts += [textwrap.fill(f"- {remark}", WIDTH, subsequent_indent="  ") for remark in offline["remarks"]]
    return "\n\n".join(parts)
