"""The samplers by name: from what a network was trained for to the table that samples from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.ddim import ddim_table
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.dpm_solver import dpm_solver_table
from fastddpm.tables.table import Table

SAMPLERS: dict[str, Callable[..., Table]] = {
    "ddpm": ddpm_table,
    "ddim": ddim_table,
    "dpm++2m": dpm_solver_table,
}


def make_table(
    name: str,
    config: DiffusionConfig,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    **options: Any,
) -> Table:
    """Build the table of a named sampler for a network trained under `config`.

    Args:
        name: one of `SAMPLERS`: "ddpm", "ddim", "dpm++2m".
        config: schedule, prediction type, variance type and clip range of the network.
        steps: how many timesteps to visit; all T by default.
        timesteps: the timesteps themselves, strictly descending, instead of `steps`.
        options: further keywords of the builder (eta, spacing, clip_range, ...), which override the config's.

    Raises:
        ValueError: the name is unknown, or an option is out of range.
        TypeError: the builder has no such option.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    defaults: dict[str, Any] = {"prediction_type": config.prediction_type, "clip_range": config.clip_range}
    if name == "ddpm":
        defaults["variance_type"] = config.variance_type
    else:
        defaults["learned"] = config.variance_type in ("learned", "learned_range")
    return SAMPLERS[name](config.schedule(), steps=steps, timesteps=timesteps, **{**defaults, **options})
