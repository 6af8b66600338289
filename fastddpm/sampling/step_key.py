"""What a step is found again by: everything about a request that is not in a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

COUNTER, GIVEN, NONE = "counter", "given", "none"


@dataclass(frozen=True)
class StepKey:
    """Everything about a request that is not in a buffer of its step; requests of equal keys share one step.

    Attributes:
        batch: B, samples per step.
        noise: where z comes from: "counter" (seeds), "given" (a buffer that the caller fills) or "none".
        guided: two predictions per sample, and m = m_u + w (m_c - m_u).
        labels: the model is given class_labels.
        x0_out: the estimate of x_0 is kept.
        check_finite: each sample's first step with a NaN or Inf is recorded.
        kwargs: the model's further keyword arguments, where code is compiled or captured with them: (name, value), or
            (name, `TensorSpec`) for tensors and floats.
        settings: PyTorch's global ones that a graph keeps from its capture: autocast, determinism, precision.
    """

    batch: int
    noise: str = COUNTER
    guided: bool = False
    labels: bool = False
    x0_out: bool = False
    check_finite: bool = False
    kwargs: tuple[tuple[str, Any], ...] = ()
    settings: tuple[Any, ...] = ()

    @property
    def network_batch(self) -> int:
        """Rows of the network's input: 2B with guidance, the conditional half first."""
        return 2 * self.batch if self.guided else self.batch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor among the model's keyword arguments."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def global_settings(device: torch.device) -> tuple[Any, ...]:
    """Return what a graph keeps of PyTorch's global settings: autocast's dtype, determinism, precision."""
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    precision = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    return (autocast, torch.are_deterministic_algorithms_enabled(), *precision)


def spec_of(name: str, value: Any) -> Any:
    """Return what a step has to know of a keyword argument: a `TensorSpec` where it is a buffer, else its value.

    Raises:
        ValueError: the value cannot be compared with another call's.
    """
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return TensorSpec((), torch.float32)
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"model_kwargs[{name!r}] is a {type(value).__name__}; pass tensors and hashable values only, or "
            "compile=False and cuda_graph=False"
        ) from None
    return value
