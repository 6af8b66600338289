"""The maths of guidance beyond the step's own combination of two predictions: a kept spread, a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastddpm.errors import ModelOutputError
from fastddpm.sampling.edits import refuse_without_levels
from fastddpm.tables.table import Table


def rescaled(pair: Tensor, w: Tensor, phi: Tensor, channels: int) -> Tensor:
    """Guide, and keep the spread of the conditional prediction   (Lin et al. 2023, arXiv:2305.08891, eqs. 14 to 16).

    m_cfg = m_u + w (m_c - m_u);  m = phi m_cfg std(m_c) / std(m_cfg) + (1 - phi) m_cfg, std over a sample's elements.

    What follows the prediction's channels, a learned variance, comes from the conditional half, the first: [2B, ...] ->
    float32 [B, ...].
    """
    m_c, m_u = pair.float().chunk(2)
    v = m_c[:, channels:]
    m_c, m_u = m_c[:, :channels], m_u[:, :channels]
    m = m_u + w * (m_c - m_u)
    axes = tuple(range(1, m.dim()))
    std_c, std = (x.std(dim=axes, keepdim=True, correction=0) for x in (m_c, m))
    # A prediction without spread has none to restore.
    m = m * (1.0 + phi * (torch.where(std > 0, std_c / std, 1.0) - 1.0))
    return torch.cat([m, v], dim=1) if v.shape[1] else m


def shift_of(table: Table) -> Tensor:
    """Tabulate what m moves by for the gradient g of log p(y | x_t)   (Dhariwal & Nichol 2021, Algorithm 2).

    With x_t = c x_0 + s eps, eps' = eps - s g moves x_0 by s^2 / c g. A row reads x_0 = a x_t + b m (or eps), so that
    m' = m + s^2 / (b c) g (or - s / b g) moves it alike, whatever the network predicts. The clip comes after it.

    Raises:
        ValueError: the table does not say its levels, or has one without signal.
    """
    refuse_without_levels("cond_fn", table)
    assert table.levels is not None
    (c, s), b = table.levels[:-1].unbind(1), table.column("b")
    shift = torch.where(b == 0, 0.0, (s**2 / c if table.estimate == "x_0" else -s) / b).float()
    if not shift.isfinite().all():
        raise ValueError(f"cond_fn in the epsilon form: a row of table {table.name!r} has no signal (c = 0 in levels)")
    return shift


def shifted(m: Tensor, by: Tensor, channels: int) -> Tensor:
    """Add [B, ...] to the prediction's channels of m [B, ...], or of both halves [2B, ...]; float32."""
    m = m.to(torch.float32, copy=True)
    for half in m.split(max(1, len(by))):
        half[:, :channels] += by
    return m


def gradient(cond_fn: Callable[..., Tensor], x_t: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return cond_fn(x_t, t, **kwargs), [B, ...], of the first B rows of t and of the arguments that have as many.

    Raises:
        ModelOutputError: it is no gradient.
    """
    own = {k: v[: len(x_t)] if isinstance(v, Tensor) and v.shape[:1] == t.shape else v for k, v in kwargs.items()}
    found = cond_fn(x_t.detach(), t[: len(x_t)], **own)
    if not isinstance(found, Tensor) or found.shape != x_t.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ModelOutputError(f"cond_fn must return the gradient for x, {list(x_t.shape)}, got {got}")
    return found.detach()
