"""UniPC as a table: a predictor and a corrector of one network call a step (Zhao et al. 2023, arXiv:2302.04867)."""

from __future__ import annotations

from typing import Unpack

from fastddpm.checks import integer, one_of
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.multistep import RULES, multistep_columns
from fastddpm.tables.solver import SolverOptions, solver_table
from fastddpm.tables.table import Table


def unipc_table(
    schedule: Schedule,
    *,
    order: int = 3,
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    **options: Unpack[SolverOptions],
) -> Table:
    """Tabulate UniP-p with UniC-p (Algorithms 5 to 8, for the network's x_0): the correction is in the next row.

    Args:
        order: p, 1 to 3; 2 is usual with guidance.
        variant: "bh1" (B(h) = h) or "bh2" (B(h) = exp(h) - 1). They differ in steps with two nodes alone.
        corrector: False for UniP without UniC.
        lower_order_final: lower the order towards the last step.
        schedule, options: as the result and the errors, those of `solver_table`.
    """
    integer("order", order, 1, 3)
    rule = RULES[one_of("variant", variant, ("bh1", "bh2"))]
    older = order if corrector else None
    return solver_table(
        f"unipc{order}",
        schedule,
        options,
        lambda levels: multistep_columns(levels, order, corrector=older, rule=rule, falling=lower_order_final),
    )
