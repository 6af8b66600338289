"""One provider and one case under pytest-benchmark: gated, then timed in pytest-benchmark's own way."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case, Provider, Subject
from fastddpm.benchmarks.harness.runner import LocalRunner

from fastddpm.machine import hardware as machine


def measure(benchmark: Any, subject: Subject, case: Case, provider: Provider) -> None:
    """Skip with the reason, fail at the gate, or time.

    pytest-benchmark's own wall clock is used, with a synchronisation in the call on CUDA.
    """
    reason = provider.why_not(case)
    if reason is not None:
        importlib.import_module("pytest").skip(reason)
    runner = LocalRunner(provider, case)
    check = runner.gate(subject)
    benchmark.group = case.id
    benchmark.extra_info.update(
        op=subject.name,
        provider=provider.name,
        dtype=provider.dtype,
        shape=list(case.full_shape),
        device="CPU, not comparable with GPU" if case.device == "cpu" else torch.cuda.get_device_name(),
        checked=True,
        error=check.error,
        tolerance=check.tolerance,
        setup_s=runner.setup_s,
        first_call_s=runner.first_call_s,
        bytes=subject.traffic(case, provider) if subject.traffic else None,
        threads=machine.threads(),
        load_average=machine.load_average(),
        versions=machine.versions(),
    )
    benchmark(runner.call)
