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

import torch

from fastddpm.errors import ModelOutputError
from fastddpm.machine.devices import device_guard
from fastddpm.sampling.changes import Watch
from fastddpm.sampling.engine import CudaGraphEngine, Engine, GraphPool, LoopEngine
from fastddpm.sampling.errors import explain, explain_cuda, is_oom
from fastddpm.sampling.model import Model, place
from fastddpm.sampling.network import Network, sampling_networks
from fastddpm.sampling.options import Options
from fastddpm.sampling.step import StaticStep
from fastddpm.sampling.step_key import StepKey
from fastddpm.tables.table import Table

logger = logging.getLogger("fastddpm")

Prepared = tuple[StaticStep, Engine]

# Each holds buffers, and on CUDA a graph: enough for a few batch sizes with and without guidance.
MAX_IDLE = 8

_POOLS: weakref.WeakSet[StepPool] = weakref.WeakSet()


class StepPool:
    """The prepared steps of one sampler, shared by threads that take turns.

    Args:
        model: the network.
        table: the rows.
        options: the sampler's.
        run: what an engine captures: one step over the buffers that it is given.
    """

    def __init__(self, model: Model, table: Table, options: Options, run: Callable[[StaticStep], None]) -> None:
        self._model, self._table, self._options, self._run = model, table, options, run
        self._captures = options.uses_graph
        self._lock = threading.RLock()
        # The last one used stands last.
        self._idle: list[Prepared] = []
        self._graphs = GraphPool(options.device)
        self._networks: Callable[[int], Network] | None = None
        self._generation = 0
        self._watch = Watch(model, frozen=options.frozen)
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
    def lend(self, key: StepKey) -> Iterator[Prepared]:
        """Lend a step that nobody else uses; one whose run failed is not used again."""
        with self.turn():
            if self._networks is not None and self._watch.changed():
                self.refresh()
            found = next((i for i, (step, _) in enumerate(self._idle) if step.key == key), None)
            with explain("preparation", key, self._options):
                step, engine = self._build(key) if found is None else self._idle.pop(found)
            generation = self._generation
        try:
            yield step, engine
        except GeneratorExit:
            self._take_back(step, engine, generation)
            raise
        except BaseException:
            # Fails as well where CUDA has failed; what ended the run is the error to report.
            with contextlib.suppress(RuntimeError), self.turn():
                engine.reset()
            # The error's frames hold the step; its buffers go now.
            vars(step).clear()
            raise
        else:
            self._take_back(step, engine, generation)

    def refresh(self) -> None:
        """Forget the network's form for sampling, and with it every step."""
        with self.turn():
            self.clear()
            self._networks = None

    def clear(self) -> None:
        """Free buffers, captured graphs and their memory pool."""
        with self.turn():
            self._generation += 1
            for _, engine in self._idle:
                engine.reset()
            self._idle.clear()
            if self._options.device.type == "cuda":
                torch.cuda.empty_cache()

    def _take_back(self, step: StaticStep, engine: Engine, generation: int) -> None:
        with self.turn():
            if generation != self._generation:
                engine.reset()
                return
            self._idle.append((step, engine))
            if len(self._idle) > MAX_IDLE:
                self._idle.pop(0)[1].reset()
            if len(self._graphs.retired) > MAX_IDLE:
                # They go when the last one in use does.
                self.clear()

    def _build(self, key: StepKey) -> Prepared:
        options = self._options
        if self._networks is None:
            self._watch.remember()
            placed = place(self._model, options.device, options.convert_to)
            self._watch.copies = placed is not self._model
            self._networks = sampling_networks(
                placed,
                self._table.timesteps.to(options.device),
                want=options.want,
                strict=options.strict_compile,
                compiled=options.compiled,
            )
        network = self._networks(key.network_batch)
        self._watch.copies |= not getattr(network, "shares_weights", False)
        step = StaticStep(key, network, self._table, options)
        engine = self._new_engine()
        try:
            engine.capture(functools.partial(self._run, step), step.rewind)
        except Exception as error:
            if options.strict_graph or not self._captures or isinstance(error, ModelOutputError) or is_oom(error):
                raise
            # What the step cannot do in the plain loop either is no reason to give up graphs.
            self._run(step)
            step.rewind()
            logger.warning("no CUDA graph, the steps run one by one (cuda_graph=True raises instead): %s", error)
            self._captures = False
            engine = self._new_engine()
            engine.capture(functools.partial(self._run, step), step.rewind)
        return step, engine

    def _new_engine(self) -> Engine:
        return CudaGraphEngine(self._graphs) if self._captures else LoopEngine()

    def unlock(self) -> None:
        """Forget a lock whose holder is gone."""
        self._lock = threading.RLock()


def _after_fork() -> None:
    """Let a forked child sample: the threads that held locks, and OpenMP's, stayed with its parent."""
    for pool in list(_POOLS):
        pool.unlock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
