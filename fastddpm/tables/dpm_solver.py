"""DPM-Solver++ of orders 1 to 3 and its SDE form as tables (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

from typing import Unpack

from fastddpm.checks import integer, number, one_of
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.multistep import RULES, multistep_columns
from fastddpm.tables.solver import SolverOptions, solver_table
from fastddpm.tables.table import Table

# Below this many steps the last ones are of lower order (diffusers' lower_order_final).
FEW_STEPS = 15


def dpm_solver_table(
    schedule: Schedule,
    *,
    order: int = 2,
    tau: float = 0.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    **options: Unpack[SolverOptions],
) -> Table:
    """Tabulate x_i = sigma_i / sigma_{i-1} x_{i-1} - alpha_i (exp(-h_i) - 1) D_i, for the diffusion ODE in lambda.

    Order 2 (Algorithm 2): D_i = x_0(x_{i-1}) + (x_0(x_{i-1}) - x_0(x_{i-2})) / (2 r_i), r_i = h_{i-1} / h_i. Order 1 is
    DDIM, and so is the first row. Order 3 is that of the authors' code, k-diffusion and diffusers, which count the
    second difference by half; with order 1 at tau = 1 it is DDPM with the small variance.

    Args:
        order: 1, 2 or 3.
        tau: 0 for the ODE, 1 for the SDE form (diffusers' "sde-dpmsolver++"), or between.
        solver_type: "midpoint" (Algorithm 2) or "heun", which integrates the first difference exactly.
        lower_order_final: with fewer than 15 steps, lower the order towards the last one. A last step that ends
            without noise is of first order in any case.
        schedule, options: as the result and the errors, those of `solver_table`.
    """
    integer("order", order, 1, 3)
    number("tau", tau, ge=0.0)
    second = RULES["bh2" if one_of("solver_type", solver_type, ("midpoint", "heun")) == "midpoint" else "exact"]

    def published(w: list[float], H: float) -> list[float]:
        return [*w[:2], 0.5 * w[2]] if len(w) == 3 else second(w, H)

    return solver_table(
        f"dpm++{order}m{'_sde' if tau else ''}",
        schedule,
        options,
        lambda levels: multistep_columns(
            levels,
            order,
            tau=tau,
            rule=published,
            falling=lower_order_final and len(levels.timesteps) < FEW_STEPS,
        ),
    )
