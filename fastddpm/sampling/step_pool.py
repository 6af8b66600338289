"""Steps made ready: built and captured once, lent to a run at a time, made anew when the model has changed."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastddpm.errors import ModelOutputError
from fastddpm.machine.devices import device_guard, synchronisation_raises
from fastddpm.sampling import changes
from fastddpm.sampling.network import Model, place, sampling_networks
from fastddpm.sampling.options import Options
from fastddpm.sampling.request import Request, StepKey
from fastddpm.sampling.step import StaticStep, explain, explain_cuda, is_oom
from fastddpm.tables.table import Table

logger = logging.getLogger("fastddpm")

# Each holds buffers, and on CUDA a graph: enough for a few batch sizes with and without guidance.
MAX_IDLE = 8

# Lets cuBLAS, cuDNN, Triton and torch.compile finish what they do on first calls only; the count is the CUDA graphs
# recipe's of the PyTorch documentation.
WARMUP_STEPS = 3

# PyTorch: "only one capture may be underway at a time in the process".
_CAPTURE_LOCK = threading.Lock()
_POOLS: weakref.WeakSet[StepPool] = weakref.WeakSet()


class StepPool:
    """The prepared steps of one sampler, shared by threads that take turns.

    Args:
        run: one step over the buffers that it is given. Whatever changes between two steps lies in buffers that keep
            their address; whatever it reads from Python is what it was when a graph was captured.
    """

    def __init__(self, model: Model, table: Table, options: Options, run: Callable[[StaticStep], None]) -> None:
        self._model, self._table, self._options, self._run = model, table, options, run
        self._captures = options.uses_graph
        self._lock = threading.RLock()
        self._idle: list[StaticStep] = []  # the last one used stands last
        self._graphs = GraphPool(options.device)
        self._networks: Callable[[int], Any] | None = None
        self._generation = 0
        # What the model was when its networks were made; sums of its weights, where they were copied.
        self._structure: tuple[Any, ...] = ()
        self._sums: list[torch.Tensor] = []
        self._copies = False
        self._settle: Callable[[StaticStep], bool] | None = None
        self._last_use: torch.cuda.Event | None = None
        _POOLS.add(self)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the pool: one thread at a time, on its device, after whatever an earlier turn left running."""
        device = self._options.device
        with self._lock, explain_cuda(), torch.inference_mode(False), torch.no_grad(), device_guard(device):
            if self._last_use is not None:
                torch.cuda.current_stream().wait_event(self._last_use)
            try:
                yield
            except torch.OutOfMemoryError as error:
                # Its frames hold what the network had computed.
                if error.__cause__ is not None:
                    traceback.clear_frames(error.__cause__.__traceback__)
                self.clear()
                raise
            finally:
                if device.type == "cuda":
                    # Fails where CUDA has failed; what ended the turn is the error to report.
                    with contextlib.suppress(RuntimeError):
                        self._last_use = torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def lend(self, request: Request) -> Iterator[StaticStep]:
        """Lend a step for a request that nobody else uses; one whose run failed is not used again."""
        key = StepKey.of(request, self._table, self._options)
        with self.turn():
            if self._networks is not None and self._changed():
                self.refresh()
            found = next((i for i, step in enumerate(self._idle) if step.key == key), None)
            with explain("preparation", key, self._options):
                step = self._build(key) if found is None else self._idle.pop(found)
            generation = self._generation
        try:
            yield step
        except GeneratorExit:
            self._take_back(step, generation)
            raise
        except BaseException:
            # Fails as well where CUDA has failed; what ended the run is the error to report.
            with contextlib.suppress(RuntimeError), self.turn():
                self._free(step)
            # The error's frames hold the step; its buffers go now.
            vars(step).clear()
            raise
        else:
            self._take_back(step, generation)

    def settle(self, step: StaticStep, compiled: bool | None) -> bool:
        """Decide whether networks run compiled, those of changed weights too, see `Sampler.settle`."""
        decided = step.settle(compiled)
        # What was only found does not oblige anybody to wait until it is built for other weights.
        self._settle = functools.partial(StaticStep.settle, compiled=compiled if decided else False)
        return decided

    def replay(self, step: StaticStep) -> None:
        """Run a step once: as its graph, or in Python on the CPU and where the model cannot be captured."""
        if step.graph is None:
            self._run(step)
        else:
            step.graph.replay()

    def refresh(self) -> None:
        """Forget the network's form for sampling, and with it every step."""
        with self.turn():
            self.clear()
            self._networks = None

    def clear(self) -> None:
        """Free buffers, captured graphs and their memory pool."""
        with self.turn():
            self._generation += 1
            for step in self._idle:
                self._free(step)
            self._idle.clear()
            if self._options.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_back(self, step: StaticStep, generation: int) -> None:
        with self.turn():
            if generation != self._generation:
                self._free(step)
                return
            self._idle.append(step)
            if len(self._idle) > MAX_IDLE:
                self._free(self._idle.pop(0))
            if len(self._graphs.retired) > MAX_IDLE:
                # They go when the last one in use does.
                self.clear()

    def _free(self, step: StaticStep) -> None:
        graph, step.graph = step.graph, None
        if graph is not None:
            self._graphs.release(graph)

    def _changed(self) -> bool:
        """Compare the model with what it was; weights only where they were copied."""
        if changes.structure(self._model) != self._structure:
            return True
        if self._options.frozen or not self._copies:
            return False
        found = changes.weight_sums(self._model)
        return len(found) != len(self._sums) or not all(map(torch.equal, found, self._sums))

    def _build(self, key: StepKey) -> StaticStep:
        options = self._options
        settle = self._settle if self._networks is None else None
        if self._networks is None:
            self._structure = changes.structure(self._model)
            self._sums = [] if options.frozen else changes.weight_sums(self._model)
            placed = place(self._model, options.device, options.convert_to)
            self._copies = placed is not self._model
            self._networks = sampling_networks(
                placed,
                self._table.timesteps.to(options.device),
                want=options.want,
                strict=options.strict_compile,
                compiled=options.compiled,
                fused=options.norm == "fused",
            )
        network = self._networks(key.network_batch)
        self._copies |= not getattr(network, "shares_weights", False)
        step = StaticStep(key, network, self._table, options)
        if settle is not None:
            settle(step)
        if not self._captures:
            return step
        try:
            step.graph = self._graphs.capture(functools.partial(self._run, step), step.rewind)
        except Exception as error:
            if options.strict_graph or isinstance(error, ModelOutputError) or is_oom(error):
                raise
            # What the step cannot do in Python either is no reason to give up graphs.
            self._run(step)
            step.rewind()
            logger.warning(
                "no CUDA graph, the steps run one by one (cuda_graph=True raises instead): %s; nothing may wait for "
                "the GPU meanwhile, neither the model (.item(), torch.cuda.synchronize()) nor another thread: call "
                "warmup() before those start",
                error,
            )
            self._captures = False
        return step


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
        # Pools share memory between graphs that were captured on one stream only.
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        self._handle: Any = None
        self._in_use = 0

    def capture(self, step: Callable[[], None], rewind: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Capture a step as a graph; `rewind` sets the row counter back to 0.

        Everything the step launches must go to the current stream and touch only static buffers or memory allocated
        during capture. A step that synchronises (`.item()`, a branch on a device tensor) makes this raise; the stream,
        the allocator and the current stream are as before then.
        """
        with _CAPTURE_LOCK, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            if self._streams is None:
                self._streams = (torch.cuda.Stream(), torch.cuda.Stream())
            side, recorded = self._streams
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
                    return self._record(step)
            finally:
                current.wait_stream(side)

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if self._in_use == 0:
            self._handle = torch.cuda.graph_pool_handle()
        self._in_use += 1
        try:
            # Not torch.cuda.graph: its exit leaves the side stream current when the capture fails. "thread_local" lets
            # other threads (a data loader's pinned memory) go on allocating.
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
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
                self.release(graph)
            raise
        return graph

    def release(self, graph: torch.cuda.CUDAGraph) -> None:
        """Take back a graph that will not be replayed again; one whose capture failed too."""
        self.retired.append(graph)
        self._in_use -= 1
        if self._in_use == 0:
            # A replay may still be running, on whichever stream was current then.
            torch.cuda.synchronize(self.device)
            while self.retired:
                self.retired.pop().reset()


def _after_fork() -> None:
    """Let a forked child sample: the threads that held locks, and OpenMP's, stayed with its parent."""
    for pool in list(_POOLS):
        pool._lock = threading.RLock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
