"""Engines: run one sampling step again and again, from static buffers and without a host decision.

A step is a closure without arguments. Whatever changes between two replays (the row, seeds, labels, x_t itself) lies
in buffers that keep their address; whatever the closure reads from Python is what it was at capture. `LoopEngine` calls
the closure, and `CudaGraphEngine` replays it as a CUDA graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

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
    """The memory pool and the streams that all CUDA graphs of one sampler share.

    Sharing is safe because nothing in the pool outlives a replay: results are in buffers allocated outside of it, and
    a sampler never lets two replays overlap. A pool whose last graph is gone must not be used again (PyTorch asserts).

    A graph keeps the address of the workspace that cuBLAS had on its stream. So steps warm up on another stream than
    they are captured on, and the workspace is first made inside a capture, in the pool; and because resetting a graph
    frees the workspace of its stream (PyTorch issue 193402), a graph is reset only when no other is in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.retired: list[torch.cuda.CUDAGraph] = []
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._handle: Any = None
        self._in_use = 0

    def streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """Return the stream to warm up on, and the one to capture on: pools share memory between graphs of one only."""
        if self._streams is None:
            self._streams = (torch.cuda.Stream(), torch.cuda.Stream())
        return self._streams

    def acquire(self) -> Any:
        """Return the pool's handle for one more graph."""
        if self._in_use == 0:
            self._handle = torch.cuda.graph_pool_handle()
        self._in_use += 1
        return self._handle

    def release(self, graph: torch.cuda.CUDAGraph) -> None:
        """Take back a graph that will not be replayed again; one whose capture failed too."""
        self.retired.append(graph)
        self._in_use -= 1
        if self._in_use == 0:
            # A replay may still be running, on whichever stream was current then.
            torch.cuda.synchronize(self.device)
            while self.retired:
                self.retired.pop().reset()


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
            side, recorded = pool.streams()
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
                with torch.cuda.stream(recorded):
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
            # Fails where CUDA has failed; what ended the capture is the error to report.
            with contextlib.suppress(RuntimeError):
                self._pool.release(graph)
            raise
        return graph

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("replay() before capture()")
        self._graph.replay()

    def reset(self) -> None:
        if self._graph is None:
            return
        graph, self._graph = self._graph, None
        self._pool.release(graph)


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
