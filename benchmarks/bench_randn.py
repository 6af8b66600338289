"""Benchmark: drawing z, one Gaussian number per element."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import counter, twin_only
from torch import Tensor

from fastddpm import ops
from fastddpm.noise import v1 as noise

_DIFFUSERS = {"diffusers": "diffusers"}


def _generator(case: Case, seed: int = 0) -> torch.Generator:
    return torch.Generator(case.device).manual_seed(seed)


def _torch(case: Case) -> Prepared:
    generator = _generator(case)

    def run() -> Tensor:
        return torch.randn(case.full_shape, generator=generator, device=case.device)

    return Prepared(run, lambda: {"z": run()})


def _diffusers(case: Case) -> Prepared:
    """randn_tensor with one generator per sample, diffusers' way to images that do not depend on the batch."""
    randn_tensor: Any = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
    generators = [_generator(case, seed) for seed in range(case.batch)]

    def run() -> Tensor:
        return randn_tensor(case.full_shape, generator=generators, device=torch.device(case.device))

    return Prepared(run, lambda: {"z": run()})


def _fastddpm(case: Case, *, compiled: bool) -> Prepared:
    where = counter(case, noise.STREAM_REVERSE)

    def run() -> Tensor:
        return ops.randn(where, case.shape, compiled=compiled)

    return Prepared(run, lambda: {"z": run()})


def cases(device: str, smoke: bool) -> list[Case]:
    """One batch inside the caches, one far outside."""
    if smoke:
        return [Case("randn", 2, (3, 32, 32), device=device)]
    large = 64 if device == "cpu" else 128
    return [Case("randn", 16, (3, 32, 32), device=device), Case("randn", large, (3, 256, 256), device=device)]


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """noise-v1 by its bits, any other generator by its moments."""
    if provider.name.startswith("fastddpm"):
        where = counter(dataclasses.replace(case, device="cpu"), noise.STREAM_REVERSE)
        z = noise.normals(where.seed, where.sample_id, where.step, where.stream, case.n_elements // case.batch)
        return gate.equal(found["z"].cpu(), z.reshape(case.full_shape), "z against the twin on the CPU")
    return gate.normal(found["z"], "z")


BENCHMARK = Benchmark(
    name="randn",
    title="Gaussian noise",
    providers=(
        Provider("torch.randn", _torch),
        Provider("diffusers, generators", _diffusers, needs=_DIFFUSERS),
        Provider("fastddpm", lambda case: _fastddpm(case, compiled=True), compiled=True),
        Provider("fastddpm, eager twin", lambda case: _fastddpm(case, compiled=False), skips=twin_only),
    ),
    cases=cases,
    check=check,
    traffic=lambda case, provider: 4 * case.n_elements,
)
