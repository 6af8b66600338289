"""Benchmark: the whole sampling loop, from seeds or a generator to a batch of images.

Every case uses Ho et al.'s linear betas and takes the network's output as epsilon, whatever it was trained for: what is
timed is the same, and so is what the gate follows.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import torch
from fastddpm.benchmarks.harness import loop_gate
from fastddpm.benchmarks.harness.case import NOT_ASKED, Benchmark, Case, Prepared, Provider
from fastddpm.benchmarks.harness.inputs import schedule
from fastddpm.benchmarks.harness.loop_gate import Predict, Recorder
from fastddpm.benchmarks.peers import diffusers, lucidrains, networks, openvino
from fastddpm.benchmarks.peers.networks import compile_frozen
from torch import Tensor

from fastddpm.noise import v1 as noise
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.ops.draw import randn
from fastddpm.sampling.sampler import Sampler
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.ddpm import ddpm_table

_BF16 = torch.bfloat16


def _plain(case: Case, predict: Predict) -> Prepared:
    """The plain loop around any network."""
    generator = torch.Generator(case.device).manual_seed(0)

    def run() -> Tensor:
        with torch.no_grad():
            ((x, _),) = deque(loop_gate.plain_loop(case, predict, generator), maxlen=1)
        return x

    return Prepared(run, lambda: loop_gate.recorded(case, predict))


def _compiled(case: Case) -> Prepared:
    network = compile_frozen(networks.labelled(case))
    return _plain(case, lambda x, t: network(x.contiguous(memory_format=torch.channels_last), t))


def _diffusers(
    case: Case, dtype: torch.dtype = torch.float32, *, tuned: bool = False, mode: str | None = None
) -> Prepared:
    """DDPMPipeline or DDIMPipeline; tuned: its documented fast settings (dtype, channels_last, torch.compile)."""
    pipe = diffusers.pipeline(case, dtype, timestep_spacing=loop_gate.spacing(case))
    if tuned:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet.forward = compile_frozen(pipe.unet.forward, mode)
    return Prepared(lambda: diffusers.images(case, pipe, 0), lambda: _record_pipeline(case, pipe, dtype))


def _reduce_overhead(case: Case) -> Prepared:
    return _diffusers(case, _BF16, tuned=True, mode="reduce-overhead")


def _record_pipeline(case: Case, pipe: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the generator's numbers, then run with the scheduler's step under observation."""
    recorder, step = _drawn(case, torch.Generator(case.device).manual_seed(1), dtype), pipe.scheduler.step

    # DDIMPipeline looks the parameters of `step` up.
    @functools.wraps(step)
    def observed(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        recorder.state(result.prev_sample)
        return result

    pipe.scheduler.step = observed
    try:
        diffusers.images(case, pipe, 1)
    finally:
        del pipe.scheduler.step
    found = recorder.found()
    return found if dtype == torch.float32 else {**found, "16-bit state": torch.ones(())}


def _drawn(case: Case, generator: torch.Generator | None, dtype: torch.dtype = torch.float32) -> Recorder:
    """Note the x_T and z that a loop draws from a generator in this state, torch's own if None."""
    recorder = Recorder(case)
    for i in range(case.steps if case.sampler == "ddpm" else 1):
        numbers = torch.randn(case.full_shape, generator=generator, device=case.device, dtype=dtype)
        (recorder.noise if i else recorder.state)(numbers)
    return recorder


def _lucidrains(case: Case) -> Prepared:
    """p_sample_loop; lucidrains takes every timestep of its process, so that the process has `steps` of them."""
    diffusion = lucidrains.diffusion(case, networks.labelled(case), case.steps, "sigmoid")

    def evaluate() -> dict[str, Tensor]:
        torch.manual_seed(1)
        recorder = _drawn(case, None)
        torch.manual_seed(1)
        for x in lucidrains.sample_loop(diffusion, case, return_all_timesteps=True)[:, 1:].unbind(1):
            recorder.state(x)
        return {**recorder.found(), "betas": diffusion.betas.double().cpu()}

    return Prepared(lambda: lucidrains.sample_loop(diffusion, case), evaluate)


def fastddpm_loop(case: Case, dtype: torch.dtype, **options: Any) -> Prepared:
    """The sampler, its options as `Sampler` takes them."""
    if case.sampler == "ddim":
        table = ddim_table(schedule(), steps=case.steps, spacing=loop_gate.spacing(case), rederive_eps=False)
    else:
        table = ddpm_table(schedule(), steps=case.steps, spacing=loop_gate.spacing(case))
    model = networks.build(case.network)
    options = {"compile": case.compiles, **options}
    sampler = Sampler(model, table, case.shape, device=case.device, dtype=dtype, **options)
    labels = networks.labels(case.network, case.batch)
    seeds = list(range(case.batch))

    def run() -> Tensor:
        return sampler.sample(seeds=seeds, class_labels=labels)

    def evaluate() -> dict[str, Tensor]:
        recorder = Recorder(case)
        recorder.state(randn(case.full_shape, seeds=seeds, stream=noise.STREAM_X_T))
        sampler.sample(seeds=seeds, class_labels=labels, callback=lambda result: recorder.state(result.x_t))
        key, sample_id = resolve_seeds(seeds=seeds)
        n = case.n_elements // case.batch
        for i in range(case.steps if case.sampler == "ddpm" else 0):
            z = noise.normals(key, sample_id, torch.tensor([i]), noise.STREAM_REVERSE, n)
            recorder.noise(z.reshape(case.full_shape))
        return recorder.found()

    return Prepared(run, evaluate)


def cases(device: str, smoke: bool) -> list[Case]:
    """The bars' cases, DDIM, and a series over the number of steps."""

    def case(network: str, batch: int, steps: int = 20, sampler: str = "ddpm", *, sweep: bool = False) -> Case:
        return Case("sampling", batch, networks.shape(network), network, steps, sampler, device, sweep)

    if smoke:
        return [case("tiny", 2, 3), case("tiny", 1, 3, "ddim")]
    batches = (1, 4, 16) if device == "cpu" else (1, 16, 64, 256)
    series = [case("digits", 16, steps, sweep=True) for steps in (5, 10, 50)]
    return [*(case("cifar10", batch) for batch in batches), case("cifar10", 1, 20, "ddim"), case("digits", 16), *series]


def _cuda_only(case: Case) -> str | None:
    return NOT_ASKED if case.device != "cuda" else None


def _ddpm_only(case: Case) -> str | None:
    return NOT_ASKED if case.sampler != "ddpm" else None


_F32, _PEER = torch.float32, diffusers.NEEDS

BENCHMARK = Benchmark(
    name="sampling",
    title="Whole sampling loop",
    providers=(
        Provider("diffusers", _diffusers, needs=_PEER, sweep=True),
        Provider("diffusers, tuned", lambda c: _diffusers(c, _F32, tuned=True), "float32", _PEER, True),
        Provider("diffusers, tuned, bf16", lambda c: _diffusers(c, _BF16, tuned=True), "bfloat16", _PEER, True),
        Provider("diffusers, reduce-overhead, bf16", _reduce_overhead, "bfloat16", _PEER, True, _cuda_only),
        Provider("PyTorch", lambda c: _plain(c, networks.labelled(c)), skips=_ddpm_only),
        Provider("PyTorch, compiled", _compiled, compiled=True, skips=_ddpm_only),
        Provider("lucidrains", _lucidrains, needs=lucidrains.NEEDS, skips=_ddpm_only),
        *openvino.providers(_plain),
        Provider("fastddpm", lambda c: fastddpm_loop(c, _F32), compiled=True, sweep=True),
        Provider("fastddpm, bf16", lambda c: fastddpm_loop(c, _BF16), "bfloat16", compiled=True, sweep=True),
    ),
    cases=cases,
    check=loop_gate.check,
    isolated=True,
    second={"float32": "diffusers, tuned", "bfloat16": "diffusers, tuned, bf16"},
)
