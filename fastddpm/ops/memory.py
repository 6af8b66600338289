"""Memory layouts that the kernels read and write as they are: contiguous, and channels-last of any dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, ...] is dense with its channels innermost, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Return a new tensor of x's shape: channels-last where x is, else contiguous."""
    return torch.empty_like(x) if is_channels_last(x) else x.new_empty(x.shape)
