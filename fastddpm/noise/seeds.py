"""Seeds and sample ids: checked, never wrapped, laid out as key and sample word of noise-v1; lists of seeds as text."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastddpm.checks import integer

# No run writes more files than this; "0-99999999999" is a slip of the pen, and would fill the memory.
MAX_SEEDS = 10_000_000


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


def parse_seeds(text: str) -> list[int]:
    """Read a list of seeds such as "0-15,20".

    Raises:
        ValueError: the text is no such list, a seed is 2^64 or more, or there are more than `MAX_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_seed(first) or (dash and not _is_seed(last)):
            raise ValueError(f"{part.strip()!r} is no seed and no range of seeds; write for example 0-15,20")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise ValueError(f"the range {part.strip()!r} runs backwards")
        if high >= 2**64:
            raise ValueError(f"seed {high} is out of range; seeds are 0 to 2^64 - 1")
        if len(seeds) + high - low + 1 > MAX_SEEDS:
            raise ValueError(f"{text!r} asks for more than {MAX_SEEDS} seeds")
        seeds.extend(range(low, high + 1))
    return seeds


def _is_seed(text: str) -> bool:
    return text.isascii() and text.isdigit()


def format_seeds(seeds: Iterable[int]) -> str:
    """Write seeds as `parse_seeds` reads them, neighbours joined to ranges, order kept."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
