"""p_sample, provider by provider: `fastddpm.bench.p_sample` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.bench.case import Case, Provider
from fastddpm.bench.p_sample import SUBJECT
from fastddpm.bench.pytest_row import measure


def test_p_sample(benchmark: Any, case: Case, provider: Provider) -> None:
    measure(benchmark, SUBJECT, case, provider)
