"""What a type checker sees in a user's code; `mypy` checks this file, and an ignore that is not needed is an error."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

import fastddpm
from fastddpm import Sampler, Schedule, ddpm_table
from fastddpm.sampling.sampler import StepResult


def network(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def draw() -> None:
    sampler = Sampler(network, ddpm_table(Schedule.linear(), steps=4), (2,), compile=False)
    assert_type(sampler.sample(seeds=[1, 2]), Tensor)
    assert_type(sampler.sample(seed=1, batch_size=2, return_x0=True), tuple[Tensor, Tensor])
    for result in sampler.steps(x_T=torch.zeros(2, 2), seeds=[1, 2]):
        assert_type(result.x0, Tensor)
    assert_type(fastddpm.sample(network, (2,), seeds=[1], steps=4, device="cpu", compile=False), Tensor)


def watch(result: StepResult[None]) -> None:
    assert_type(result.x0, None)


def mistakes() -> None:
    sampler = Sampler(network, ddpm_table(Schedule.linear(), steps=4), (2,))
    sampler.sample(seedz=[1])  # type: ignore[call-overload]
    sampler.steps(seeds="one")  # type: ignore[arg-type]
    sampler.warmup(batch=2)  # type: ignore[call-arg]
    fastddpm.sample(network, (2,), seeds=[1], complie=False)  # type: ignore[call-arg]
    sampler.sample(seeds=[1], callback=watch, return_x0=True)  # type: ignore[call-overload]
