"""Choosing a part of the suite, and one report of several runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from fastddpm.benchmarks.harness import suite
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.report import markdown as report
from fastddpm.benchmarks.report import side_by_side
from fastddpm.benchmarks.report.merge import merge

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
        "case": case.to_dict(),
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


def test_merge_keeps_the_rows_of_every_run(facts: dict[str, Any]) -> None:
    first, second = run(facts, 1, "diffusers", "fastddpm"), run(facts, 4, "diffusers", date="2026-01-01T00:00:00")
    second["load_average_after"] = [9.0, 1.0, 1.0]
    merged = merge([first, second])
    assert merged["rows"] == first["rows"] + second["rows"]
    assert merged["date"] == "2026-01-01T00:00:00"
    assert merged["seconds"] == 20.0
    assert merged["load_average_after"] == [9.0, 1.0, 1.0]


def test_merge_takes_the_rows_of_a_case_from_one_run(facts: dict[str, Any]) -> None:
    first, second = run(facts, 1, "diffusers", "fastddpm"), run(facts, 1, "diffusers", "OpenVINO")
    other = run(facts, 4, "diffusers")
    assert merge([first, other, second])["rows"] == second["rows"] + other["rows"]


def test_merge_takes_counts_from_a_run_that_timed_nothing(facts: dict[str, Any]) -> None:
    counted = run(facts, 1, rows=[], step_counts=[1], date="2025-01-01T00:00:00")
    counted["machine"]["threads"] = {"intra_op": 99, "inter_op": 1}
    merged = merge([counted, run(facts, 4, "diffusers")])
    assert merged["step_counts"] == [1]
    assert merged["machine"]["threads"] == facts["threads"]
    assert merged["date"].startswith("2026")


def test_merge_does_not_care_where_compiled_code_is_kept(facts: dict[str, Any]) -> None:
    other = run(facts, 4, "diffusers")
    other["machine"]["environment"]["compilers"]["TORCHINDUCTOR_CACHE_DIR"] = "/elsewhere"
    assert len(merge([run(facts, 1, "diffusers"), other])["rows"]) == 2


@pytest.mark.parametrize("name", ["cpu", "threads", "versions", "environment"])
def test_merge_refuses_another_machine(name: str, facts: dict[str, Any]) -> None:
    other = run(facts, 4, "diffusers")
    other["machine"][name] = {"changed": True}
    with pytest.raises(ValueError, match=f"cannot merge runs of different {name}"):
        merge([run(facts, 1, "diffusers"), other])


def test_merge_refuses_a_smoke_run(facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a smoke run measures nothing"):
        merge([run(facts, 1, "diffusers"), run(facts, 4, "diffusers", smoke=True)])


def test_bench_from_json_joins_its_files(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "1.json", tmp_path / "4.json"]
    for path, batch in zip(paths, (1, 4), strict=True):
        path.write_text(json.dumps(run(facts, batch, "diffusers")))
    assert main(["bench", "--quiet", "--outdir", str(tmp_path), "--from-json", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert "### cifar10, batch 1, 3x32x32, 20 DDPM steps" in text
    assert "### cifar10, batch 4, 3x32x32, 20 DDPM steps" in text
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert (
        (tmp_path / "bench.md").read_text() == text == report.render(json.loads((tmp_path / "bench.json").read_text()))
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not usable as JSON"), ("{}", "no bandwidth, date"), ("[]", "must hold a JSON object")],
    ids=["json", "keys", "list"],
)
@pytest.mark.parametrize("option", ["--from-json", "--compare"])
def test_bench_names_the_file_that_is_no_run(
    option: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    assert main(["bench", "--outdir", str(tmp_path / "out"), option, str(path), *[str(path)] * (option == "--compare")])
    error = capsys.readouterr().err
    assert f"fastddpm: error: {path}: " in error
    assert message in error


def test_bench_from_json_refuses_rows_that_are_none(
    facts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(run(facts, 1, "diffusers") | {"rows": [{"op": "sampling"}]}))
    assert main(["bench", "--outdir", str(tmp_path / "out"), "--from-json", str(path)]) == 1
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
