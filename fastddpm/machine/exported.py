"""A module as torch.export sees one of its calls, which says what a package of it is made of and for."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from fastddpm.machine import packages
from fastddpm.machine.building import Job


class Exported:
    """model(x, t, **kwargs) as a graph.

    Raises:
        Exception: whatever torch.export raises at what it does not take.
    """

    def __init__(self, model: nn.Module, x: Tensor, t: Tensor, kwargs: Mapping[str, Tensor]) -> None:
        self.example = (x, t, *kwargs.values())
        # Dynamo's: tracing with fake tensors would leave them wherever the module keeps tensors of its own.
        self._program = torch.export.export(_Call(model, list(kwargs)), self.example, strict=True)
        tensors = {**self._program.state_dict, **self._program.constants}
        graphs = [part.graph for part in self._program.graph_module.modules() if isinstance(part, fx.GraphModule)]
        self.identity = packages.identify(
            network=hashlib.sha256("\n".join(map(str, graphs)).encode()).hexdigest()[:16],
            weights=packages.tensors_digest(tensors)[:16],
            shape=", ".join(f"{'x'.join(map(str, part.shape))} {part.dtype}" for part in self.example),
            code=packages.source_digest(Path(__file__).parent)[:16],
        )

    def job(self) -> Job:
        """Return what it is built from."""
        written = io.BytesIO()
        torch.export.save(self._program, written)
        return written.getvalue(), tuple(map(torch.zeros_like, self.example))


class _Call(nn.Module):
    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        output = self.model(x, t, **dict(zip(self.names, values, strict=True)))
        return output if isinstance(output, Tensor) else output.sample
