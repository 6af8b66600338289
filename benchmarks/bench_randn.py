"""Benchmark: drawing z, one Gaussian number per element."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import counter, normals, twin_only, two_sizes
from fastddpm.benchmarks.peers import diffusers
from torch import Tensor

from fastddpm import ops
from fastddpm.noise import v1 as noise


def _generator(case: Case, seed: int = 0) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(seed)


def _prepared(run: Callable[[], Tensor]) -> Prepared:
    return Prepared(run, lambda: {"z": run()})


def _torch(case: Case) -> Prepared:
    generator = _generator(case)
    return _prepared(lambda: torch.randn(case.full_shape, generator=generator, device=case.device))


def _diffusers(case: Case) -> Prepared:
    """randn_tensor with one generator per sample, diffusers' way to images that do not depend on the batch."""
    randn_tensor: Any = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
    generators = [_generator(case, seed) for seed in range(case.batch)]
    return _prepared(lambda: randn_tensor(case.full_shape, generator=generators, device=torch.device(case.device)))


def _fastddpm(case: Case, *, compiled: bool) -> Prepared:
    where = counter(case, noise.STREAM_REVERSE)
    return _prepared(lambda: ops.randn(where, case.shape, compiled=compiled))


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """noise-v1 by its bits, any other generator by its moments."""
    if provider.name.startswith("fastddpm"):
        return gate.equal(found["z"].cpu(), normals(case, noise.STREAM_REVERSE), "z against the twin on the CPU")
    return gate.normal(found["z"], "z")


BENCHMARK = Benchmark(
    name="randn",
    title="Gaussian noise",
    providers=(
        Provider("torch.randn", _torch),
        Provider("diffusers, generators", _diffusers, needs=diffusers.NEEDS),
        Provider("fastddpm", lambda case: _fastddpm(case, compiled=True), compiled=True),
        Provider("fastddpm, eager twin", lambda case: _fastddpm(case, compiled=False), skips=twin_only),
    ),
    cases=functools.partial(two_sizes, "randn"),
    check=check,
    traffic=lambda case, provider: 4 * case.n_elements,
)
