"""The tutorials run as printed, in order, with less training and fewer samples than their readers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from fastddpm.cli import COMMANDS, main
from fastddpm.training import log as train_log

DOCS = Path(__file__).resolve().parent.parent / "docs"

# What a command is given beside what is printed; the last of two equal options counts.
SHORTER = {
    "diffuse": ["--train-steps", "5", "--show", "20", "--quiet"],
    "train": ["--batch", "2", "--log-every", "1", "--save-every", "1", "--sample-every", "2", "--quiet"],
    "sample": ["--steps", "2", "--compile", "off", "--quiet"],
}


def follow(name: str, shorter: dict[str, str]) -> None:
    """Run a tutorial's commands and its Python, after these replacements in both."""
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)
    assert {kind for kind, _ in blocks} == {"bash", "python"}
    names: dict[str, Any] = {}
    for kind, code in blocks:
        for printed, run in shorter.items():
            code = code.replace(printed, run)
        if kind == "python":
            exec(compile(code, name, "exec"), names)
            continue
        for command in code.replace("\\\n", " ").splitlines():
            program, subcommand, *arguments = shlex.split(command)
            if program == "fastddpm":
                assert subcommand in COMMANDS
                assert main([subcommand, *arguments, *SHORTER[subcommand]]) == 0


def test_tutorial_2d_runs(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    follow("tutorial-2d.md", {"steps=4000": "steps=5", "10_000": "200", "--measure": ""})
    assert "ratio" in capsys.readouterr().out


def test_tutorial_digits_runs(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_log, "GRID_STEPS", 2)
    follow(
        "tutorial-digits.md",
        {
            "--steps 20000": "--steps 2",
            "--steps 600": "--steps 1",
            "--steps 30000": "--steps 3",
            "--steps 2000": "--steps 1",
            "steps=50": "steps=2",
        },
    )
    assert capsys.readouterr().out.startswith("mnist (train) 4000 (1, 32, 32) ('0', '1', ")
    run = workdir / "runs" / "digits"
    written = {path.name for path in run.iterdir()}
    table = re.findall(r"^\| (`.*?) \|", (DOCS / "tutorial-digits.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = {name.rstrip("/") for cell in table for name in re.findall(r"`(.*?)`", cell)}
    assert named - {"samples-0001000.png"} < written
    assert "samples-0000002.png" in written
    assert (workdir / "runs" / "drawn" / "grid.png").is_file()
    assert (workdir / "runs" / "finer" / "diffusion_pytorch_model.safetensors").is_file()


def test_tutorials_show_pictures_that_exist() -> None:
    for tutorial in DOCS.glob("*.md"):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", tutorial.read_text(encoding="utf-8")):
            assert (DOCS / picture).is_file()
