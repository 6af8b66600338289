"""Engines: run one sampling step again and again, from static buffers and without a host decision.

A step is a closure without arguments. Whatever changes between two replays (the row, seeds, labels, x_t itself) lies
in buffers that keep their address; whatever the closure reads from Python is what it was at capture. `LoopEngine` calls
the closure, `CudaGraphEngine` replays it as a CUDA graph, and `TapeEngine` shows on any machine what a graph would do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], None]

# PyTorch: "only one capture may be underway at a time in the process".
_CAPTURE_LOCK = threading.Lock()

# Lets cuBLAS, cuDNN, Triton and torch.compile finish what they do on first calls only; the count is the CUDA graphs
# recipe's of the PyTorch documentation.
WARMUP_STEPS = 3


class Engine(Protocol):
    """Captures a step once and replays it."""

    def capture(self, step: Step, rewind: Step) -> None:
        """Prepare `step` for replay. It may run any number of times; `rewind` sets the row counter back to 0."""

    def replay(self) -> None:
        """Run the captured step once, on the current stream."""

    def reset(self) -> None:
        """Forget the step and free what the capture holds."""


class LoopEngine:
    """Calls the step: the engine of the CPU, and of models that cannot be captured."""

    def __init__(self) -> None:
        self._step: Step | None = None

    def capture(self, step: Step, rewind: Step) -> None:
        self._step = step

    def replay(self) -> None:
        if self._step is None:
            raise RuntimeError("replay() before capture()")
        self._step()

    def reset(self) -> None:
        self._step = None


class GraphPool:
    """The memory pool and the side stream that all CUDA graphs of one sampler share.

    Sharing is safe because nothing in the pool outlives a replay: results are in buffers allocated outside of it, and
    a sampler never lets two replays overlap. A pool whose last graph is gone must not be used again (PyTorch asserts).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        self._handle: Any = None
        self._graphs = 0

    def acquire(self) -> Any:
        """Return the pool's handle for one more graph."""
        if self._graphs == 0:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs += 1
        return self._handle

    def release(self) -> None:
        """Tell that one graph less uses the pool."""
        self._graphs -= 1


class CudaGraphEngine:
    """Replays the step as one CUDA graph.

    Everything the step launches must go to the current stream and touch only static buffers or memory allocated during
    capture. A step that synchronises (`.item()`, a branch on a device tensor) makes `capture` raise; the stream, the
    allocator and the current stream are as before then, and another engine can be used.
    """

    def __init__(self, pool: GraphPool) -> None:
        self._pool = pool
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, step: Step, rewind: Step) -> None:
        self.reset()
        pool = self._pool
        with _CAPTURE_LOCK, torch.cuda.device(pool.device):
            current = torch.cuda.current_stream()
            # Pools share memory between graphs only when all were captured on one stream.
            side = pool.stream = pool.stream or torch.cuda.Stream()
            side.wait_stream(current)
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARMUP_STEPS - 1):
                        rewind()
                        step()
                    rewind()
                    with synchronisation_raises():
                        step()
                    rewind()
                # No other stream may free memory in the middle of a capture, and cached blocks are better returned.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                with torch.cuda.stream(side):
                    self._graph = self._record(step)
            finally:
                current.wait_stream(side)

    def _record(self, step: Step) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        handle = self._pool.acquire()
        try:
            # Not torch.cuda.graph: its exit leaves the side stream current when the capture fails. "thread_local" lets
            # other threads (a data loader's pinned memory) go on allocating.
            graph.capture_begin(pool=handle, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                # Takes stream and allocator out of capture mode; the step's own error is the one to report.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        except BaseException:
            self._pool.release()
            raise
        return graph

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("replay() before capture()")
        self._graph.replay()

    def reset(self) -> None:
        if self._graph is None:
            return
        # A replay may still be running, on whichever stream was current then.
        torch.cuda.synchronize(self._pool.device)
        self._graph.reset()
        self._graph = None
        self._pool.release()


@contextlib.contextmanager
def synchronisation_raises() -> Iterator[None]:
    """Find a step that synchronises before its capture is begun.

    PyTorch cannot fully undo a capture that CUDA has invalidated: the default generator stays in capture mode, and
    torch.randn on the GPU raises from then on.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class TapeEngine:
    """A CUDA graph's semantics on any device, for tests: Python runs at capture and never again.

    Capture records every operation with its arguments. A replay executes the record: Python scalars are those of the
    capture, tensors are the same memory, and intermediate results are poisoned first, so that a per-call value that is
    not in a static buffer, a buffer that was replaced instead of written, or memory read before it is written shows.
    Reads by the host raise, as they do in a capture. As in a capture, effects on the buffers are undone.
    """

    def __init__(self) -> None:
        self._tape: _Tape | None = None

    def capture(self, step: Step, rewind: Step) -> None:
        tape = _Tape()
        with tape:
            step()
        tape.undo()
        self._tape = tape

    def replay(self) -> None:
        if self._tape is None:
            raise RuntimeError("replay() before capture()")
        self._tape.play()

    def reset(self) -> None:
        self._tape = None


class _Tape(TorchDispatchMode):
    """The recorder of `TapeEngine`."""

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

    def play(self) -> None:
        for tensor in self._fresh:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
        for func, args, kwargs, recorded in self._calls:
            results = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(recorded, results, strict=True):
                if _storage_id(old) != _storage_id(new):
                    old.copy_(new)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
