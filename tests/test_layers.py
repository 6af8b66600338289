"""Imports run one way: each room imports rooms of lower layers only, and no modules import each other in a circle.

Read from the source, imports inside functions too; a general linter does not find fastddpm.kernels and
fastddpm.benchmarks, whose folders lie outside fastddpm/.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"fastddpm": "fastddpm", "benchmarks": "fastddpm.benchmarks", "kernels": "fastddpm.kernels"}

# From the top. The rooms of one layer do not import each other.
LAYERS = (
    ("cli",),
    ("evaluation", "pictures", "benchmarks"),
    ("training", "integrations", "diagnostics"),
    ("sampling",),
    ("unet",),
    ("ops",),
    ("machine", "data", "tables", "reference"),
    ("files", "noise", "schedules"),
    ("errors", "checks", "kernels"),
)
MAX_LINES = 300
HEIGHT = {room: -i for i, layer in enumerate(LAYERS) for room in layer}
# The two doors stand above all rooms: the public names, which are looked up when they are used, and the command.
DOORS = ("fastddpm", "fastddpm.__main__")


def sources() -> dict[str, str]:
    """Every module of the library by its name, with its text."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path.read_text()
    return found


def graph(modules: dict[str, str]) -> dict[str, set[str]]:
    """What each module but the doors imports of the library."""
    return {name: set(imports(name, modules)) for name in modules if name not in DOORS}


def imports(module: str, modules: dict[str, str]) -> Iterator[str]:
    for name, parent in names(modules[module]):
        target = name if name in modules else parent
        if target in modules and target not in DOORS:
            yield target


@functools.cache
def names(text: str) -> list[tuple[str, str]]:
    """What is imported, and the module that it is imported from."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
    return found


def upward(modules: dict[str, str]) -> list[str]:
    """The imports of a room that is not in a lower layer."""
    return [
        f"{module} imports {target}"
        for module, targets in graph(modules).items()
        for target in sorted(targets)
        if room(target) != room(module) and HEIGHT[room(target)] >= HEIGHT[room(module)]
    ]


def room(module: str) -> str:
    return module.split(".")[1]


def circle(modules: dict[str, str]) -> list[str]:
    """A circle of imports; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph(modules)).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_imports_lower_layers_only() -> None:
    assert upward(sources()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(sources()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fastddpm.files.atomic", "import fastddpm.sampling.sampler"),
        ("fastddpm.tables.ddim", "def f():\n    from fastddpm.unet import unet"),
        ("fastddpm.kernels.noise", "from fastddpm.noise.v1 import Counter"),
        ("fastddpm.sampling.sampler", "from fastddpm.benchmarks.harness.case import Case"),
        ("fastddpm.training.loss", "from fastddpm.diagnostics.verify import verify"),
    ],
    ids=["files-sampling", "inside-a-function", "kernels", "benchmarks", "same-layer"],
)
def test_a_wrong_import_is_found(module: str, line: str) -> None:
    found = sources()
    assert len(upward(found | {module: f"{found[module]}\n{line}\n"})) == 1


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    assert [name for name, text in sources().items() if text.count("\n") > MAX_LINES] == []


def test_a_circle_is_found() -> None:
    found = sources()
    back = "from fastddpm.benchmarks.harness.suite import run"
    assert len(circle(found | {"fastddpm.benchmarks.harness.case": back})) > 2
