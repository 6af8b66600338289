"""A module of the user's own that runs from a package, where torch.export takes it.

A package is found by the hash of the graph and of the weights that torch.export sees in this process. What changes
later and is in neither (a flag, a global variable, a hook) shows when a run begins: its first prediction is the
module's own, and compiled code makes the others only where it has made the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm.errors import BackendUnavailable
from fastddpm.machine.building import Want, Wish
from fastddpm.machine.exported import Exported
from fastddpm.machine.torch_compile import compile_call

logger = logging.getLogger("fastddpm")

Call = Callable[[Tensor, Tensor, Mapping[str, Any]], Any]

# The most that compiled code may be from the module, relative to its prediction; in 16 bits each layer rounds.
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class KeptNetwork:
    """A `network.Network`: a module on a CPU, one step's buffers.

    Args:
        wish: shared by all steps. What is wanted now, and torch.export does not take, is compiled in this process.
    """

    memory_format = torch.contiguous_format
    shares_weights = False
    compiles_step = False

    def __init__(self, model: nn.Module, wish: Wish) -> None:
        self._model, self._wish = model, wish
        self._compiled: Call | None = None
        self._exported: Exported | None = None
        self._shapes: list[Any] | None = None
        self._call: Call | None = None

    def load(self, class_labels: Tensor | None) -> None:
        """Begin a run."""
        self._call = None

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        """Predict from x [B, ...] and t [B]."""
        if self._call is not None:
            return self._call(x, t, kwargs)
        compiled = self._find(x, t, kwargs)
        found = None if compiled is None else compiled(x.clone(), t, kwargs)
        m = self._uncompiled(x, t, kwargs)
        if compiled is not None and not _agree(*(getattr(output, "sample", output) for output in (found, m))):
            reason = "compiled code does not predict what the model does now"
            if self._wish.strict or self._wish.file is not None:
                raise BackendUnavailable(reason)
            logger.warning("the model runs uncompiled: %s", reason)
            self._wish.insist(False)
            compiled = None
        self._call = compiled or self._uncompiled
        return m

    def settle(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any], compiled: bool | None) -> bool:
        """Decide for all later runs, see `network.Network`."""
        if compiled is not None:
            self._wish.insist(compiled)
        found = self._find(x, t, kwargs) is not None
        self._wish.insist(found)
        return found

    def _uncompiled(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Any:
        return self._model(x, t, **kwargs)

    def _find(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Call | None:
        # What is a number, or changes its shape from run to run, would have to be exported again.
        shapes = [(name, getattr(value, "shape", None)) for name, value in kwargs.items()]
        self._shapes = shapes if self._shapes is None else self._shapes
        if self._wish.idle or shapes != self._shapes or not all(isinstance(v, Tensor) for v in kwargs.values()):
            return None
        self._compiled = self._compiled or self._from_package(x, t, kwargs)
        return self._compiled

    def _from_package(self, x: Tensor, t: Tensor, kwargs: Mapping[str, Any]) -> Call | None:
        try:
            self._exported = self._exported or Exported(self._model, x, t, kwargs)
        except Exception as error:  # whatever tracing somebody's code may raise
            gist, _, _ = str(error).strip().partition("\n")
            reason = f"torch.export does not take the model: {gist}"
            if self._wish.file is not None:
                raise BackendUnavailable(reason) from error
            logger.info("%s", reason)
            if self._wish.want is Want.NOW:
                return compile_call(lambda *call: self._uncompiled(*call), strict=self._wish.strict)
            self._wish.want = Want.NEVER
            return None
        code = self._wish.code(self._exported.identity, self._exported.job)
        return None if code is None else lambda x, t, kwargs: code(x, t, *kwargs.values())


def _agree(found: Any, expected: Any) -> bool:
    tensors = isinstance(found, Tensor) and isinstance(expected, Tensor)
    if not tensors or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    difference, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return bool(difference <= CLOSE.get(expected.dtype, CLOSE[torch.float32]) * size)
