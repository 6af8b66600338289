"""Benchmark: settings of the sampler's loop on CUDA, one turned at a time; which of them should be the default?

Not among them: x_in of eight channels, for tensor cores. It would save what cuDNN puts before one convolution, at most
one launch of 144 and 0.01 % of the bytes (`fastddpm inspect --model cifar10`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from fastddpm.benchmarks.bench_sampling import fastddpm_loop
from fastddpm.benchmarks.harness import loop_gate
from fastddpm.benchmarks.harness.case import Benchmark, Case, Prepared, Provider
from fastddpm.benchmarks.peers import networks
from torch import Tensor

from fastddpm.diagnostics.lowering import replaced
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step import StaticStep
from fastddpm.sampling.step_pool import StepPool
from fastddpm.unet.forms import use_subpixels
from fastddpm.unet.inference import Form, cuda_form
from fastddpm.unet.unet import UNet


def _with(**options: Any) -> Callable[[Case], Prepared]:
    return lambda case: fastddpm_loop(case, torch.bfloat16, **options)


def _within(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[Case], Prepared]:
    """The loop with something else about PyTorch or the library, from its first call on."""

    def build(case: Case) -> Prepared:
        # On a CPU, to see that it runs: what is compiled there takes no part in these settings.
        prepared = fastddpm_loop(case, torch.bfloat16, compile=case.device == "cuda")

        def inside(call: Callable[[], Any]) -> Any:
            with context():
                return call()

        return Prepared(lambda: inside(prepared.run), lambda: inside(prepared.evaluate))

    return build


def _cudnn_benchmark() -> AbstractContextManager[Any]:
    """Have cuDNN time its convolutions when the first call meets their shapes, and take the fastest."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=torch.backends.cudnn.allow_tf32)


def _subpixels() -> AbstractContextManager[Any]:
    """Convolve pixels before they are upsampled, as compiled code for a CPU does."""

    def form(unet: UNet, fuse: bool) -> Form:
        made = cuda_form(unet, fuse)
        use_subpixels(made.form)
        return made

    return replaced({"fastddpm.unet.inference.cuda_form": form})


def _one_graph(case: Case) -> Prepared:
    """All steps of a run in one graph, by which only launches gain; its gate is the run step by step, to the bit."""
    one, replay, turns = Sampler.reverse_step, StepPool.replay, itertools.count()

    def all_steps(step: StaticStep) -> None:
        for _ in range(case.steps):
            one(step)

    def first_only(pool: StepPool, step: StaticStep) -> None:
        if next(turns) % case.steps == 0:
            replay(pool, step)

    plain = fastddpm_loop(case, torch.bfloat16)
    with replaced({"fastddpm.sampling.sampler.Sampler.reverse_step": staticmethod(all_steps)}):
        whole = fastddpm_loop(case, torch.bfloat16)

    def run() -> Any:
        with replaced({"fastddpm.sampling.step_pool.StepPool.replay": first_only}):
            return whole.run()

    def evaluate() -> dict[str, Tensor]:
        assert torch.equal(run(), plain.run()), "the steps of one graph differ from those of several"
        return plain.evaluate()

    return Prepared(run, evaluate)


def cases(device: str, smoke: bool) -> list[Case]:
    """Ho et al.'s CIFAR-10 network where launches, half-filled waves and bandwidth bind; a small one; none on a CPU."""
    if smoke:
        return [Case("settings", 2, networks.shape("tiny"), "tiny", 3, device=device)]
    loops = [("cifar10", 1), ("cifar10", 16), ("cifar10", 256), ("digits", 1)] if device == "cuda" else []
    return [Case("settings", batch, networks.shape(name), name, 20, device=device) for name, batch in loops]


def _large(case: Case) -> str | None:
    return "of a small network only launches matter" if case.network == "digits" else None


def _fused(case: Case) -> str | None:
    return _large(case) if case.device == "cuda" else "the fused normalisation is for CUDA"


def _small(case: Case) -> str | None:
    return "a graph's launch hides behind a large network" if case.network == "cifar10" else None


BENCHMARK = Benchmark(
    name="settings",
    title="Settings of the loop",
    providers=(
        Provider("fastddpm", _with(), "bfloat16", compiled=True),
        Provider("fastddpm, no CUDA graph", _with(cuda_graph=False), "bfloat16", compiled=True, skips=_large),
        Provider("fastddpm, cudnn.benchmark", _within(_cudnn_benchmark), "bfloat16", compiled=True, skips=_large),
        Provider("fastddpm, sub-pixels", _within(_subpixels), "bfloat16", compiled=True, skips=_large),
        Provider("fastddpm, one graph a run", _one_graph, "bfloat16", compiled=True, skips=_small),
        Provider("fastddpm, fused norms", _with(norm="fused"), "bfloat16", compiled=True, skips=_fused),
        Provider("fastddpm, not compiled", _with(compile=False), "bfloat16", skips=_large),
    ),
    cases=cases,
    check=loop_gate.check,
    isolated=True,
)
