"""Benchmark: one call of the network."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from fastddpm.benchmarks.harness import gate, loop_gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Check, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import gaussian
from fastddpm.benchmarks.peers import diffusers, networks, openvino
from fastddpm.benchmarks.peers.networks import compile_frozen
from torch import Tensor, nn

from fastddpm.machine.building import Want
from fastddpm.sampling import network
from fastddpm.sampling.network import sampling_networks

# The network's output at row i of the chain's timesteps, float32 or lower.
Call = Callable[[int], Tensor]


def _prepared(case: Case, call: Call) -> Prepared:
    """Time a row in the middle; evaluate every row."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(case.steps // 2)

    def evaluate() -> dict[str, Tensor]:
        with torch.no_grad():
            rows = [call(i)[loop_gate.kept(case)].float().cpu().clone() for i in range(case.steps)]
        return {"eps": torch.stack(rows)}

    return Prepared(run, evaluate)


def _input(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    return gaussian(1, case.full_shape, case.device, dtype)


def _module(case: Case, model: nn.Module | None = None, *, frozen: bool = False) -> Prepared:
    """A module in its dtype, ours unless another is given; eager as it is, or compiled."""
    predict = networks.labelled(case, model)
    x = _input(case, next(predict.parameters()).dtype)
    if frozen:
        return _predicting(case, compile_frozen(predict), x.to(memory_format=torch.channels_last))
    return _predicting(case, predict, x)


def _predicting(case: Case, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Prepared:
    ts = [torch.full((case.batch,), t, device=case.device) for t in loop_gate.timesteps(case).tolist()]
    return _prepared(case, lambda i: predict(x, ts[i]))


def _tuned(case: Case, dtype: torch.dtype) -> Prepared:
    return _module(case, diffusers.network(case, dtype), frozen=True)


def _fastddpm(case: Case, dtype: torch.dtype) -> Prepared:
    """The network as the sampler calls it."""
    timesteps = loop_gate.timesteps(case).to(case.device)
    model = network.place(networks.build(case.network), torch.device(case.device), dtype)
    form = sampling_networks(model, timesteps, want=Want.NOW if case.compiles else Want.NEVER, strict=True)(case.batch)
    labels = networks.labels(case.network, case.batch, case.device)
    form.load(labels)
    x = _input(case, dtype).to(memory_format=form.memory_format)
    t = torch.empty(case.batch, dtype=timesteps.dtype, device=case.device)
    row = torch.zeros(1, dtype=torch.int64, device=case.device)

    def call(i: int) -> Tensor:
        row.fill_(i)
        torch.index_select(timesteps, 0, row.expand(case.batch), out=t)
        return network.unwrap(form(x, t, row, {"class_labels": labels}))

    return _prepared(case, call)


def cases(device: str, smoke: bool) -> list[Case]:
    """Ho et al.'s CIFAR-10 network, and the small one."""
    if smoke:
        return [Case("unet", 2, networks.shape("tiny"), "tiny", 3, device=device)]
    sizes = [("cifar10", 1), ("cifar10", 4), ("cifar10", 16), ("digits", 16)]
    return [Case("unet", batch, networks.shape(name), name, 20, device=device) for name, batch in sizes]


@functools.lru_cache(maxsize=4)
def _expected(case: Case) -> Tensor:
    x = _input(case).cpu()[loop_gate.kept(case)]
    return torch.stack([loop_gate.reference_eps(case, x, t) for t in loop_gate.timesteps(case).tolist()])


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """eps at every timestep against the plain float32 network on the CPU; the worst one counts."""
    expected, tolerance = _expected(case), provider.tolerance or gate.network(provider.dtype, case.device)
    what = f"eps at {len(expected)} timesteps against float32"
    pairs = zip(found["eps"], expected, strict=True)
    return gate.all_of(*(gate.close(value, eps, tolerance, what) for value, eps in pairs))


_BF16 = torch.bfloat16

BENCHMARK = Benchmark(
    name="unet",
    title="The network alone",
    providers=(
        Provider("diffusers", lambda c: _module(c, diffusers.network(c)), needs=diffusers.NEEDS),
        Provider("diffusers, tuned", lambda c: _tuned(c, torch.float32), "float32", diffusers.NEEDS, True),
        Provider("diffusers, tuned, bf16", lambda c: _tuned(c, _BF16), "bfloat16", diffusers.NEEDS, True),
        Provider("PyTorch", _module),
        Provider("PyTorch, compiled", lambda c: _module(c, frozen=True), compiled=True),
        *openvino.providers(lambda c, predict: _predicting(c, predict, _input(c))),
        Provider("fastddpm", lambda c: _fastddpm(c, torch.float32), compiled=True),
        Provider("fastddpm, bf16", lambda c: _fastddpm(c, _BF16), "bfloat16", compiled=True),
    ),
    cases=cases,
    check=check,
    isolated=True,
    second={"float32": "diffusers, tuned", "bfloat16": "diffusers, tuned, bf16"},
)
