"""Seconds for 16 digits: diffusers' 1000 steps, few of its best schedulers, and few steps of this library.

`python -m fastddpm.benchmarks.few_steps` prints README's table; both libraries run the shipped model, float32, warm, in
interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness.clock import CpuClock
from fastddpm.benchmarks.start import diffusers_loop

from fastddpm.sampling.network import diffusion_of
from fastddpm.sampling.sample import table_for
from fastddpm.sampling.sampler import Sampler
from fastddpm.unet.load import SHIPPED, load

BATCH = 16
# The fewest of either library that draw what DDPM's 1000 steps draw: the model's card.
FEWEST: dict[str, Any] = {"tau": 0.3, "timesteps": [999, 720, 480, 300, 140]}


def providers(many: int) -> dict[str, Callable[[], object]]:
    """Each row of the table, and what draws it."""

    def theirs(scheduler: str, steps: int, **options: Any) -> Callable[[], object]:
        return diffusers_loop(SHIPPED / "digits", BATCH, scheduler=scheduler, steps=steps, **options)

    def ours(name: str, compile: bool, **options: Any) -> Callable[[], object]:
        model = load("digits")
        table = table_for(name, model, diffusion_of(model), **options)
        sampler = Sampler(model, table, (1, 32, 32), compile=compile)
        return lambda: sampler.sample(seeds=range(BATCH), class_labels=torch.arange(BATCH) % 10)

    return {
        f"diffusers, DDPMScheduler, {many} steps": theirs("DDPMScheduler", many),
        "diffusers, UniPCMultistepScheduler, 8 steps": theirs(
            "UniPCMultistepScheduler", 8, solver_order=3, timestep_spacing="trailing"
        ),
        "diffusers, SASolverScheduler, 7 steps": theirs(
            "SASolverScheduler", 7, timestep_spacing="trailing", tau_func=lambda t: 0.5
        ),
        "fastddpm, fast, uncompiled": ours("fast", False),
        "fastddpm, fast, compiled": ours("fast", True),
        "fastddpm, sa_solver at 5 timesteps, uncompiled": ours("sa_solver", False, **FEWEST),
        "fastddpm, sa_solver at 5 timesteps, compiled": ours("sa_solver", True, **FEWEST),
        "fastddpm, tuned, uncompiled": ours("tuned", False),
        "fastddpm, tuned, compiled": ours("tuned", True),
    }


def measure(many: int, rounds: int, inner: int) -> dict[str, list[float]]:
    """Seconds of each provider: the first once a round, the others `inner` times."""
    clocks = {name: CpuClock(draw, 0.0) for name, draw in providers(many).items()}
    slow, *short = clocks
    for name in short:
        clocks[name].time()
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    for name in [slow, *short * inner] * rounds:
        seconds[name].append(clocks[name].time())
    return seconds


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fastddpm.benchmarks.few_steps", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--inner", type=int, default=7, help="times that the short loops run in a round")
    parser.add_argument("--many", type=int, default=1000, help="steps of the long loop")
    options = parser.parse_args(arguments)
    medians = {k: statistics.median(v) for k, v in measure(options.many, options.rounds, options.inner).items()}
    slowest = next(iter(medians.values()))
    for name, seconds in medians.items():
        print(f"{name}: {seconds:.3f} s, {slowest / seconds:.0f} times")


if __name__ == "__main__":
    main()
