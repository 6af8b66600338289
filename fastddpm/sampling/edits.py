"""Edits of a run, checked: data to begin from, and data that are known in part; and the way between two noises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm.tables.table import Table


def as_tensor(data: Any) -> Tensor:
    """Return a tensor as it is, and an array or list of numbers as one on the CPU."""
    return data if isinstance(data, Tensor) else torch.as_tensor(data, device="cpu")


def samples(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return data as samples [B, *shape].

    Raises:
        ValueError: the shape is another, or the values are no floating-point numbers.
    """
    if tuple(x.shape[1:]) != shape or not x.is_floating_point():
        raise ValueError(
            f"{name} must be floating point of shape [B, {', '.join(map(str, shape))}], got {x.dtype} of shape "
            f"{list(x.shape)}; an image becomes one by image[None], and uint8 goes to [-1, 1] by x / 127.5 - 1"
        )
    return x


def in_range(name: str, x: Tensor, table: Table) -> Tensor:
    """Return data, after a look at their values.

    Raises:
        ValueError: they are far from where x_0 is clipped.
    """
    bound = float(table.column("hi").max())
    # Twice as far is more than a solver's or a filter's overshoot.
    if (x.abs() > 2 * bound).any():
        raise ValueError(
            f"{name} reaches {float(x.abs().max()):g}, and x_0 is clipped to {bound:g}: data are in the range of what "
            "the network was trained on; 0 to 255 goes to [-1, 1] by x / 127.5 - 1"
        )
    return x


def for_batch(name: str, x: Tensor, batch: int) -> Tensor:
    """Return x for every sample of a batch: a row each, or one for all.

    Raises:
        ValueError: it has another number of rows.
    """
    if len(x) not in (1, batch):
        raise ValueError(f"{name} holds {len(x)} samples, and {batch} are drawn; give one each, or one for all")
    return x.expand(batch, *x.shape[1:])


def refuse_without_levels(name: str, table: Table) -> None:
    """Raise ValueError for a table that does not say what data become at its rows."""
    if table.levels is None:
        raise ValueError(f"{name}= needs the noise level of each row, and table {table.name!r} has no levels; set them")


def resolve_known(
    table: Table,
    size: tuple[int, ...],
    mask: Tensor | None,
    known: Tensor | None,
    init: Tensor | None,
    source: str | None,
) -> tuple[Tensor, Tensor]:
    """Return the data that are known (by default `init`) and where they are not, both of `size`.

    Raises:
        ValueError: one is missing or does not fit, the table has no levels, or the noise comes from no seeds.
    """
    if mask is None:
        raise ValueError("known= counts where a mask is 0; give mask= too")
    known = init if known is None else known
    if known is None:
        raise ValueError("mask= says where to draw, and needs known= (or init=), the data where it is 0")
    if source != "seeds":
        raise ValueError("mask= noises the known data by seeds; pass seeds=, or seed= with sample_ids=")
    refuse_without_levels("mask", table)
    known, drawn = for_batch("known", samples("known", known, size[1:]), size[0]), as_mask(mask, size)
    # Where samples are drawn the data may hold anything.
    in_range("known", known.masked_fill(drawn, 0.0), table)
    return known, drawn


def as_mask(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a mask as bool of `size`.

    Raises:
        ValueError: it has a value between 0 and 1, or does not broadcast.
    """
    drawn = mask.to(torch.bool)
    if mask.dtype != torch.bool and not torch.equal(drawn.to(mask.dtype), mask):
        raise ValueError("mask must hold 0 (known) and 1 (to be drawn) only; compare it with a threshold first")
    try:
        return drawn.expand(size)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {list(size)}, got {list(mask.shape)}") from None


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Go from one noise to another on the sphere between them: sin((1 - w) phi) / sin phi a + sin(w phi) / sin phi b.

    phi is the angle between a and b (Song et al. 2021, appendix D.5). A straight line would leave the shell on which
    Gaussian noise lies: half-way its variance is a half.

    Args:
        a, b: of equal shape [...], e.g. x_T of one sample.
        weight: from 0 for a to 1 for b; or [N] of them.

    Returns:
        [...], or [N, ...].
    """
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    w = w.reshape(*w.shape, *[1] * a.dim())
    cos = (a * b).sum() / (a.norm() * b.norm())
    phi = cos.clamp(-1, 1).acos()
    if phi < 1e-4:
        return a + w * (b - a)
    return (torch.sin((1 - w) * phi) * a + torch.sin(w * phi) * b) / torch.sin(phi)
