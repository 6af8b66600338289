"""Seeds and sample ids: checked, never wrapped, and laid out as the key and sample word of noise-v1."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastddpm.checks import integer


def as_word(value: object, name: str, stop: int = 1 << 32) -> int:
    """``value`` as an int in [0, stop); bools and floats are refused rather than converted."""
    return integer(name, value, 0, stop - 1)


def _words(values: Iterable[int] | Tensor, name: str, stop: int) -> list[int]:
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {tuple(values.shape)}")
        values = values.tolist()
    elif isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a sequence of integers, got {values!r}")
    return [as_word(v, f"{name}[{k}]", stop) for k, v in enumerate(values)]


def resolve_seeds(
    seeds: Iterable[int] | Tensor | None = None,
    seed: int | None = None,
    sample_ids: Iterable[int] | Tensor | None = None,
    batch: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn either way of naming samples into key and sample word.

    Args:
        seeds: one seed in [0, 2**64) per sample; the sample word is 0. Duplicates give identical samples.
        seed: or one seed for all, with
        sample_ids: ids in [0, 2**32), 0 .. batch - 1 if not given.
        batch: number of samples; needed with ``seed`` alone, checked otherwise.

    Returns:
        (seed, sample_id), int64 [B] each on the CPU; seeds from 2**63 on as two's complement.

    Raises:
        ValueError: if both or neither of ``seeds`` and ``seed`` are given, a value is out of range or no integer
            (nothing is ever wrapped), or the number of samples is not ``batch``.
    """
    if (seeds is None) == (seed is None):
        raise ValueError("give exactly one of seeds= (one per sample) and seed= (one for all)")
    if seeds is not None:
        if sample_ids is not None:
            raise ValueError("sample_ids= goes with seed=, not with seeds=")
        keys = _words(seeds, "seeds", 1 << 64)
        ids = [0] * len(keys)
    else:
        if sample_ids is None and batch is None:
            raise ValueError("seed= needs sample_ids= or the batch size")
        ids = list(range(batch or 0)) if sample_ids is None else _words(sample_ids, "sample_ids", 1 << 32)
        keys = [as_word(seed, "seed", 1 << 64)] * len(ids)
    if batch is not None and len(keys) != batch:
        raise ValueError(f"{len(keys)} seeds or sample ids for a batch of {batch}")
    signed = [k - (1 << 64) if k >> 63 else k for k in keys]
    return torch.tensor(signed, dtype=torch.int64, device="cpu"), torch.tensor(ids, dtype=torch.int64, device="cpu")
