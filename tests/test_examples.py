"""Every example runs as it is, in a folder of its own."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import fastddpm

EXAMPLE_FOLDER = Path(__file__).resolve().parent.parent / "examples"
EXAMPLES = sorted(EXAMPLE_FOLDER.glob("*.py"))
(NOTEBOOK,) = EXAMPLE_FOLDER.glob("*.ipynb")
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
NOTEBOOK_CODE = "\n".join("".join(cell["source"]) for cell in CELLS)


pytestmark = pytest.mark.usefixtures("workdir")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", [*EXAMPLES, NOTEBOOK], ids=lambda path: path.stem)
def test_example_needs_no_module_that_it_does_not_import(path: Path) -> None:
    """What it takes from the package itself is there without any other import, which another test may have made."""
    code = NOTEBOOK_CODE if path is NOTEBOOK else path.read_text()
    assert set(re.findall(r"(?<!from )(?<!import )\bfastddpm\.(\w+)", code)) <= set(fastddpm.__all__)


def test_notebook_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = NOTEBOOK_CODE
    for name, few in (("steps = Net(), [], 2000", "steps = Net(), [], 20"), ("8192", "64"), ("16_384", "512")):
        assert name in code
        code = code.replace(name, few)
    (tmp_path / "cells.py").write_text(code)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    runpy.run_path(str(tmp_path / "cells.py"), run_name="__main__")
    assert "sliced Wasserstein distance" in capsys.readouterr().out


def test_notebook_was_executed() -> None:
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    pictures = [output for cell in CELLS for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
