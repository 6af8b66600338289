"""`fastddpm.randn`: noise-v1 for seeds, or for one seed and sample ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.noise.seeds import as_word, resolve_seeds
from fastddpm.noise.v1 import STREAM_REVERSE, counter


def randn(
    shape: Sequence[int],
    *,
    seed: int | None = None,
    seeds: Iterable[int] | Tensor | None = None,
    sample_ids: Iterable[int] | Tensor | None = None,
    step: int = 0,
    stream: int = STREAM_REVERSE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw a batch of noise-v1: sample b of the result depends on its own seed or id only.

    Args:
        shape: (B, ...), samples first.
        seed, sample_ids: one seed for all and one id per sample (0 .. B-1 if not given).
        seeds: or one seed per sample.
        step, stream: counter words, both in [0, 2**32).
        device: where to draw; the bits do not depend on it.
        dtype: float32, or float16 or bfloat16 for a draw rounded once to nearest even.

    Returns:
        Contiguous tensor of ``shape``.

    Raises:
        ValueError: for a seed, id, step or stream out of range, or a count that is not B.
        TypeError: for another dtype.
    """
    if len(shape) == 0:
        raise ValueError("shape must be (B, ...), samples first, got ()")
    words = as_word(step, "step"), as_word(stream, "stream")
    return ops.randn(counter(resolve_seeds(seeds, seed, sample_ids, shape[0]), *words, device), shape[1:], dtype)
