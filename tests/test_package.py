"""The package as users receive it: import hygiene, the kernels mapping, and the wheel's contents."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build the wheel from a copy of the tree and list what it holds."""
    copy = tmp_path_factory.mktemp("wheel")
    for folder in ("fastddpm", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    (wheel,) = (copy / "dist").glob("fastddpm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


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
