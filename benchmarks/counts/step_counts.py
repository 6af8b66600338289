"""What a step costs beside the network: operations, image-sized ones, bytes, reads by the host. Counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fastddpm.benchmarks import bench_drop_in, bench_p_sample
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.harness.inputs import gaussian, schedule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.sampling.network import Network
from fastddpm.sampling.request import StepKey
from fastddpm.sampling.sampler import Sampler
from fastddpm.sampling.step import StaticStep
from fastddpm.tables.ddpm import ddpm_table

CASE = Case("p_sample", 2, (3, 32, 32))

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


def measure(*, smoke: bool = False) -> list[dict[str, Any]]:
    """Count one step of each on the CPU; rows with a "note" for those not installed."""
    rows = []
    originals = [case for case in bench_drop_in.cases("cpu", smoke=True) if not case.network]
    for name, provider, case in (
        ("PyTorch", bench_p_sample.BENCHMARK.provider("PyTorch"), CASE),
        *((case.original, bench_drop_in.BENCHMARK.provider("original"), case) for case in originals),
    ):
        if (reason := provider.why_not(case)) is not None:
            rows.append({"who": name, "note": reason})
        else:
            rows.append(_row(name, count(provider.build(case).run, CASE.n_elements)))
    rows.append(_row("fastddpm, eager twin", _fastddpm(compiled=False)))
    if not smoke:
        # No dispatch mode sees what the code that Inductor made of the twin reads and writes.
        rows.append(_row("fastddpm", _fastddpm(compiled=True)) | {"images_read": None, "images_written": None})
    return rows


def _row(name: str, counts: Counts) -> dict[str, Any]:
    image = 4 * CASE.n_elements
    return {
        "who": name,
        "calls": counts.calls,
        "operations": counts.operations,
        "large": counts.large,
        "images_read": counts.bytes_read / image,
        "images_written": counts.bytes_written / image,
        "host_reads": counts.host_reads,
    }


def _fastddpm(*, compiled: bool) -> Counts:
    """All of the sampler's step but the network, on the CPU; counted inside the operator too."""
    m = gaussian(2, CASE.full_shape)
    table = ddpm_table(schedule())
    sampler = Sampler(lambda x, t: m, table, CASE.shape, device="cpu", compile=compiled)
    network = Network(sampler.model, compile_model=False, strict=False)
    step = StaticStep(StepKey(CASE.batch), network, table, sampler.options)
    sampler.reverse_step(step)
    with OpCounter(CASE.n_elements) as counter:
        sampler.reverse_step(step)
    return counter.counts
