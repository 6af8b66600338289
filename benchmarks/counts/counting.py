"""Count what a piece of code asks of PyTorch: operations, bytes, reads by the host; inside custom operators too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They make another view of the same memory, or only describe one: nothing runs.
_FREE = frozenset(
    (
        *("view", "_unsafe_view", "_reshape_alias", "reshape", "expand", "permute", "transpose", "t", "as_strided"),
        *("slice", "select", "narrow", "diagonal", "unfold", "unsqueeze", "squeeze", "alias", "detach", "view_as_real"),
        *("split", "split_with_sizes", "unbind", "chunk", "lift_fresh", "is_pinned", "set_", "resize_"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)


@dataclass
class Counts:
    """What was counted.

    Attributes:
        calls: ATen operations dispatched.
        operations: those that run something rather than describe a view.
        large: those among them that touch a tensor of at least `threshold` elements.
        bytes_read: of the large tensors that the operations take.
        bytes_written: of the large tensors that they return or write.
        host_reads: values read back from a tensor (`.item()`, a branch).
        by_name: operations by name.
    """

    calls: int = 0
    operations: int = 0
    large: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    host_reads: int = 0
    by_name: Counter[str] = field(default_factory=Counter)


class OpCounter(TorchDispatchMode):
    """Counts the operations inside its context. Code that Inductor generated is one call that cannot be seen here.

    Args:
        threshold: number of elements from which a tensor counts as large, such as a batch of images.
    """

    def __init__(self, threshold: int = 1) -> None:
        super().__init__()
        self.threshold = threshold
        self.counts = Counts()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run inside the context; without it Dynamo refuses to."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastddpm":
            return self._look_inside(func, args, kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        self.counts.calls += 1
        if name == "_local_scalar_dense":
            self.counts.host_reads += 1
        if name not in _FREE:
            self._count(name, func, args, kwargs, result)
        return result

    def _look_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a custom operator's body with this counter still active: a mode does not see below the first call."""
        device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        key = torch._C.DispatchKey.CUDA if device is not None and device.type == "cuda" else torch._C.DispatchKey.CPU
        with self:
            return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)

    def _count(self, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        counts = self.counts
        counts.operations += 1
        counts.by_name[name] += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        reads, writes = self._bytes(inputs), self._bytes(outputs)
        if func._schema.is_mutable and name in ("copy_", "fill_", "zero_", "normal_", "uniform_"):
            # The target is overwritten, not read.
            reads -= self._bytes(inputs[:1])
        counts.bytes_read += reads
        counts.bytes_written += writes
        counts.large += bool(reads or writes)

    def _bytes(self, tensors: list[Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t.numel() >= self.threshold)


def count(run: Callable[[], Any], threshold: int = 1) -> Counts:
    """Run once and count."""
    with OpCounter(threshold) as counter:
        run()
    return counter.counts
