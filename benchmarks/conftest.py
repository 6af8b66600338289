"""`pytest benchmarks`: each subject's providers under pytest-benchmark, which keeps every provider's own history.

    pytest benchmarks                                   this machine's sizes
    pytest benchmarks --smoke                           tiny sizes, nothing compiled: does everything work?
    pytest benchmarks -k randn                          one subject
    pytest benchmarks --benchmark-autosave              keep the numbers; --benchmark-compare shows what changed

Ratios between providers come from `fastddpm bench`, whose rounds are interleaved: these are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fastddpm.benchmarks.harness import subjects


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny sizes, nothing compiled")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every subject with each of its cases and providers."""
    if "provider" not in metafunc.fixturenames:
        return
    smoke = metafunc.config.getoption("--smoke")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        pytest.param(subject, case, provider, id=f"{subject.name}-{case.id}-{provider.name}".replace(", ", "-"))
        for subject in map(subjects.find, subjects.NAMES)
        for case in subject.cases(device, smoke)
        for provider in subject.providers
    ]
    metafunc.parametrize(("subject", "case", "provider"), rows)


@pytest.fixture(autouse=True)
def _compile_nothing_in_smoke(request: pytest.FixtureRequest) -> Iterator[None]:
    smoke = request.config.getoption("--smoke")
    with torch.compiler.set_stance("force_eager" if smoke else "default"):
        yield
