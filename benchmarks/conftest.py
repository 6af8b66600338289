"""`pytest benchmarks`: each subject's providers under pytest-benchmark, which keeps every provider's own history.

    pytest benchmarks                                   this machine's sizes
    pytest benchmarks --smoke                           tiny sizes, nothing compiled: does everything work?
    pytest benchmarks --benchmark-autosave              keep the numbers; --benchmark-compare shows what changed

Ratios between providers come from `fastddpm bench`, whose rounds are interleaved: these are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny sizes, nothing compiled")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Benchmarks are called bench_*.py, which pytest does not look for by itself."""
    explicit = any(str(argument).split("::")[0].endswith(file_path.name) for argument in parent.config.args)
    if file_path.name.startswith("bench_") and file_path.suffix == ".py" and not explicit:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider with every case of the module's SUBJECT."""
    if "provider" not in metafunc.fixturenames:
        return
    subject = metafunc.module.SUBJECT
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = subject.cases(device, metafunc.config.getoption("--smoke"))
    pairs = [(case, provider) for case in cases for provider in subject.providers]
    ids = [f"{case.id}-{provider.name}".replace(", ", "-").replace(" ", "_") for case, provider in pairs]
    metafunc.parametrize(("case", "provider"), pairs, ids=ids)


@pytest.fixture(autouse=True)
def _compile_nothing_in_smoke(request: pytest.FixtureRequest) -> Iterator[None]:
    smoke = request.config.getoption("--smoke")
    with torch.compiler.set_stance("force_eager" if smoke else "default"):
        yield
