"""Benchmark: the forward process q(x_t | x_0), with the noise it adds, as a training step wants it."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate, inputs
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import Coefficients, counter, gaussian, schedule, twin_only
from fastddpm.benchmarks.peers import lucidrains
from torch import Tensor

from fastddpm import ops, reference
from fastddpm.noise import v1 as noise
from fastddpm.tables.table import q_rows

_X_0, _EPS = 1, 2


def _given(case: Case) -> tuple[Tensor, Tensor]:
    """x_0 and t: timesteps spread over all of them."""
    t = torch.linspace(0, inputs.T - 1, case.batch).round().to(torch.int64)
    return gaussian(_X_0, case.full_shape, case.device).clamp(-1, 1), t.to(case.device)


def _prepared(run: Callable[[], tuple[Tensor, Tensor]]) -> Prepared:
    def evaluate() -> dict[str, Tensor]:
        x_t, eps = run()
        return {"x_t": x_t, "eps": eps}

    return Prepared(run, evaluate)


def _pytorch(case: Case) -> Prepared:
    x_0, t = _given(case)
    table = Coefficients.of(schedule(), case.device)

    def run() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return table.q_sample(x_0, t, eps), eps

    return _prepared(run)


def _compiled(case: Case) -> Prepared:
    x_0, t = _given(case)
    table = Coefficients.of(schedule(), case.device)

    @torch.compile(fullgraph=True, dynamic=False)
    def q_sample(x_0: Tensor, t: Tensor, table: Coefficients) -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return table.q_sample(x_0, t, eps), eps

    return _prepared(lambda: q_sample(x_0, t, table))


def _diffusers(case: Case) -> Prepared:
    x_0, t = _given(case)
    scheduler: Any = importlib.import_module("diffusers").DDPMScheduler(num_train_timesteps=inputs.T)

    def run() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return scheduler.add_noise(x_0, eps, t), eps

    return _prepared(run)


def _lucidrains(case: Case) -> Prepared:
    x_0, t = _given(case)
    diffusion = lucidrains.diffusion(case, torch.nn.Identity(), inputs.T)

    def run() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return diffusion.q_sample(x_0, t, eps), eps

    return _prepared(run)


def _fastddpm(case: Case, *, compiled: bool) -> Prepared:
    x_0, t = _given(case)
    rows, where = q_rows(schedule()).to(case.device), counter(case, noise.STREAM_TRAIN)

    def run() -> Any:
        return ops.q_sample(x_0, rows, t, where, return_eps=True, compiled=compiled)

    return _prepared(run)


def _fastddpm_given(case: Case) -> Prepared:
    x_0, t = _given(case)
    rows = q_rows(schedule()).to(case.device)

    def run() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(x_0)
        return ops.q_sample(x_0, rows, t, eps, compiled=True), eps  # type: ignore[return-value]

    return _prepared(run)


def cases(device: str, smoke: bool) -> list[Case]:
    """One batch inside the caches, one far outside."""
    if smoke:
        return [Case("q_sample", 2, (3, 32, 32), device=device)]
    large = 64 if device == "cpu" else 128
    return [Case("q_sample", 16, (3, 32, 32), device=device), Case("q_sample", large, (3, 256, 256), device=device)]


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """x_t against the paper's form in float64 on the provider's own eps, and eps against N(0, 1) or noise-v1."""
    host = dataclasses.replace(case, device="cpu")
    x_0, t = _given(host)
    x_t, eps = found["x_t"].cpu(), found["eps"].cpu()
    expected = reference.q_sample(x_0.double(), t, schedule(), eps.double())
    # Peers compute alphas_cumprod in float32, which moves the noise's coefficient at t = 0 by 8e-5.
    tolerance = gate.ARITHMETIC if "fastddpm" in provider.name or "PyTorch" in provider.name else 1e-4
    exact = gate.close(x_t, expected, tolerance, "x_t against eq. 4 in float64")
    if provider.name in ("fastddpm", "fastddpm, eager twin"):
        where = counter(host, noise.STREAM_TRAIN)
        z = noise.normals(where.seed, where.sample_id, where.step, where.stream, case.n_elements // case.batch)
        return gate.all_of(gate.equal(eps, z.reshape(case.full_shape), "eps against noise-v1"), exact)
    return gate.all_of(gate.normal(eps, "eps"), exact)


BENCHMARK = Benchmark(
    name="q_sample",
    title="Forward noising, eps returned",
    providers=(
        Provider("PyTorch", _pytorch),
        Provider("PyTorch, compiled", _compiled, compiled=True),
        Provider("diffusers add_noise", _diffusers, needs={"diffusers": "diffusers"}),
        Provider("lucidrains q_sample", _lucidrains, needs=lucidrains.NEEDS),
        Provider("fastddpm", lambda case: _fastddpm(case, compiled=True), compiled=True),
        Provider("fastddpm, eager twin", lambda case: _fastddpm(case, compiled=False), skips=twin_only),
        Provider("fastddpm, torch's eps", _fastddpm_given, compiled=True),
    ),
    cases=cases,
    check=check,
    traffic=lambda case, provider: 12 * case.n_elements,
    second={"float32": "PyTorch, compiled", "bfloat16": "PyTorch, compiled"},
)
