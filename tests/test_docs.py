"""The pages of docs/ that are read from top to bottom run as printed, with less work than their readers do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import fastddpm
from fastddpm.cli import build_parser
from fastddpm.schedules.levels import SPACINGS
from fastddpm.tables.names import NAMES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = [DOCS.parent / "README.md", *DOCS.glob("*.md"), *DOCS.parent.glob("fastddpm/models/*/README.md")]


@pytest.mark.parametrize(
    "page", ["index.md", "concepts.md", "your-network.md", "guidance.md", "samplers.md", "edits.md"]
)
def test_python_of_a_page_runs_as_printed(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        promised = re.findall(r"^print\(.*\)  # ((?:tensor|torch\.Size)\(.*?\))", block, re.MULTILINE)
        shorter = re.sub(r'(\bsteps(?:=|": ))\d+', r"\g<1>2", block).replace("range(200)", "range(2)")
        exec(compile(block if promised else shorter, page, "exec"), names)
        printed = capsys.readouterr().out
        assert [line for line in promised if f"{line}\n" not in printed] == []


def test_commands_of_every_page_are_understood() -> None:
    parser = build_parser()
    shown = r"^    (?:.* )?fastddpm ([a-z].*)$|`fastddpm ([a-z]+\s--(?!help)[^`]+)`"
    for page in PAGES:
        for command in re.findall(shown, page.read_text(encoding="utf-8").replace("\\\n", " "), re.MULTILINE):
            parser.parse_args(shlex.split("".join(command), comments=True))


def test_every_public_name_is_documented() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    assert [name for name in fastddpm.__all__ if not re.search(rf"\b{name}\b", pages)] == []


def test_every_page_is_reached_from_the_navigation() -> None:
    navigation = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if page.name not in navigation] == []


def test_every_sampler_is_documented() -> None:
    page = (DOCS / "samplers.md").read_text(encoding="utf-8")
    assert [entry.name for entry in NAMES if f"`{entry.name}`" not in page] == []
    assert [spacing for spacing in SPACINGS if f"`{spacing}`" not in page] == []
