"""SA-Solver as a table: stochastic Adams' predictor and corrector (Xue et al. 2023, arXiv:2309.05019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from fastddpm.checks import integer, number
from fastddpm.schedules.levels import Levels
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.multistep import RULES, multistep_columns
from fastddpm.tables.solver import SolverOptions, solver_table
from fastddpm.tables.table import Table


def sa_solver_table(
    schedule: Schedule,
    *,
    order: int = 2,
    corrector_order: int = 2,
    tau: float | Sequence[float] = 1.0,
    lower_order_final: bool = True,
    **options: Unpack[SolverOptions],
) -> Table:
    """Tabulate the SA-Predictor with the SA-Corrector (Algorithm 1): the correction is in the next row.

    Steps with two nodes have the moment of the authors' code, which is exact to the method's order.

    Args:
        order: how many estimates of x_0 a prediction reads: 1 to 4 without a corrector, 1 to 3 with one.
        corrector_order: how many a correction reads, the newest included: 1 to 4; 0 for no correction.
        tau: how stochastic the process is, for all steps or each: 0 for the ODE, 1 for the reverse SDE.
        lower_order_final: lower the orders towards the last step.
        schedule, options: as the result and the errors, those of `solver_table`.
    """
    integer("corrector_order", corrector_order, 0, 4)
    integer("order", order, 1, 3 if corrector_order else 4)
    taus = [tau] if isinstance(tau, (int, float)) else list(tau)
    taus = [number(f"tau[{i}]", value, ge=0.0) for i, value in enumerate(taus)]

    def columns(levels: Levels) -> dict:
        n = len(levels.timesteps)
        if len(taus) not in (1, n):
            raise ValueError(f"tau must be one number or {n}, one for each step; got {len(taus)}")
        return multistep_columns(
            levels,
            order,
            corrector=corrector_order - 1 if corrector_order else None,
            tau=taus if len(taus) == n else taus * n,
            rule=RULES["bh1"],
            falling=lower_order_final,
        )

    return solver_table("sa_solver", schedule, options, columns)
