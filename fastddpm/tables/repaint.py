"""RePaint's resampling: a table whose rows go up and down (Lugmayr et al. 2022, arXiv:2201.09865, section 4.2)."""

from __future__ import annotations

import dataclasses

import torch

from fastddpm.checks import integer
from fastddpm.tables.table import COLUMN, Table


def repaint_table(table: Table, *, jump_length: int = 10, jump_n_sample: int = 10) -> Table:
    """Walk through a table's rows with jumps back to more noise, so that what is drawn comes to fit what is known.

    At every `jump_length`-th state from the end, the data themselves too, the walk jumps up by that many rows,
    jump_n_sample - 1 times: x_up = c x + sqrt(s_up^2 - c^2 s^2) z, c = signal_up / signal (the paper's eq. 2 over
    several steps). Both that and the row before it are linear in Gaussian noise, so they are one row: a jump costs no
    network call of its own and no pass over memory, and x_up has the distribution of the two draws.

    Args:
        table: of one-step rows: no older x_0, no learned variance.
        jump_length: rows per jump (the paper's j), 1 or more.
        jump_n_sample: how often each stretch is walked (its r), 1 or more.

    Returns:
        A table of as many rows as there are network calls, R + (jump_n_sample - 1) jump_length per jump.

    Raises:
        ValueError: the table has a history, a learned variance or no levels, or a number is out of range.
    """
    integer("jump_length", jump_length, 1)
    integer("jump_n_sample", jump_n_sample, 1)
    if table.history or table.learned or table.levels is None:
        reason = "older x_0" if table.history else "a learned variance" if table.learned else "no levels"
        raise ValueError(
            f"jumps need rows of x_t and x_0 alone, and table {table.name!r} has {reason}; use ddpm or ddim"
        )
    R = len(table)
    left = {R - 1 - j: jump_n_sample - 1 for j in range(0, R - jump_length, jump_length)}
    rows, starts, row = [], [], 0
    while row < R:
        new = table.rows64[row].clone()
        rows.append(new)
        starts.append(row)
        if left.get(row, 0) == 0:
            row += 1
            continue
        left[row] -= 1
        (signal, noise), (signal_up, noise_up) = table.levels[row + 1], table.levels[row + 1 - jump_length]
        c = signal_up / signal
        scaled = [COLUMN[name] for name in ("c_x0", "c_xt", "c_m", "sigma")]
        new[scaled] *= c
        new[COLUMN["sigma"]] = (new[COLUMN["sigma"]] ** 2 + noise_up**2 - (c * noise) ** 2).sqrt()
        row += 1 - jump_length
    return dataclasses.replace(
        table,
        rows64=torch.stack(rows),
        timesteps=table.timesteps[starts],
        name=f"{table.name}, resampled",
        levels=table.levels[[*starts, R]],
    )
