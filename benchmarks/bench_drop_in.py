"""drop_in, provider by provider: `fastddpm.bench.drop_in` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.bench.case import Case, Provider
from fastddpm.bench.drop_in import SUBJECT
from fastddpm.bench.pytest_row import measure


def test_drop_in(benchmark: Any, case: Case, provider: Provider) -> None:
    measure(benchmark, SUBJECT, case, provider)
