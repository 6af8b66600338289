"""Benchmark: one gradient step of L_simple (Ho et al. 2020, Algorithm 1), optimizer included."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm import noise
from fastddpm.bench import gate, inputs, lucidrains, networks
from fastddpm.bench.case import Case, Check, Provider, Subject, Work
from fastddpm.bench.inputs import Coefficients, counter, gaussian, schedule
from fastddpm.table import q_rows
from fastddpm.training import loss_fn

# The loss as a function of eps; None: the provider draws its own.
Loss = Callable[[Tensor | None], Tensor]


def _given(case: Case) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0, inputs.T - 1, case.batch).round().to(torch.int64)
    return gaussian(1, case.full_shape, case.device).clamp(-1, 1), t.to(case.device)


def _eps(case: Case) -> Tensor:
    """The noise that the gate has everybody add."""
    where = counter(case, noise.STREAM_TRAIN)
    z = noise.normals(where.seed, where.sample_id, where.step, where.stream, case.n_elements // case.batch)
    return z.reshape(case.full_shape)


def _work(case: Case, model: nn.Module, loss: Loss) -> Work:
    """Time whole steps; the gate looks at loss and gradient before the first of them."""
    model.train()
    eps = _eps(case)
    value = loss(eps)
    value.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    found = {"loss": value.detach().cpu(), "norm": norm.cpu()}
    # A learning rate that leaves the weights as they are, so that every round does the same work.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-12, weight_decay=0.0, fused=True)

    def run() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(None)
        value.backward()
        optimizer.step()
        return value

    return Work(run, lambda: found)


def _pytorch(case: Case, *, compiled: bool = False) -> Work:
    model = networks.build(case.network).to(case.device)
    net: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    x_0, t = _given(case)
    table = Coefficients.of(schedule(), case.device)

    def loss(eps: Tensor | None) -> Tensor:
        eps = torch.randn_like(x_0) if eps is None else eps
        return functional.mse_loss(net(table.q_sample(x_0, t, eps), t), eps)

    return _work(case, model, loss)


def _diffusers(case: Case) -> Work:
    """As in its unconditional training example."""
    diffusers: Any = importlib.import_module("diffusers")
    model = networks.build_diffusers(case.network).to(case.device)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=inputs.T)
    x_0, t = _given(case)

    def loss(eps: Tensor | None) -> Tensor:
        eps = torch.randn(x_0.shape, dtype=x_0.dtype, device=x_0.device) if eps is None else eps
        return functional.mse_loss(model(scheduler.add_noise(x_0, eps, t), t).sample, eps)

    return _work(case, model, loss)


def _lucidrains(case: Case) -> Work:
    model = networks.build(case.network).to(case.device)
    diffusion = lucidrains.diffusion(case, model, inputs.T)
    x_0, t = _given(case)
    return _work(case, model, lambda eps: diffusion.p_losses(x_0, t, noise=eps))


def _fastddpm(case: Case, *, compiled: bool) -> Work:
    model = networks.build(case.network).to(case.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    x_0, t = _given(case)
    rows, where = q_rows(schedule()).to(case.device), counter(case, noise.STREAM_TRAIN)
    return _work(case, model, lambda eps: loss_fn(net, x_0, t, where, rows, "epsilon"))


def cases(device: str, smoke: bool) -> list[Case]:
    """The small network."""
    if smoke:
        return [Case("training_step", 2, networks.shape("tiny"), "tiny", device=device)]
    return [Case("training_step", 64, networks.shape("small"), "small", device=device)]


@functools.lru_cache(maxsize=2)
def _expected(case: Case) -> dict[str, Tensor]:
    """Loss and gradient of the plain network."""
    return _pytorch(Case.from_dict({**case.to_dict(), "device": "cpu"})).evaluate()


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """Loss and gradient norm on the same eps against plain PyTorch, which has the whole of it in float32."""
    expected = _expected(case)
    # Peers keep alphas_cumprod in float32: see q_sample.
    tolerance = 1e-4
    return gate.all_of(
        gate.close(found["loss"], expected["loss"], tolerance, "loss against plain PyTorch"),
        gate.close(found["norm"], expected["norm"], tolerance, "norm of the gradient against plain PyTorch"),
    )


SUBJECT = Subject(
    name="training_step",
    title="Training step",
    providers=(
        Provider("PyTorch", _pytorch),
        Provider("PyTorch, compiled", lambda case: _pytorch(case, compiled=True), compiled=True),
        Provider("diffusers", _diffusers, needs={"diffusers": "diffusers"}),
        Provider("lucidrains", _lucidrains, needs=lucidrains.NEEDS),
        Provider("fastddpm", lambda case: _fastddpm(case, compiled=False)),
        Provider("fastddpm, compiled", lambda case: _fastddpm(case, compiled=True), compiled=True),
    ),
    cases=cases,
    check=check,
    isolated=True,
    second={"float32": "PyTorch, compiled"},
)
