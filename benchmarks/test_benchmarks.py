"""Every benchmark, case by case and provider by provider: gated, then timed in pytest-benchmark's own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fastddpm.benchmarks.harness.case import Benchmark, Case, Provider
from fastddpm.benchmarks.harness.runner import LocalRunner
from fastddpm.benchmarks.harness.suite import judge

from fastddpm.machine import hardware as machine


def test_provider(benchmark: Any, measured: Benchmark, case: Case, provider: Provider) -> None:
    reason = provider.why_not(case)
    if reason is not None:
        pytest.skip(reason)
    runner = LocalRunner(provider, case)
    check = judge(measured, runner)
    benchmark.group = case.id
    benchmark.extra_info.update(
        op=measured.name,
        provider=provider.name,
        dtype=provider.dtype,
        shape=list(case.full_shape),
        device="CPU, not comparable with GPU" if case.device == "cpu" else torch.cuda.get_device_name(),
        checked=True,
        error=check.error,
        tolerance=check.tolerance,
        setup_s=runner.setup_s,
        first_call_s=runner.first_call_s,
        bytes=measured.traffic(case, provider) if measured.traffic else None,
        threads=machine.threads(),
        load_average=machine.load_average(),
        versions=machine.versions(),
    )
    benchmark(runner.call)
