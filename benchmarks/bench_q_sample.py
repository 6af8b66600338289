"""Benchmark: the forward process q(x_t | x_0), with the noise it adds, as a training step wants it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate, inputs
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import Coefficients, counter, normals, schedule, twin_only, two_sizes
from fastddpm.benchmarks.peers import diffusers, lucidrains
from torch import Tensor

from fastddpm import ops, reference
from fastddpm.noise import v1 as noise
from fastddpm.tables.table import q_rows


def _prepared(run: Callable[[], tuple[Tensor, Tensor]]) -> Prepared:
    return Prepared(run, lambda: dict(zip(("x_t", "eps"), run(), strict=True)))


def _mixing(
    case: Case, q_sample: Callable[[Tensor, Tensor, Tensor], Any], wrap: Callable[..., Any] = lambda noisy: noisy
) -> Prepared:
    """q_sample takes x_0, t and eps, which torch draws."""
    x_0, t = inputs.images_and_timesteps(case)

    def noisy(x_0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return q_sample(x_0, t, eps), eps

    run = wrap(noisy)
    return _prepared(lambda: run(x_0, t))


def _pytorch(case: Case, wrap: Callable[..., Any] = lambda noisy: noisy) -> Prepared:
    return _mixing(case, Coefficients.of(schedule(), case.device).q_sample, wrap)


def _compiled(case: Case) -> Prepared:
    return _pytorch(case, torch.compile(fullgraph=True, dynamic=False))


def _diffusers(case: Case) -> Prepared:
    scheduler = diffusers.scheduler("DDPMScheduler")
    return _mixing(case, lambda x_0, t, eps: scheduler.add_noise(x_0, eps, t))


def _lucidrains(case: Case) -> Prepared:
    return _mixing(case, lucidrains.diffusion(case, torch.nn.Identity(), inputs.T).q_sample)


def _fastddpm(case: Case, *, compiled: bool) -> Prepared:
    x_0, t = inputs.images_and_timesteps(case)
    rows, where = q_rows(schedule()).to(case.device), counter(case, noise.STREAM_TRAIN)

    def run() -> Any:
        return ops.q_sample(x_0, rows, t, where, return_eps=True, compiled=compiled)

    return _prepared(run)


def _fastddpm_given(case: Case) -> Prepared:
    rows = q_rows(schedule()).to(case.device)
    return _mixing(case, lambda x_0, t, eps: ops.q_sample(x_0, rows, t, eps, compiled=True))


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """x_t against the paper's form in float64 on the provider's own eps, and eps against N(0, 1) or noise-v1."""
    host = dataclasses.replace(case, device="cpu")
    x_0, t = inputs.images_and_timesteps(host)
    x_t, eps = found["x_t"].cpu(), found["eps"].cpu()
    expected = reference.q_sample(x_0.double(), t, schedule(), eps.double())
    # Peers compute alphas_cumprod in float32, which moves the noise's coefficient at t = 0 by 8e-5.
    tolerance = gate.ARITHMETIC if "fastddpm" in provider.name or "PyTorch" in provider.name else 1e-4
    exact = gate.close(x_t, expected, tolerance, "x_t against eq. 4 in float64")
    if provider.name in ("fastddpm", "fastddpm, eager twin"):
        return gate.all_of(gate.equal(eps, normals(case, noise.STREAM_TRAIN), "eps against noise-v1"), exact)
    return gate.all_of(gate.normal(eps, "eps"), exact)


BENCHMARK = Benchmark(
    name="q_sample",
    title="Forward noising, eps returned",
    providers=(
        Provider("PyTorch", _pytorch),
        Provider("PyTorch, compiled", _compiled, compiled=True),
        Provider("diffusers add_noise", _diffusers, needs=diffusers.NEEDS),
        Provider("lucidrains q_sample", _lucidrains, needs=lucidrains.NEEDS),
        Provider("fastddpm", lambda case: _fastddpm(case, compiled=True), compiled=True),
        Provider("fastddpm, eager twin", lambda case: _fastddpm(case, compiled=False), skips=twin_only),
        Provider("fastddpm, torch's eps", _fastddpm_given, compiled=True),
    ),
    cases=functools.partial(two_sizes, "q_sample"),
    check=check,
    traffic=lambda case, provider: 12 * case.n_elements,
    second={"float32": "PyTorch, compiled", "bfloat16": "PyTorch, compiled"},
)
