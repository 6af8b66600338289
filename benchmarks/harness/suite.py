"""Run benchmarks: build, gate, warm up, then interleaved rounds; one row for each provider and case."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from fastddpm.benchmarks.harness import bandwidth
from fastddpm.benchmarks.harness.case import NAMES, NOT_ASKED, Benchmark, Case, Check, Provider, find
from fastddpm.benchmarks.harness.compare import MIN_ROUNDS, NOISY, Quantiles, compare, ratio
from fastddpm.benchmarks.harness.process import ProcessRunner, WorkerError
from fastddpm.benchmarks.harness.runner import LocalRunner

from fastddpm.checks import one_of
from fastddpm.diagnostics import environment
from fastddpm.machine import hardware as machine

Progress = Callable[[str], None]
AnyRunner: TypeAlias = LocalRunner | ProcessRunner


class GateError(Exception):
    """A provider computed something else than it should; it is not timed."""


# Between two measurements: idle OpenMP threads spin for a few milliseconds before they sleep.
_PAUSE = 0.05


def run(
    names: Sequence[str] = NAMES,
    *,
    device: str = "cpu",
    rounds: int = MIN_ROUNDS,
    smoke: bool = False,
    chosen: Sequence[str] = (),
    providers: Sequence[str] = (),
    progress: Progress = lambda text: None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Run the suite.

    Args:
        names: benchmarks, see `case.NAMES`.
        device: "cpu" or "cuda".
        smoke: tiny sizes, one call per measurement, nothing compiled, all in this process: that everything works, not
            how fast.
        chosen: only cases whose id has all the parts of one of these, such as "cifar10-B16"; empty for all.
        providers: only providers whose name contains one of these, and the baselines; empty for all.
        progress: called with what is done next.
        save: called with the results so far after every case: the suite takes hours.

    Returns:
        "machine", "bandwidth", "rows" and how they were taken, as plain types.

    Raises:
        ValueError: no case has the chosen parts, or no provider one of the names.
    """
    offered = [(benchmark, benchmark.cases(device, smoke)) for benchmark in map(find, names)]
    todo = [(benchmark, case) for benchmark, cases in offered for case in choose(cases, chosen)]
    if chosen and not todo:
        known = " ".join(case.id for _, cases in offered for case in cases) or "none"
        raise ValueError(f"no case has the parts of {' or '.join(chosen)}; the cases are: {known}")
    known_providers = dict.fromkeys(provider.name for benchmark, _ in todo for provider in benchmark.providers)
    for part in providers:
        if not any(part in name for name in known_providers):
            one_of("provider", part, known_providers)
    started = datetime.datetime.now(datetime.UTC)
    facts = environment.facts()
    progress(f"measuring this machine: {environment.summary(facts)}")
    limits = bandwidth.measure(device, rounds, smoke=smoke)
    rows: list[dict[str, Any]] = []

    def results() -> dict[str, Any]:
        return {
            "date": started.isoformat(timespec="seconds"),
            "seconds": (datetime.datetime.now(datetime.UTC) - started).total_seconds(),
            "device": device,
            "smoke": smoke,
            "rounds": rounds,
            "machine": facts,
            "load_average_after": machine.load_average(),
            "bandwidth": limits,
            "rows": rows,
        }

    with torch.compiler.set_stance("force_eager" if smoke else "default"):
        for benchmark, case in todo:
            found = run_case(benchmark, case, rounds, smoke=smoke, providers=providers, progress=progress)
            for row in found:
                if row.get("gb_per_s") is not None:
                    row["pct_peak"] = 100 * row["gb_per_s"] / limits["copy_gb_per_s"]
            rows += found
            save(results())
    return results()


def choose(cases: Sequence[Case], chosen: Sequence[str]) -> list[Case]:
    """Return the cases whose id has all the parts of one of the given texts; all of them where there is none."""
    wanted = [set(text.split("-")) for text in chosen]
    return [case for case in cases if not wanted or any(parts <= set(case.id.split("-")) for parts in wanted)]


def run_case(
    benchmark: Benchmark,
    case: Case,
    rounds: int,
    *,
    smoke: bool,
    providers: Sequence[str] = (),
    progress: Progress = lambda text: None,
) -> list[dict[str, Any]]:
    """Run one case through its providers."""
    rows: dict[str, dict[str, Any]] = {}
    ready: list[AnyRunner] = []
    seconds: dict[str, list[float]] = {}
    try:
        for i, provider in enumerate(benchmark.providers):
            rows[provider.name] = row = _row(benchmark, case, provider)
            if i and providers and not any(part in provider.name for part in providers):
                row["note"] = provider.why_not(case) or "left out of this run"
                continue
            progress(f"{case.id}: {provider.name}")
            runner = _prepare(benchmark, case, provider, row, smoke=smoke)
            if runner is not None:
                ready.append(runner)
        seconds = compare({runner.name: runner.time for runner in ready}, rounds, pause=0.0 if smoke else _PAUSE)
        for runner in ready:
            _add_timing(rows[runner.name], seconds[runner.name], runner.peak_memory_mb())
    except WorkerError as error:
        # Rounds that one of them did not finish compare nothing.
        seconds = {}
        for runner in ready:
            rows[runner.name] |= {"checked": False, "note": f"failed: a round was not finished: {error}"}
    finally:
        for runner in ready:
            runner.close()
    _add_ratios(benchmark, rows, seconds)
    return [row for row in rows.values() if row["note"] != NOT_ASKED]


def _row(benchmark: Benchmark, case: Case, provider: Provider) -> dict[str, Any]:
    return {
        "op": benchmark.name,
        "case": dataclasses.asdict(case),
        "id": case.id,
        "provider": provider.name,
        "shape": list(case.full_shape),
        "dtype": provider.dtype,
        "bytes": benchmark.traffic(case, provider) if benchmark.traffic else None,
        "checked": False,
        "note": "",
    }


def _prepare(
    benchmark: Benchmark, case: Case, provider: Provider, row: dict[str, Any], *, smoke: bool
) -> AnyRunner | None:
    """Build and gate; a provider that cannot run, or computes something wrong, gets a remark instead of a time."""
    reason = provider.why_not(case)
    if reason is not None:
        row["note"] = reason
        return None
    runner: AnyRunner | None = None
    try:
        if benchmark.isolated and not smoke:
            runner = ProcessRunner(benchmark.name, provider, case)
        else:
            runner = LocalRunner(provider, case, smoke=smoke)
        check = judge(benchmark, runner)
        row["how"] = runner.warm()
    except BaseException as error:
        if runner is not None:
            runner.close()
        if not isinstance(error, Exception):
            raise
        known = isinstance(error, GateError | WorkerError)
        row["note"] = "failed: " + ("" if known else f"{type(error).__name__}: ") + " ".join(str(error).split())[:300]
        return None
    row |= {"checked": True, "check": dataclasses.asdict(check)}
    row |= {"setup_s": runner.setup_s, "first_call_s": runner.first_call_s}
    return runner


def judge(benchmark: Benchmark, runner: AnyRunner) -> Check:
    """Let the benchmark's gate judge what a provider computes.

    Raises:
        GateError: it is wrong.
    """
    check = benchmark.check(runner.case, runner.provider, runner.evaluate())
    if not check.ok:
        raise GateError(f"wrong result: {check.what}: {check.error:.3g}, allowed {check.tolerance:.3g}")
    return check


def _add_timing(row: dict[str, Any], seconds: list[float], peak_mem_mb: float | None) -> None:
    middle = Quantiles.of(seconds)
    row |= {f"{name}_ms": value * 1e3 for name, value in middle._asdict().items()}
    row |= {
        "min_ms": min(seconds) * 1e3,
        "n": len(seconds),
        "rounds_ms": [s * 1e3 for s in seconds],
        "spread": middle.spread,
        "noisy": middle.spread > NOISY,
        "compile_s": max(0.0, row["first_call_s"] - middle.p50),
        "peak_mem_mb": peak_mem_mb,
        "gb_per_s": None if row["bytes"] is None else row["bytes"] / middle.p50 / 1e9,
    }


def _add_ratios(benchmark: Benchmark, rows: dict[str, dict[str, Any]], seconds: dict[str, list[float]]) -> None:
    """Ratios to the benchmark's baseline, and to the second one of the row's dtype."""
    for name, own in seconds.items():
        row = rows[name]
        others = {"ratio": benchmark.providers[0].name, "ratio_second": benchmark.second.get(row["dtype"])}
        for key, other in others.items():
            if other in seconds:
                low, median, high = value = ratio(seconds[other], own)
                row[key] = {"to": other, "median": median, "low": low, "high": high, "verdict": value.verdict}
