"""Gates: what a provider must have computed before it is timed."""

from __future__ import annotations

import math

import torch
from fastddpm.benchmarks.harness.case import Check
from torch import Tensor

# Relative L2 error. float32: some roundings. The network's are those of the project's bars: 1e-5, and 1.5e-2 for
# bfloat16 (OpenVINO's bfloat16 rounds t as well and reaches 4.7e-2 near t = 999; that is its own row's affair).
ARITHMETIC = 2e-6
NETWORK = {"float32": 1e-5, "bfloat16": 1.5e-2, "float16": 2e-3}
# cuDNN rounds what float32 convolutions multiply to TF32's 10 bits of mantissa, float16's, where PyTorch allows it.
TF32 = NETWORK["float16"]
# A state kept in a 16-bit type is rounded at each step.
STATE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
# Standard errors that a moment may be away from the normal distribution's.
STANDARD_ERRORS = 5.0


def network(dtype: str, device: str) -> float:
    """How far a network's output may be from float32 on the CPU, at PyTorch's present settings."""
    return TF32 if dtype == "float32" and device == "cuda" and torch.backends.cudnn.allow_tf32 else NETWORK[dtype]


def close(value: Tensor, reference: Tensor, tolerance: float, what: str) -> Check:
    """Judge by ||value - reference|| / ||reference|| in float64; NaN stays NaN."""
    if value.shape != reference.shape:
        return Check(math.inf, tolerance, f"{what}: shape {tuple(value.shape)}, not {tuple(reference.shape)}")
    value, reference = value.double(), reference.double()
    error = (value - reference).norm() / reference.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return Check(float(error), tolerance, what)


def equal(value: Tensor, reference: Tensor, what: str) -> Check:
    """Judge bit by bit."""
    differ = value.shape != reference.shape or not torch.equal(value, reference)
    return Check(float(differ), 0.0, f"{what}, bit for bit")


def normal(z: Tensor, what: str) -> Check:
    """Judge mean, variance and kurtosis against N(0, 1), in standard errors."""
    z = z.double().flatten()
    n = z.numel()
    deviations = (
        (z.mean(), 1.0),
        (z.var() - 1, math.sqrt(2.0)),
        ((z**4).mean() - 3, math.sqrt(96.0)),
    )
    worst = max(abs(float(value)) * math.sqrt(n) / sd for value, sd in deviations)
    return Check(worst, STANDARD_ERRORS, f"{what}: moments of N(0, 1) in standard errors")


def all_of(*checks: Check) -> Check:
    """The check that is closest to failing, or has failed."""
    failed = [check for check in checks if not check.ok]
    if failed:
        return failed[0]
    return max(checks, key=lambda check: check.error / check.tolerance if check.tolerance else 0.0)
