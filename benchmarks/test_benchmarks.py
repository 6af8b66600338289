"""Every subject, case by case and provider by provider, under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.benchmarks.harness.case import Case, Provider, Subject
from fastddpm.benchmarks.harness.pytest_row import measure


def test_provider(benchmark: Any, subject: Subject, case: Case, provider: Provider) -> None:
    measure(benchmark, subject, case, provider)
