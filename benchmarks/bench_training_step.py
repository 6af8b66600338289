"""Benchmark: one gradient step of L_simple (Ho et al. 2020, Algorithm 1), optimizer included."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import Coefficients, T, images_and_timesteps, schedule
from fastddpm.benchmarks.peers import diffusers, lucidrains, networks
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn

# The loss as a function of eps; None: the provider draws its own.
Loss = Callable[[Tensor | None], Tensor]

# As in diffusers' example, and in `fastddpm.train`.
_MAX_NORM = 1.0


def _given(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_0, t, and labels for a network with classes."""
    return *images_and_timesteps(case), networks.labels(case.network, case.batch, case.device)


def _prepared(case: Case, model: nn.Module, loss: Loss, *, fused: bool = True, low: bool = False) -> Prepared:
    """Time whole steps; the gate looks at loss and gradient.

    Args:
        fused: AdamW's fused form, which diffusers' example does not ask for.
        low: the network under autocast to bfloat16.
    """
    model.train()
    # A learning rate that leaves the weights as they are, so that every round does the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=fused or None)

    def backward(eps: Tensor | None) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(case.device, torch.bfloat16, enabled=low):
            value = loss(eps)
        value.backward()
        return value

    def run() -> Tensor:
        value = backward(None)
        nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
        optimizer.step()
        return value

    def evaluate() -> dict[str, Tensor]:
        # The noise that every provider adds here is that of `ddpm_loss` with seed 0 and step 0.
        value = backward(randn(case.full_shape, seed=0, stream=noise.STREAM_TRAIN))
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        return {"loss": value.detach().cpu(), "norm": norm.cpu()}

    return Prepared(run, evaluate)


def _pytorch(case: Case, *, compiled: bool = False) -> Prepared:
    model = networks.build(case.network).to(case.device)
    net: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    x_0, t, labels = _given(case)
    table = Coefficients.of(schedule(), case.device)

    def loss(eps: Tensor | None) -> Tensor:
        eps = torch.randn_like(x_0) if eps is None else eps
        return functional.mse_loss(net(table.q_sample(x_0, t, eps), t, class_labels=labels), eps)

    return _prepared(case, model, loss)


def _diffusers(case: Case, *, low: bool = False) -> Prepared:
    """The loop body of its example, train_unconditional.py; its --mixed_precision bf16 is autocast."""
    model, scheduler = diffusers.network(case), diffusers.scheduler("DDPMScheduler")
    x_0, t, labels = _given(case)

    def loss(eps: Tensor | None) -> Tensor:
        eps = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device) if eps is None else eps
        return functional.mse_loss(model(scheduler.add_noise(x_0, eps, t), t, class_labels=labels).sample.float(), eps)

    return _prepared(case, model, loss, fused=False, low=low)


def _lucidrains(case: Case) -> Prepared:
    model = networks.build(case.network).to(case.device)
    x_0, t, labels = _given(case)
    diffusion = lucidrains.diffusion(case, networks.WithLabels(model, labels), T)
    return _prepared(case, model, lambda eps: diffusion.p_losses(x_0, t, noise=eps))


def _fastddpm(case: Case, *, compiled: bool = False, low: bool = False) -> Prepared:
    """As `fastddpm train` does it."""
    from fastddpm.training.loss import ddpm_loss

    model = networks.build(case.network).to(case.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    x_0, t, labels = _given(case)
    loss = functools.partial(ddpm_loss, net, x_0, schedule(), seed=0, step=0, t=t, class_labels=labels)
    return _prepared(case, model, lambda eps: loss(), low=low)


def cases(device: str, smoke: bool) -> list[Case]:
    """The shipped model's network, and the batch that it was trained with; epsilon, whatever it predicts."""
    network, batch = ("tiny", 2) if smoke else ("digits", 64)
    return [Case("training_step", batch, networks.shape(network), network, device=device)]


@functools.lru_cache(maxsize=2)
def _expected(case: Case) -> dict[str, Tensor]:
    """Loss and gradient of the plain network."""
    return _pytorch(dataclasses.replace(case, device="cpu")).evaluate()


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """Loss and gradient norm on the same eps against plain PyTorch, which has the whole of it in float32."""
    expected = _expected(case)
    # Peers keep alphas_cumprod in float32: see q_sample. An error of eps counts twice in its square.
    tolerance = max(1e-4, 2 * gate.network(provider.dtype, case.device))
    return gate.all_of(
        gate.close(found["loss"], expected["loss"], tolerance, "loss against plain PyTorch"),
        gate.close(found["norm"], expected["norm"], tolerance, "norm of the gradient against plain PyTorch"),
    )


_PEER = diffusers.NEEDS

BENCHMARK = Benchmark(
    name="training_step",
    title="Training step",
    providers=(
        Provider("diffusers", _diffusers, needs=_PEER),
        Provider("diffusers, bf16", lambda c: _diffusers(c, low=True), "bfloat16", _PEER),
        Provider("PyTorch", _pytorch),
        Provider("PyTorch, compiled", lambda c: _pytorch(c, compiled=True), compiled=True),
        Provider("lucidrains", _lucidrains, needs=lucidrains.NEEDS),
        Provider("fastddpm", _fastddpm),
        Provider("fastddpm, compiled", lambda c: _fastddpm(c, compiled=True), compiled=True),
        Provider(
            "fastddpm, compiled, bf16", lambda c: _fastddpm(c, compiled=True, low=True), "bfloat16", compiled=True
        ),
    ),
    cases=cases,
    check=check,
    isolated=True,
    second={"float32": "PyTorch, compiled", "bfloat16": "diffusers, bf16"},
)
