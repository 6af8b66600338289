"""The samplers by name: from what a network was trained for to the table that samples from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from fastddpm.checks import number
from fastddpm.schedules.diffusion import LEARNED, DiffusionConfig
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.deis import deis_table, ipndm_table
from fastddpm.tables.dpm_solver import dpm_solver_table
from fastddpm.tables.euler import euler_ancestral_table, euler_table, heun_table
from fastddpm.tables.names import canonical
from fastddpm.tables.repaint import repaint_table
from fastddpm.tables.sa_solver import sa_solver_table
from fastddpm.tables.table import Table
from fastddpm.tables.unipc import unipc_table

# Where the figures that a model's card shows no longer differ from those of many steps: docs/samplers.md.
FAST_STEPS, FAST_STEPS_GUIDED = 8, 10

SAMPLERS: dict[str, Callable[..., Table]] = {
    "ddpm": ddpm_table,
    "ddim": ddim_table,
    "unipc3": unipc_table,
    "unipc2": partial(unipc_table, order=2),
    "dpm++2m": dpm_solver_table,
    "dpm++3m": partial(dpm_solver_table, order=3),
    "dpm++2m_sde": partial(dpm_solver_table, tau=1.0),
    "dpm++3m_sde": partial(dpm_solver_table, order=3, tau=1.0),
    "sa_solver": sa_solver_table,
    "deis": deis_table,
    "ipndm": ipndm_table,
    "heun": heun_table,
    "euler": euler_table,
    "euler_a": euler_ancestral_table,
}
_UNCLIPPED = ("deis", "ipndm")


def make_table(
    name: str,
    config: DiffusionConfig,
    *,
    steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    guided: bool = False,
    strength: float = 1.0,
    **options: Any,
) -> Table:
    """Build the table of a named sampler for a network trained under `config`.

    Args:
        name: one of `fastddpm.tables.names.NAMES`, or of their aliases. "fast" is UniPC of order 3 with 8 steps, or of
            order 2 with 10 where `guided`.
        config: schedule, prediction type, variance type and clip range of the network.
        steps: how many steps to take; all T by default, except for "fast".
        timesteps: the timesteps themselves, strictly descending, instead of `steps`.
        guided: the table is for classifier-free guidance.
        strength: the share of the steps that is kept, from the end, in (0, 1], as in diffusers: int(strength n) of n,
            but one at least. What is left begins like a table of its own, a multistep method at first order.
        options: further keywords of the builder (eta, spacing, clip_range, ...), which override the config's; and
            jump_length and jump_n_sample, of `fastddpm.tables.repaint.repaint_table`.

    Raises:
        ValueError: the name is unknown, or an option is out of range.
        TypeError: the builder has no such option.
    """
    name = canonical(name)
    if name == "tuned":
        raise ValueError("tuned tables belong to a model: use fastddpm.sample(model, sampler='tuned')")
    if name == "fast":
        name = "unipc2" if guided else "unipc3"
        if steps is None and timesteps is None and "sigmas" not in options:
            steps = min(FAST_STEPS_GUIDED if guided else FAST_STEPS, config.num_timesteps)
    defaults: dict[str, Any] = {"prediction_type": config.prediction_type}
    if name not in _UNCLIPPED:
        defaults["clip_range"] = config.clip_range
    if name == "ddpm":
        defaults["variance_type"] = config.variance_type
    else:
        defaults["learned"] = config.variance_type in LEARNED
    build, options = partial(SAMPLERS[name], config.schedule()), {**defaults, **options}
    jumps = {name: options.pop(name) for name in ("jump_length", "jump_n_sample") if name in options}
    strength = number("strength", strength, gt=0.0, le=1.0)
    table = build(steps=steps, timesteps=timesteps, **options)
    if strength < 1.0:
        visited = table.timesteps.unique_consecutive()
        # A product such as 0.29 * 100 may fall just short of the integer that it means.
        skipped = len(visited) - max(1, int(strength * len(visited) + 1e-9))
        # Options with a value for each step: sigmas, tau, eps_square.
        per_step = {k: v for k, v in options.items() if isinstance(v, Sequence | Tensor) and not isinstance(v, str)}
        tails = {name: values[skipped:] for name, values in per_step.items()}
        table = build(timesteps=visited[skipped:], **{**options, **tails})
    return repaint_table(table, **jumps) if jumps else table
