"""`pytest benchmarks`: each benchmark's providers under pytest-benchmark, which keeps every provider's own history.

    pytest benchmarks                                   this machine's sizes
    pytest benchmarks --smoke                           tiny sizes, nothing compiled: does everything work?
    pytest benchmarks -k randn                          one benchmark
    pytest benchmarks --benchmark-autosave              keep the numbers; --benchmark-compare shows what changed

Ratios between providers come from `fastddpm bench`, whose rounds are interleaved: these are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastddpm.benchmarks.harness.case import NAMES, find


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny sizes, nothing compiled")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every benchmark with each of its cases and providers."""
    if "provider" not in metafunc.fixturenames:
        return
    smoke = metafunc.config.getoption("--smoke")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        pytest.param(measured, case, provider, id=f"{measured.name}-{case.id}-{provider.name}".replace(", ", "-"))
        for measured in map(find, NAMES)
        for case in measured.cases(device, smoke)
        for provider in measured.providers
    ]
    metafunc.parametrize(("measured", "case", "provider"), rows)


@pytest.fixture(autouse=True)
def _compile_nothing_in_smoke(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.compiler.set_stance("force_eager" if request.config.getoption("--smoke") else "default"):
        yield
