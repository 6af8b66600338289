"""The prepared run for a GPU, with the CPU standing in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fastddpm.benchmarks import gpu_run
from fastddpm.benchmarks.gpu_run import Part
from fastddpm.benchmarks.harness.case import find

from fastddpm.cli import build_parser


def test_measuring_parts_run_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compiled has tests of its own.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    chosen = ["--part", "counts", "--part", "settings"]
    assert gpu_run.main(["--device", "cpu", "--smoke", "--outdir", str(tmp_path), *chosen]) == 0
    text = capsys.readouterr().out
    assert "== counts: passed in" in text
    for setting in ("cudnn.benchmark", "sub-pixels", "one graph a run"):
        assert f"fastddpm, {setting}" in text
    assert (tmp_path / "settings" / "bench.json").exists()


def test_a_part_that_fails_or_takes_too_long_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def code(text: str) -> tuple[str, ...]:
        return (sys.executable, "-c", text)

    stubs = [
        Part("wrong", 1, 60, code("print('why'); raise SystemExit(3)")),
        Part("long", 1, 1, code("import time; print('begun', flush=True); time.sleep(600)")),
        Part("right", 1, 60, code("print('done')")),
    ]
    monkeypatch.setattr(gpu_run, "parts", lambda *where, **options: stubs)
    assert gpu_run.main(["--outdir", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "wrong: failed with exit code 3" in text
    assert "long: stopped after" in text
    assert "right: passed" in text
    assert (tmp_path / "right.txt").read_text() == "done\n"
    assert gpu_run.main(["--outdir", str(tmp_path), "--budget", "0"]) == 1
    assert "right: left out, no time was left" in capsys.readouterr().out


def test_expected_seconds_fit_ten_minutes_and_the_commands_are_known(tmp_path: Path) -> None:
    parts = gpu_run.parts("cuda", tmp_path, smoke=False)
    assert sum(part.expected for part in parts) < 570
    for part in parts:
        assert part.expected < part.limit
        if "fastddpm" in part.command:
            build_parser().parse_args(part.command[3:])


def test_networks_compiled_ahead_are_those_of_the_timed_parts() -> None:
    built = [command[3:] for command in gpu_run.builds()]
    assert [(name, case.split("-")[2]) for name, case, _ in built] == [
        *(("settings", batch) for _ in range(3) for batch in ("B1", "B16", "B256")),
        *(("sampling", batch) for batch in ("B1", "B16")),
    ]
    for name, _, provider in built:
        assert find(name).provider(provider).compiled
