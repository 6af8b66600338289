"""What all solvers have in common: their options, and the columns that read x_0 or eps off the network's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from torch import Tensor

from fastddpm.checks import nearest
from fastddpm.schedules.levels import Levels, noise_levels
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import eps_coefficients, x0_coefficients
from fastddpm.tables.table import HISTORY, Table, level_rows, make_rows


class SolverOptions(TypedDict, total=False):
    """The options of every solver: those of `fastddpm.schedules.levels.noise_levels`, and the three at the end.

    prediction_type: what the network returns: "epsilon" (default), "x_0" or "v".
    clip_range: x_0 is clipped to [-clip_range, clip_range] (default 1); None switches clipping off.
    learned: the network was trained with a learned variance: the second half of its output is ignored.
    """

    steps: int | None
    timesteps: Sequence[float] | Tensor | None
    sigmas: Sequence[float] | Tensor | None
    spacing: str
    steps_offset: int
    final: Literal["zero", "sigma_min"]
    prediction_type: str
    clip_range: float | None
    learned: bool


def solver_table(
    name: str,
    schedule: Schedule,
    options: Mapping[str, Any],
    columns: Callable[[Levels], dict[str, Tensor]],
    estimate: Literal["x_0", "eps"] = "x_0",
    rows: Callable[[Levels], tuple[Tensor, Tensor]] = lambda levels: (levels.timesteps, levels.alphas_cumprod[:-1]),
) -> Table:
    """Build a solver's table: the levels that the options ask for, and the solver's columns for them.

    Every solver has a builder, which takes the schedule that the network was trained with, keywords of its own and
    `SolverOptions`; what it returns and raises stands here.

    Args:
        name: of the table.
        schedule: the schedule the network was trained with.
        options: those of `SolverOptions`.
        columns: from the levels to c_xt, c_x0, c_1 ... and sigma.
        estimate: what the solver interpolates, and what the rows keep. eps is not clipped.
        rows: from the levels to each row's timestep and alpha_bar, where a step is more than one row.

    Returns:
        A table of one row per step, unless `rows` says otherwise; deterministic where the solver draws no noise.

    Raises:
        ValueError: an argument is unknown or out of range; the rows keep x_0 and epsilon is predicted where
            alpha_bar = 0, or they keep eps and alpha_bar is 0 at a level or clip_range is given.
        TypeError: there is no such option.
    """
    for option in options:
        if option not in SolverOptions.__annotations__:
            near = nearest(option, SolverOptions.__annotations__)
            raise TypeError(f"{name} has no option {option!r}" + (f"; did you mean {near!r}?" if near else ""))
    chosen = dict(options)
    prediction_type = chosen.pop("prediction_type", "epsilon")
    learned = chosen.pop("learned", False)
    clip_range = chosen.pop("clip_range", 1.0 if estimate == "x_0" else None)
    if estimate == "eps" and clip_range is not None:
        raise ValueError(f"{name} keeps eps, and x_0 cannot be clipped; got clip_range = {clip_range!r}, use None")
    levels = noise_levels(schedule, **chosen)
    coefficients = x0_coefficients if estimate == "x_0" else eps_coefficients
    timesteps, alpha_bar = rows(levels)
    a, b = coefficients(alpha_bar, prediction_type)
    values = columns(levels)
    used = [k + 1 for k, column in enumerate(HISTORY) if (values.get(column, a.new_zeros(1)) != 0).any()]
    return Table(
        make_rows(len(a), clip_range, a=a, b=b, **values),
        timesteps,
        name=name,
        clip=clip_range is not None,
        learned=learned,
        history=max(used, default=0),
        estimate=estimate,
        levels=level_rows(alpha_bar, levels.alphas_cumprod[-1:]),
    )
