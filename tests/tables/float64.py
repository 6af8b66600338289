"""Tables executed in float64, the bridge between the papers' form and the float32 rows; and what goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastddpm.tables.table import HISTORY, Table

# What diffusers calls the prediction types.
DIFFUSERS_TYPES = {"epsilon": "epsilon", "x_0": "sample", "v": "v_prediction"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def linear_model(x: Tensor, t: Tensor) -> Tensor:
    """Depend on x, on its neighbours and on t, without saturating."""
    return 0.6 * x + 0.2 * x.roll(1, dims=-1) + t.reshape(-1, *[1] * (x.dim() - 1)) / 2000 - 0.2


def execute_row64(
    table: Table, r: int, x_t: Tensor, output: Tensor, z: Tensor | None = None, history: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Execute row r of a table in float64 as `fastddpm.tables.table` defines it; return x_prev and x0.

    Args:
        table: any table without guidance.
        r: the row, in order of execution.
        x_t: [B, ...] float64.
        output: [B, ...] float64, the network's output; [B, 2C, ...] for a learned variance.
        z: [B, ...] float64; may be left out where the row's sigma is 0.
        history: the x0 of the rows before, the newest first, float64; needed where a coefficient is not 0.
    """
    a, b, lo, hi, c_x0, c_xt, c_m, _, sigma, h0, h1, *_ = table.rows64[r].tolist()
    m, v = output.chunk(2, dim=1) if table.learned else (output, None)
    x0 = a * x_t + b * m
    if table.clip:
        x0 = x0.clamp(lo, hi)
    x_prev = c_x0 * x0 + c_xt * x_t
    if table.use_m:
        x_prev = x_prev + c_m * m
    for k, name in enumerate(HISTORY[: table.history]):
        c = float(table.column(name)[r])
        if c != 0.0:
            assert k < len(history), f"row {r} needs x0_{k + 1}"
            x_prev = x_prev + c * history[k]
    if sigma != 0.0:
        assert z is not None, f"row {r} needs z"
        std = sigma if v is None else sigma * torch.exp(h0 + h1 * v)
        x_prev = x_prev + std * z
    return x_prev, x0


def states64(
    table: Table, model: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, z: Sequence[Tensor] | None = None
) -> Iterator[Tensor]:
    """Execute the rows of a table in float64 around model(x, t), and yield each state; z: one noise tensor per row."""
    x = x_T
    history: list[Tensor] = []
    for r, t in enumerate(table.timesteps):
        output = model(x, t.expand(len(x)))
        x, x0 = execute_row64(table, r, x, output, None if z is None else z[r], history)
        history = [x0, *history][: table.history]
        yield x


def execute_table64(
    table: Table, model: Callable[[Tensor, Tensor], Tensor], x_T: Tensor, z: Sequence[Tensor] | None = None
) -> Tensor:
    """Return the last of `states64`."""
    *_, x = states64(table, model, x_T, z)
    return x
