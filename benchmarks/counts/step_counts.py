"""What a step costs beside the network: operations, image-sized ones, bytes, reads by the host. Counted, not timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fastddpm.benchmarks.counts.counting import Counts, OpCounter, count
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.harness.inputs import MIDDLE, Coefficients, T, gaussian, schedule
from fastddpm.benchmarks.peers import lucidrains
from torch import Tensor, nn

from fastddpm.sampling.request import StepKey
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step import StaticStep
from fastddpm.tables.ddpm import ddpm_table

CASE = Case("p_sample", 4, (3, 32, 32))


class _Network:
    """Returns a tensor that is there already."""

    memory_format = torch.contiguous_format

    def __init__(self, m: Tensor) -> None:
        self._m = m

    def load(self, class_labels: Tensor | None) -> None:
        """No labels."""

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        return self._m


def measure(*, smoke: bool = False) -> list[dict[str, Any]]:
    """Count one step of each on the CPU; rows with a "note" for who is not installed."""
    rows = []
    for name, needs, build in (
        ("PyTorch", (), _pytorch),
        ("diffusers DDPMScheduler.step", ("diffusers",), lambda: _diffusers("DDPMScheduler")),
        ("diffusers DDIMScheduler.step", ("diffusers",), lambda: _diffusers("DDIMScheduler")),
        ("lucidrains p_sample", tuple(lucidrains.NEEDS), _lucidrains),
    ):
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            rows.append({"who": name, "note": f"not installed: {', '.join(missing)}"})
        else:
            rows.append(_row(name, count(build(), CASE.n_elements)))
    rows.append(_row("fastddpm, eager twin", _fastddpm(compiled=False)))
    if not smoke:
        # No dispatch mode sees what the code that Inductor made of the twin reads and writes.
        rows.append(_row("fastddpm", _fastddpm(compiled=True)) | {"images_read": None, "images_written": None})
    return rows


def _row(name: str, counts: Counts) -> dict[str, Any]:
    image = 4 * CASE.n_elements
    return {
        "who": name,
        "calls": counts.calls,
        "operations": counts.operations,
        "large": counts.large,
        "images_read": counts.bytes_read / image,
        "images_written": counts.bytes_written / image,
        "host_reads": counts.host_reads,
    }


def _given() -> tuple[Tensor, Tensor]:
    return gaussian(1, CASE.full_shape), gaussian(2, CASE.full_shape)


def _pytorch() -> Callable[[], Any]:
    x_t, m = _given()
    table, t = Coefficients.of(schedule(), "cpu"), torch.full((CASE.batch,), MIDDLE)
    return lambda: table.p_sample(x_t, m, t, torch.randn_like(x_t))


def _diffusers(name: str) -> Callable[[], Any]:
    """As its pipeline calls it, with a generator."""
    x_t, m = _given()
    scheduler: Any = getattr(importlib.import_module("diffusers"), name)(num_train_timesteps=T)
    scheduler.set_timesteps(T)
    t = scheduler.timesteps[T - 1 - MIDDLE]
    generator = torch.Generator().manual_seed(0)
    return lambda: scheduler.step(m, t, x_t, generator=generator).prev_sample


def _lucidrains() -> Callable[[], Any]:
    x_t, m = _given()

    class Given(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return m

    diffusion = lucidrains.diffusion(CASE, Given(), T)
    return lambda: diffusion.p_sample(x_t, MIDDLE)


def _fastddpm(*, compiled: bool) -> Counts:
    """All of the sampler's step but the network, on the CPU; counted inside the operator too."""
    _, m = _given()
    table = ddpm_table(schedule())
    sampler = Sampler(lambda x, t: m, table, CASE.shape, device="cpu", compile=compiled)
    step = StaticStep(StepKey(CASE.batch), _Network(m), table, sampler.options)
    sampler.reverse_step(step)
    with OpCounter(CASE.n_elements) as counter:
        sampler.reverse_step(step)
    return counter.counts
