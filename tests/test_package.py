"""The package as users receive it: import hygiene, the kernels mapping, and the wheel's contents."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastddpm.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ["triton", "diffusers", "denoising_diffusion_pytorch", "mlxtend", "sklearn", "matplotlib", "openvino"]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_loads_no_triton_and_no_optional_dependency(tmp_path: Path) -> None:
    code = f"import sys, fastddpm; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_every_public_name_resolves(tmp_path: Path) -> None:
    result = run_python("import fastddpm; [getattr(fastddpm, n) for n in fastddpm.__all__]; print('ok')", tmp_path)
    assert result.stdout.strip() == "ok", result.stderr


def test_kernels_refuse_to_be_a_top_level_package() -> None:
    result = run_python("import kernels", ROOT)
    assert result.returncode == 1
    assert "fastddpm.kernels" in result.stderr


def test_commands_help_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from fastddpm.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    result = run_python(code, tmp_path)
    assert result.stdout.strip() == "False", result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree."""
    copy = tmp_path_factory.mktemp("wheel")
    for folder in ("fastddpm", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    (wheel,) = (copy / "dist").glob("fastddpm-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def link_requirements(wheel: Path, site: Path) -> None:
    """Link what the wheel requires without extras, and what that requires, into a folder."""
    (metadata,) = importlib.metadata.distributions(path=[str(wheel)])
    todo, done = list(metadata.requires or []), set()
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name in done or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        done.add(requirement.name)
        found = importlib.metadata.distribution(requirement.name)
        todo += found.requires or []
        for top in {path.parts[0] for path in found.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))


WITHOUT_EXTRAS = """
import contextlib, io, sys
from fastddpm import cli

def run(*arguments):
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        try:
            code = cli.main(arguments)
        except SystemExit as left:
            code = left.code
    print(arguments[0], code, " ".join(error.getvalue().split()))

for name in cli.COMMANDS:
    run(name, "--help")
assert "torch" not in sys.modules
run("sample", "--seeds", "0", "--steps", "2", "--quiet", "--outdir", "samples")
run("train", "--data", "mnist", "--outdir", "trained")
run("train", "--data", "digits8x8", "--outdir", "trained")
run("diffuse", "--data", "swiss-roll", "--out", "roll.png")
run("sample", "--model", "owner/model", "--outdir", "other")
assert not {"matplotlib", "mlxtend", "sklearn", "huggingface_hub", "diffusers"} & sys.modules.keys()
"""


def test_wheel_works_without_extras_and_names_those_that_it_misses(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    link_requirements(wheel, site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    # -S: nothing of the environment that runs the tests.
    command = [sys.executable, "-S", "-P", "-c", WITHOUT_EXTRAS]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    *helps, sample, mnist, digits, diffuse, hub = result.stdout.splitlines()
    assert [line.split()[0] for line in helps] == list(COMMANDS)
    assert all(line.split()[1:] == ["0"] for line in [*helps, sample])
    for line, extra in ((mnist, "train"), (digits, "train"), (diffuse, "train"), (hub, "hub")):
        assert " 1 fastddpm: error: " in line
        assert f"pip install 'fastddpm[{extra}]'" in line
    assert (tmp_path / "samples" / "seed-000000.png").exists()


def shipped_files() -> set[str]:
    """List the files of the tree that a user needs, under the names they are imported by."""
    library = {str(path.relative_to(ROOT)) for path in (ROOT / "fastddpm").rglob("*") if path.is_file()}
    mapped = {
        "fastddpm/" + str(path.relative_to(ROOT))
        for folder in ("kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    }
    return {name for name in library | mapped if "__pycache__" not in name and not name.endswith(".tmp")}


def test_wheel_holds_the_tree_and_nothing_else(wheel_names: set[str]) -> None:
    packaged = {name for name in wheel_names if ".dist-info/" not in name}
    assert packaged == shipped_files()


def test_wheel_holds_the_shipped_model(wheel_names: set[str]) -> None:
    assert "fastddpm/models/digits/diffusion_pytorch_model.safetensors" in wheel_names
