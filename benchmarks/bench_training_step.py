"""training_step, provider by provider: `fastddpm.bench.training_step` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.bench.case import Case, Provider
from fastddpm.bench.pytest_row import measure
from fastddpm.bench.training_step import SUBJECT


def test_training_step(benchmark: Any, case: Case, provider: Provider) -> None:
    measure(benchmark, SUBJECT, case, provider)
