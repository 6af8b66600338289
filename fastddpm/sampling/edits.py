"""Edits of a run, checked: data to begin from."""

from __future__ import annotations

from torch import Tensor

from fastddpm.tables.table import Table


def as_samples(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
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
