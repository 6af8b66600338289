"""torch.compile as its documentation recommends for inference, for the peers' tuned rows and the plain baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_frozen(model: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with fullgraph, channels_last weights (of a module) and frozen parameters (inductor's `freezing`).

    Freezing is set while the first call compiles, and not left behind for others.
    """
    if isinstance(model, nn.Module):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = torch.compile(model, fullgraph=True, dynamic=False)
    warm = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal warm
        if warm:
            return call(*args, **kwargs)
        inductor: Any = torch._inductor.config
        with torch.no_grad(), inductor.patch(freezing=True):
            result = call(*args, **kwargs)
        warm = True
        return result

    return run


def load_compiler() -> None:
    """Load what torch.compile loads when it first compiles a network; CPU."""
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.GroupNorm(1, 1), nn.Flatten(0), nn.Linear(36, 1)).eval()
    compile_frozen(network)(torch.zeros(1, 1, 8, 8))
