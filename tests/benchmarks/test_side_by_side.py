"""Choosing a part of the suite, and two runs side by side."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fastddpm.benchmarks.harness import suite
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.report import side_by_side

from fastddpm.cli import main
from fastddpm.diagnostics import environment

CASES = [Case("sampling", batch, (3, 32, 32), "cifar10", 20) for batch in (1, 4, 16)]


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return environment.facts()


def run(facts: dict[str, Any], batch: int, *providers: str, date: str = "2026-01-02T03:04:05", **changed: Any) -> Any:
    """What a run of one case found; its times are its batch."""
    case = CASES[(1, 4, 16).index(batch)]
    row = {
        "op": "sampling",
        "id": case.id,
        "case": dataclasses.asdict(case),
        "checked": True,
        "note": "",
        "noisy": False,
        "how": "wall time",
    }
    row |= {"p50_ms": float(batch), "first_call_s": 1.0, "peak_mem_mb": None, "check": {"error": 0.0}, "n": 7}
    return {
        "date": date,
        "seconds": 10.0,
        "device": "cpu",
        "smoke": False,
        "rounds": 7,
        "machine": copy.deepcopy(facts) | {"load_average": [0.1, 0.1, 0.1]},
        "load_average_after": [1.0, 1.0, 1.0],
        "bandwidth": {"copy_gb_per_s": 10.0, "copy_mb": 256.0, "gflop_per_s": {"float32": 100.0}},
        "rows": [{**row, "provider": provider} for provider in providers],
        **changed,
    }


@pytest.mark.parametrize(
    ("chosen", "batches"),
    [([], [1, 4, 16]), (["B1"], [1]), (["cifar10-B16"], [16]), (["B1", "S20-B4"], [1, 4]), (["digits"], [])],
)
def test_choose_takes_cases_by_the_parts_of_their_names(chosen: list[str], batches: list[int]) -> None:
    assert [case.batch for case in suite.choose(CASES, chosen)] == batches


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not usable as JSON"), ("{}", "no bandwidth, date"), ("[]", "must hold a JSON object")],
    ids=["json", "keys", "list"],
)
def test_bench_names_the_file_that_is_no_run(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main(["bench", "--compare", str(path), str(path)]) == 1
    error = capsys.readouterr().err
    assert f"fastddpm: error: {path}: " in error
    assert message in error


def test_bench_compares_no_rows_that_are_none(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(run(facts, 1, "diffusers") | {"rows": [{"op": "sampling"}]}))
    assert main(["bench", "--compare", str(path), str(path)]) == 1
    assert f"{path}: not a bench.json of fastddpm bench; its rows lack" in capsys.readouterr().err


def test_bench_compares_two_runs_row_by_row(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: 10 ms to 5 ms is twice as fast; 10 ms to 10.5 ms, each 10 % wide, is a tie."""
    a, b = run(facts, 4, "fast", "same", "gone"), run(facts, 4, "fast", "same", "new")
    for found, times in ((a, (10.0, 10.0, 1.0)), (b, (5.0, 10.5, 1.0))):
        for row, ms in zip(found["rows"], times, strict=True):
            row |= {"p20_ms": 0.95 * ms, "p50_ms": ms, "p80_ms": 1.05 * ms}
    b["machine"]["threads"] = {}
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, found in zip(paths, (a, b), strict=True):
        path.write_text(json.dumps(found))
    assert main(["bench", "--compare", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[2:] == [["fast", "10", "5", "2.00", "-", "-"], ["same", "10", "10.5", "0.95 tie", "-", "-"]]
    assert "**Different threads**" in text


def test_bench_compares_no_smoke_run_and_none_without_common_rows(facts: dict[str, Any]) -> None:
    one, four = run(facts, 1, "diffusers"), run(facts, 4, "diffusers")
    with pytest.raises(ValueError, match="a smoke run measures nothing"):
        side_by_side.render(one, one | {"smoke": True}, ("a", "b"))
    with pytest.raises(ValueError, match="a and b timed no provider on the same case"):
        side_by_side.render(one, four, ("a", "b"))
