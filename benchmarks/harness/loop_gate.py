"""Whole sampling loops: what is recorded of one, the plain loop, and the gate that follows a recorded loop_gate.

A chain of steps through a network with random weights is chaotic: two correct providers drift apart. So the gate goes
along the provider's own chain and asks of each step whether x_{t-1} is what the papers' formulas make of x_t, the
reference network's output and the z that the provider's noise source stands for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate
from fastddpm.benchmarks.harness.case import Case, Check, Provider
from fastddpm.benchmarks.harness.inputs import Coefficients, T, schedule
from fastddpm.benchmarks.peers import networks
from torch import Tensor

from fastddpm import reference
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import spaced_timesteps

Predict = Callable[[Tensor, Tensor], Tensor]


def spacing(case: Case) -> str:
    """DDPM visits both ends; DDIM as diffusers' scheduler does by default, the one in which its steps fit its list."""
    return "leading" if case.sampler == "ddim" else "linspace"


def timesteps(case: Case) -> Tensor:
    """The timesteps that a case visits, int64 [steps], descending."""
    return spaced_timesteps(T, case.steps, spacing(case))


def kept(case: Case) -> list[int]:
    """The samples of a batch that the gate looks at: the first and the last."""
    return sorted({0, case.batch - 1})


class Recorder:
    """Collects a chain: x_T and each x_{t-1}, of the kept samples, in float32 on the CPU."""

    def __init__(self, case: Case) -> None:
        self._kept = kept(case)
        self._x: list[Tensor] = []
        self._z: list[Tensor] = []

    def state(self, x: Tensor) -> None:
        """Note a state [B, ...]."""
        self._x.append(x[self._kept].detach().float().cpu().clone())

    def noise(self, z: Tensor) -> None:
        """Note the z of a step [B, ...]."""
        self._z.append(z[self._kept].detach().float().cpu().clone())

    def found(self) -> dict[str, Tensor]:
        """What the gate wants: x [steps + 1, k, ...], z [steps, k, ...] (a last step without noise may be left out)."""
        z = self._z + [torch.zeros_like(self._x[0])] * (len(self._x) - 1 - len(self._z))
        return {"x": torch.stack(self._x), "z": torch.stack(z)}


def plain_loop(case: Case, predict: Predict, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Algorithm 2 of Ho et al. 2020 in plain PyTorch.

    Args:
        predict: (x float32 [B, ...], t int64 [B]) to eps.
        generator: of x_T, then z for each step but the last.

    Yields:
        x_T, then each x_{t-1}, with the z in it.
    """
    visited = timesteps(case)
    coefficients = Coefficients.of(schedule().respaced(visited), case.device)
    where: dict[str, Any] = {"device": case.device}
    x = torch.randn(case.full_shape, generator=generator, **where)
    yield x, None
    for k, t in zip(reversed(range(case.steps)), visited.tolist(), strict=True):
        eps = predict(x, torch.full((case.batch,), t, **where))
        index = torch.full((case.batch,), k, **where)
        z = torch.randn(case.full_shape, generator=generator, **where) if k else None
        x = coefficients.mean(x, eps, index) if z is None else coefficients.p_sample(x, eps, index, z)
        yield x, z


@torch.no_grad()
def recorded(case: Case, predict: Predict) -> dict[str, Tensor]:
    """What the gate wants of a plain loop."""
    recorder = Recorder(case)
    for x, z in plain_loop(case, predict, torch.Generator(case.device).manual_seed(1)):
        recorder.state(x)
        if z is not None:
            recorder.noise(z)
    return recorder.found()


@functools.lru_cache(maxsize=2)
def _reference_network(name: str) -> torch.nn.Module:
    return networks.build(name)


def reference_eps(case: Case, x: Tensor, t: int) -> Tensor:
    """The kept samples through the plain network, float32, eager, on the CPU."""
    labels = networks.labels(case.network, case.batch)
    labels = None if labels is None else labels[kept(case)]
    with torch.no_grad():
        return _reference_network(case.network)(x, torch.full((len(x),), t), class_labels=labels)


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """Follow the chain: the worst step, in units of the network's tolerance."""
    x, z = found["x"], found["z"]
    if len(x) != case.steps + 1:
        return Check(float("inf"), 0.0, f"{len(x) - 1} steps were taken instead of {case.steps}")
    # lucidrains cannot leave timesteps out: its chain is that of a process of its own.
    own = Schedule.from_betas(found["betas"]) if "betas" in found else None
    visited = timesteps(case).tolist() if own is None else list(range(case.steps))[::-1]
    process = schedule().respaced(timesteps(case)) if own is None else own
    tolerance = provider.tolerance or gate.network(provider.dtype, case.device)
    state = gate.STATE["bfloat16" if "16-bit state" in found else "float32"]
    steps = []
    for i, t in enumerate(visited):
        eps = reference_eps(case, x[i], t).double()
        k = case.steps - 1 - i
        expected, slope = _step(case, process, x[i].double(), eps, z[i].double(), k)
        allowed = slope * tolerance * float(eps.norm()) + state * float(expected.norm())
        if case.network in networks.TRAINED:
            allowed += slope * _input_rounding(x[i], float(process.alphas_cumprod[k]), provider.dtype)
        error = float((x[i + 1].double() - expected).norm()) / allowed
        what = f"x_{{t-1}} of {len(visited)} steps, along the chain (step {i})"
        steps.append(Check(error * tolerance, tolerance, what))
    return gate.all_of(*steps)


def _input_rounding(x: Tensor, alpha_cumprod: float, dtype: str) -> float:
    """How far eps may move because x_t is rounded to the network's dtype.

    Where x_0 is known, eps = (x_t - sqrt(alpha_cumprod) x_0) / sqrt(1 - alpha_cumprod): at low noise levels a trained
    network sees more in x_t than 16 bits hold.
    """
    unit = torch.finfo(getattr(torch, dtype)).eps / 2
    return unit * float(x.double().norm()) / math.sqrt(1 - alpha_cumprod)


def _step(case: Case, process: Schedule, x: Tensor, eps: Tensor, z: Tensor, t: int) -> tuple[Tensor, float]:
    """x_{t-1} in the papers' form, and how much of an error of eps reaches it where x_0 is not clipped."""
    x_0 = reference.predict_x0(x, eps, t, process).clamp(-1, 1)
    recipm1 = float(process.sqrt_recipm1_alphas_cumprod[t])
    if case.sampler == "ddim":
        a, a_prev = process.alphas_cumprod[t], process.alphas_cumprod_prev[t]
        return reference.ddim_step(x_0, eps, a, a_prev), float(a_prev.sqrt() * recipm1 + (1 - a_prev).sqrt())
    mean, variance = reference.q_posterior(x_0, x, t, process)
    return mean + variance.sqrt() * z, float(process.posterior_mean_coef1[t]) * recipm1
