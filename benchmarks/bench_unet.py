"""unet, provider by provider: `fastddpm.bench.unet` under pytest-benchmark."""

from __future__ import annotations

from typing import Any

from fastddpm.bench.case import Case, Provider
from fastddpm.bench.pytest_row import measure
from fastddpm.bench.unet import SUBJECT


def test_unet(benchmark: Any, case: Case, provider: Provider) -> None:
    measure(benchmark, SUBJECT, case, provider)
