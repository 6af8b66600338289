"""Benchmark: one reverse step p_theta(x_{t-1} | x_t), the network's output given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate, inputs
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import MIDDLE, Coefficients, T, counter, normals, schedule, twin_only
from fastddpm.benchmarks.peers import diffusers, lucidrains
from torch import Tensor

from fastddpm import ops, reference
from fastddpm.noise import v1 as noise
from fastddpm.tables.ddpm import ddpm_table

_ROW = T - 1 - MIDDLE

Step = Callable[[int], Tensor]


def _prepared(step: Step) -> Prepared:
    """`step` takes t and returns x_{t-1}; at t = 0 there is no noise in it, which shows the mean alone."""
    return Prepared(lambda: step(MIDDLE), lambda: {"x_prev": step(MIDDLE).clone(), "x_last": step(0).clone()})


def _pytorch(case: Case, wrap: Callable[..., Any] = lambda step: step) -> Prepared:
    x_t, m = inputs.state_and_output(case)
    table = Coefficients.of(schedule(), case.device)

    def plain(x_t: Tensor, m: Tensor, t: Tensor, table: Coefficients) -> Tensor:
        return table.p_sample(x_t, m, t, torch.randn_like(x_t))

    step, ts = wrap(plain), {t: torch.full((case.batch,), t, device=case.device) for t in (0, MIDDLE)}
    return _prepared(lambda t: step(x_t, m, ts[t], table))


def _compiled(case: Case) -> Prepared:
    return _pytorch(case, torch.compile(fullgraph=True, dynamic=False))


def _diffusers(case: Case) -> Prepared:
    x_t, m = inputs.state_and_output(case)
    scheduler = diffusers.scheduler("DDPMScheduler")
    scheduler.set_timesteps(T)
    # Elements of scheduler.timesteps, as the pipelines pass them.
    ts = {int(t): t for t in scheduler.timesteps}
    return _prepared(lambda t: scheduler.step(m, ts[t], x_t).prev_sample)


def _lucidrains(case: Case) -> Prepared:
    x_t, m = inputs.state_and_output(case)
    diffusion = lucidrains.diffusion(case, lambda x, t: m, T)
    return _prepared(lambda t: diffusion.p_sample(x_t, t)[0])


def _fastddpm(case: Case, *, draw: str = "counter", low: torch.dtype | None = None, compiled: bool = True) -> Prepared:
    """Into a buffer of its own rather than in place, so that each call has the same input."""
    x_t, m = inputs.state_and_output(case)
    table = ddpm_table(schedule())
    rows, out = table.rows.to(case.device), torch.empty_like(x_t)
    low_out = None if low is None else torch.empty_like(x_t, dtype=low, memory_format=torch.channels_last)
    if low_out is not None:
        m = m.to(low, memory_format=torch.channels_last)
    row = {t: torch.full((1,), T - 1 - t, device=case.device) for t in (0, MIDDLE)}
    keys = {t: counter(case, noise.STREAM_REVERSE, T - 1 - t) for t in (0, MIDDLE)}

    def step(t: int) -> Tensor:
        z = keys[t] if draw == "counter" else torch.randn_like(x_t)
        return ops.p_sample(x_t, m, rows, row[t], z, clip=True, out=out, low_out=low_out, compiled=compiled)

    work = _prepared(step)
    if low_out is None:
        return work
    # What `evaluate` runs last is the step at t = 0.
    return Prepared(work.run, lambda: {**work.evaluate(), "low_last": low_out.clone()})


def cases(device: str, smoke: bool) -> list[Case]:
    """Small images, a batch of them, and a batch far outside the caches."""
    alone = [] if smoke else [Case("p_sample", 1, (3, 32, 32), device=device)]
    return alone + inputs.two_sizes("p_sample", device, smoke)


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """The mean against eqs. 7 and 15 in float64; and the noise, x_{t-1} less the mean over sigma."""
    host = dataclasses.replace(case, device="cpu")
    x_t, m = (tensor.double() for tensor in inputs.state_and_output(host))
    if provider.dtype == "bfloat16":
        m = m.to(torch.bfloat16).double()
    means = {t: reference.p_mean_variance(x_t, m, t, schedule())[:2] for t in (0, MIDDLE)}
    tolerance = gate.ARITHMETIC if provider.name.startswith(("fastddpm", "PyTorch")) else 1e-4
    last = gate.close(found["x_last"].cpu(), means[0][0], tolerance, "mean at t = 0 against eq. 7 in float64")
    if "low_last" in found:
        copied = gate.equal(found["low_last"], found["x_last"].to(found["low_last"].dtype), "the copy of x_{t-1}")
        last = gate.all_of(copied, last)
    mean, variance = means[MIDDLE]
    z = (found["x_prev"].cpu().double() - mean) / variance.sqrt()
    if provider.name.startswith("fastddpm") and "torch's z" not in provider.name:
        expected = normals(case, noise.STREAM_REVERSE, _ROW)
        drawn = gate.close(z, expected, 2e-5, "(x_{t-1} - mean) / sigma against noise-v1")
        return gate.all_of(last, drawn)
    return gate.all_of(last, gate.normal(z, "(x_{t-1} - mean) / sigma"))


def traffic(case: Case, provider: Provider) -> int:
    """Bytes that the step must move: x_t, m and x_{t-1}; z where it is a tensor; the copy for the network."""
    per_element = {"fastddpm, bfloat16": 4 + 2 + 4 + 2, "fastddpm, torch's z": 12 + 8}
    return per_element.get(provider.name, 12) * case.n_elements


BENCHMARK = Benchmark(
    name="p_sample",
    title="Reverse step, network output given",
    providers=(
        Provider("PyTorch", _pytorch),
        Provider("PyTorch, compiled", _compiled, compiled=True),
        Provider("diffusers step", _diffusers, needs=diffusers.NEEDS),
        Provider("lucidrains p_sample", _lucidrains, needs=lucidrains.NEEDS),
        Provider("fastddpm", _fastddpm, compiled=True),
        Provider("fastddpm, eager twin", lambda case: _fastddpm(case, compiled=False), skips=twin_only),
        Provider("fastddpm, torch's z", lambda case: _fastddpm(case, draw="torch"), compiled=True),
        Provider(
            "fastddpm, bfloat16", lambda case: _fastddpm(case, low=torch.bfloat16), dtype="bfloat16", compiled=True
        ),
    ),
    cases=cases,
    check=check,
    traffic=traffic,
    second={"float32": "PyTorch, compiled", "bfloat16": "PyTorch, compiled"},
)
