"""A CUDA graph's semantics on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TapePool:
    """A CUDA graph's semantics on any device: Python runs at capture and never again. Stands in for a `GraphPool`.

    Capture records every operation with its arguments. A replay executes the record: Python scalars are those of the
    capture, tensors are the same memory, and intermediate results are poisoned first, so that a per-call value that is
    not in a static buffer, a buffer that was replaced instead of written, or memory read before it is written shows.
    Reads by the host raise, as they do in a capture. As in a capture, effects on the buffers are undone.
    """

    def __init__(self) -> None:
        self.retired: list[Tape] = []

    def capture(self, step: Callable[[], None], rewind: Callable[[], None]) -> Tape:
        tape = Tape()
        with tape:
            step()
        tape.undo()
        return tape

    def release(self, tape: Tape) -> None:
        pass


class Tape(TorchDispatchMode):
    """What `TapePool` has recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._fresh: list[Tensor] = []
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted while capturing: the host reads a value of a tensor")
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._remember(tensor)
        known = {_storage_id(tensor) for tensor in inputs}
        outputs = func(*args, **kwargs)
        fresh = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and _storage_id(t) not in known]
        for tensor in fresh:
            self._storages.setdefault(_storage_id(tensor), (tensor, tensor))
        self._fresh.extend(fresh)
        self._calls.append((func, args, kwargs, [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]))
        return outputs

    def _remember(self, tensor: Tensor) -> None:
        """Keep a copy of memory that exists before the step, to undo what the capture writes."""
        key = _storage_id(tensor)
        if key not in self._storages:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._storages[key] = (whole, whole.clone())

    def undo(self) -> None:
        for whole, before in self._storages.values():
            if whole is not before:
                whole.copy_(before)

    def replay(self) -> None:
        for tensor in self._fresh:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
        for func, args, kwargs, recorded in self._calls:
            results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(recorded, results, strict=True):
                if _storage_id(old) != _storage_id(new):
                    old.copy_(new)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
