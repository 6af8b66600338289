"""Guidance: its weight at each row, and what two predictions become where the step's own combination is not all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.checks import number
from fastddpm.tables.table import Table

Weight = float | Sequence[float] | Tensor


def is_guided(guidance: Weight) -> bool:
    """Whether a weight, or one per row, asks for a second prediction."""
    return bool((torch.as_tensor(guidance, device="cpu") != 1.0).any())


def weight_of(guidance: Weight, interval: tuple[float, float] | None, table: Table) -> float | Tensor:
    """Return the weight of classifier-free guidance: for all rows, or float32 [R].

    Args:
        guidance: one weight, or one per row of the table.
        interval: the timesteps (low, high), both included, outside of which it is 1   (Kynkäänniemi et al. 2024,
            arXiv:2404.07724, eq. 6, with t for sigma: sigma grows with t).

    Raises:
        ValueError: a weight is not finite, there is not one per row, or the interval is none.
    """
    if interval is None and not isinstance(guidance, Sequence | Tensor):
        return number("guidance", guidance)
    w = torch.as_tensor(guidance, dtype=torch.float32, device="cpu")
    if tuple(w.shape) not in ((), (len(table),)) or not w.isfinite().all():
        raise ValueError(
            f"guidance must be finite, one weight or one for each of the {len(table)} steps, got shape {list(w.shape)}"
        )
    w = w.expand(len(table))
    if interval is None:
        return w
    low, high = (number("guidance_interval", t) for t in interval)
    if low > high:
        raise ValueError(f"guidance_interval is (low, high) in timesteps, got ({low:g}, {high:g})")
    return torch.where((table.timesteps >= low) & (table.timesteps <= high), w, 1.0)


def rescaled(pair: Tensor, w: Tensor, phi: Tensor, channels: int) -> Tensor:
    """Guide, and keep the spread of the conditional prediction   (Lin et al. 2023, arXiv:2305.08891, eqs. 14 to 16).

    m_cfg = m_u + w (m_c - m_u);  m = phi m_cfg std(m_c) / std(m_cfg) + (1 - phi) m_cfg, std over a sample's elements.

    Args:
        pair: [2B, ...], the conditional half first.
        w: the weight, one element.
        phi: how far, 0 to 1, one element.
        channels: those of the prediction; what follows, a learned variance, comes from the conditional half.

    Returns:
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
