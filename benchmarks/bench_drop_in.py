"""Benchmark: each drop-in beside its original, one step and a whole loop, on the same draws of torch's generators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness import gate, inputs
from fastddpm.benchmarks.harness.case import NOT_ASKED, Benchmark, Case, Check, Prepared, Provider, not_installed
from fastddpm.benchmarks.harness.inputs import MIDDLE, T
from fastddpm.benchmarks.peers import diffusers, lucidrains, networks
from torch import Tensor

from fastddpm.integrations import accelerate

# One call of the original, or of what `accelerate` made of it; the seed is that of the generator it draws from.
Call = Callable[[int], Tensor]
# The fast form of an object: itself for the original.
Form = Callable[[Any], Any]

# prev_sample of one step; a loop's images, whose network rounds differently where it is compiled.
_STEP_TOLERANCE, _LOOP_TOLERANCE = 1e-6, 1e-3


def _scheduler_step(case: Case, form: Form) -> Call:
    x_t, m = inputs.state_and_output(case)
    scheduler = form(diffusers.scheduler(case.original.removesuffix(".step")))
    scheduler.set_timesteps(T)
    t = scheduler.timesteps[T - 1 - MIDDLE]
    generator = torch.Generator(case.device)
    return lambda seed: scheduler.step(m, t, x_t, generator=generator.manual_seed(seed)).prev_sample


def _pipeline(case: Case, form: Form) -> Call:
    pipe = form(diffusers.pipeline(case, prediction_type="v_prediction"))
    return functools.partial(diffusers.images, case, pipe)


def _lucidrains_step(case: Case, form: Form) -> Call:
    x_t, m = inputs.state_and_output(case)
    diffusion = form(lucidrains.diffusion(case, lambda x, t: m, T))

    def call(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return diffusion.p_sample(x_t, MIDDLE)[0]

    return call


def _lucidrains_loop(case: Case, form: Form) -> Call:
    diffusion = form(lucidrains.diffusion(case, networks.labelled(case), case.steps, "sigmoid", "pred_v").eval())

    def call(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return lucidrains.sample_loop(diffusion, case)

    return call


# How each is built, and the packages that it needs.
_STEPS = {
    "DDPMScheduler.step": (_scheduler_step, diffusers.NEEDS),
    "DDIMScheduler.step": (_scheduler_step, diffusers.NEEDS),
    "lucidrains.p_sample": (_lucidrains_step, lucidrains.NEEDS),
}
_LOOPS = {
    "DDPMPipeline": (_pipeline, diffusers.NEEDS),
    "DDIMPipeline": (_pipeline, diffusers.NEEDS),
    "lucidrains.p_sample_loop": (_lucidrains_loop, lucidrains.NEEDS),
}


def cases(device: str, smoke: bool) -> list[Case]:
    """A step of small images, and the shipped model's whole loop; OpenAI's packages are on no index."""
    network, batch, steps = ("tiny", 2, 3) if smoke else ("digits", 16, 20)
    found = [Case("drop_in", batch, (3, 32, 32), device=device, original=name) for name in _STEPS]
    for name in _LOOPS:
        sampler = "ddim" if name == "DDIMPipeline" else "ddpm"
        found.append(Case("drop_in", batch, networks.shape(network), network, steps, sampler, device, original=name))
    return found


def _prepared(case: Case, form: Form) -> Prepared:
    build, _ = (_STEPS | _LOOPS)[case.original]
    call = build(case, form)
    return Prepared(lambda: call(0), lambda: {"x": call(1).float().cpu()})


def _compiled(case: Case) -> Prepared:
    return _prepared(case, functools.partial(accelerate, compile=case.compiles))


def _why_not(case: Case) -> str | None:
    return not_installed((_STEPS | _LOOPS)[case.original][1])


def _compiles(case: Case) -> str | None:
    return _why_not(case) if case.network else NOT_ASKED


@functools.lru_cache(maxsize=2)
def _expected(case: Case) -> Tensor:
    with torch.random.fork_rng():
        return _prepared(case, lambda original: original).evaluate()["x"]


def check(case: Case, provider: Provider, found: dict[str, Tensor]) -> Check:
    """The original's result from the same generator."""
    tolerance = _LOOP_TOLERANCE if case.network else _STEP_TOLERANCE
    return gate.close(found["x"], _expected(case), tolerance, "result against the original's from the same generator")


BENCHMARK = Benchmark(
    name="drop_in",
    title="Drop-ins beside their originals",
    providers=(
        Provider("original", lambda case: _prepared(case, lambda original: original), skips=_why_not),
        Provider("fastddpm", lambda case: _prepared(case, accelerate), skips=_why_not),
        Provider("fastddpm, compiled", _compiled, compiled=True, skips=_compiles),
    ),
    cases=cases,
    check=check,
)
