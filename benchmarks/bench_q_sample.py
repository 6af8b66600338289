"""q_sample, provider by provider: `fastddpm.bench.q_sample` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.bench.case import Case, Provider
from fastddpm.bench.pytest_row import measure
from fastddpm.bench.q_sample import SUBJECT


def test_q_sample(benchmark: Any, case: Case, provider: Provider) -> None:
    measure(benchmark, SUBJECT, case, provider)
