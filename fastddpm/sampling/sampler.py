"""The sampler: Algorithm 2 of Ho et al. (2020) for any table, as one step that is captured once and replayed."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastddpm.errors import ModelOutputError
from fastddpm.ops.backend import use_triton
from fastddpm.sampling import model as net
from fastddpm.sampling.compile_policy import decide_compile
from fastddpm.sampling.engine import CudaGraphEngine, Engine, GraphPool, LoopEngine
from fastddpm.sampling.errors import explain, explain_cuda, is_oom, raise_if_bad
from fastddpm.sampling.options import (
    check_dtype,
    check_shape,
    decide_graph,
    device_guard,
    note_emulation,
    resolve_device,
)
from fastddpm.sampling.request import Call, ModelLimits, resolve_call
from fastddpm.sampling.step import Plan, Program
from fastddpm.tables.table import COLUMN, Table

logger = logging.getLogger("fastddpm")


class StepResult(NamedTuple):
    """What a step leaves behind.

    Attributes:
        index: row of the table that was executed, 0 first.
        t: the timestep that the network was given there.
        x_t: the state after the step (x_{t-1} of Algorithm 2), float32 [B, ...].
        x0: the estimate of x_0 that the step used, after clipping; None where it was not asked for.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody needs here
    t: float
    x_t: Tensor
    x0: Tensor | None


class Sampler:
    """Draws samples from a model with the steps of a table.

    The model is called as ``model(x, t, **kwargs)`` with x [B, ...] in `dtype` and t [B] on x's device, int64 (float32
    where the table says so); it returns the prediction, shaped like x (twice the channels for a learned variance), as
    a tensor or as an object with ``.sample``. Any nn.Module or callable will do. With labels it is also given
    ``class_labels`` int64 [B]; with guidance all of these are [2B], the conditional half first.

    The state x_t is float32 whatever `dtype` is: only the network runs in low precision. Noise depends on the seed,
    the sample id, the step and the element alone, never on the batch around a sample (a network's own rounding may).

    One sampler may be shared by threads: calls take turns, and an open `steps()` generator has buffers of its own.
    After weights were changed in a way that leaves no trace (through ``.data``, or by another process), call
    `refresh()`; `load_state_dict`, optimizer steps, ``.to()`` and ``.train()`` are noticed.

    Args:
        model: the network; a module elsewhere, or in another dtype, is copied and converted, never changed.
        table: the steps, e.g. from `ddpm_table`.
        shape: one sample's shape: (C, H, W), or (D,) for points.
        device: where to sample; default the model's.
        dtype: what the network runs in: float32, bfloat16 or float16; default the model's.
        compile: run the model through torch.compile(fullgraph=True). "auto" compiles on CUDA, and on the CPU when
            `samples_ahead` make work of `compile_policy.REPAYS_AFTER`; it falls back with a warning, True raises.
        cuda_graph: replay the step as a CUDA graph. "auto" tries on CUDA and falls back with a warning, True raises.
        backend: "auto", "triton" or "torch", for the fused step.
        null_class: the label that means "no class", for guidance; default the model's.
        check_finite: raise SamplingError when a sample has a NaN or Inf, naming step and sample.
        samples_ahead: how many samples the caller means to draw; only compile="auto" asks.

    Raises:
        ValueError: an option is unknown, or does not fit the device.
        BackendUnavailable: backend="triton", and the kernels cannot run there.
    """

    def __init__(
        self,
        model: net.Model,
        table: Table,
        shape: Sequence[int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | str = "auto",
        cuda_graph: bool | str = "auto",
        backend: str = "auto",
        null_class: int | None = None,
        check_finite: bool = False,
        samples_ahead: int = 1,
    ) -> None:
        if table.history > 1:
            raise ValueError(
                f"table {table.name!r} needs {table.history} older x0 and the fused step holds one; use one of order 2"
            )
        self.model, self.table, self.backend, self.check_finite = model, table, backend, check_finite
        self.shape = check_shape(shape)
        self.device = resolve_device(net.device_of(model) if device is None else device)
        self.dtype = check_dtype(net.dtype_of(model) if dtype is None else dtype)
        self.uses_triton = use_triton(backend, self.device)
        note_emulation(self.dtype, self.device)
        self.uses_graph = decide_graph(cuda_graph, self.device)
        self.compiles = decide_compile(compile, self.device, model, self.shape, samples_ahead * len(table))
        self._strict_compile, self._strict_graph = compile is True, cuda_graph is True
        null = net.null_class_of(model) if null_class is None else null_class
        self._limits = ModelLimits(null, net.num_labels_of(model))
        self._lock = threading.RLock()
        self._programs: dict[Plan, list[tuple[Program, Engine]]] = {}
        self._pool = GraphPool(self.device)
        self._network: net.NetworkSource | None = None
        self._generation = 0
        self._fingerprint: tuple[Any, ...] = ()
        self._last_use: torch.cuda.Event | None = None
        # Plain Python numbers, so that the loop reads nothing back from the device.
        self._timesteps: list[float] = table.timesteps.tolist()
        self._noisy: list[bool] = (table.rows[:, COLUMN["sigma"]] != 0).tolist()
        if isinstance(model, nn.Module) and model.training:
            logger.warning("the model is in training mode, so its dropout is active; call model.eval() to sample")

    def sample(
        self,
        *,
        callback: Callable[[StepResult], None] | None = None,
        return_x0: bool = False,
        **call: Any,
    ) -> Any:
        """Draw samples: x_T ~ N(0, I), then one step per row of the table.

        Noise comes from exactly one of `seeds`, `seed` with `sample_ids`, `generator`, or `noise`.

        Args:
            seeds: one seed per sample; equal seeds give equal samples. An int is one sample.
            seed: one seed for all, told apart by `sample_ids`.
            sample_ids: one id per sample, with `seed`; default 0, 1, ... batch_size - 1.
            generator: a torch.Generator, or one per sample: torch.randn on its device, x_T first, then z for each step
                that adds noise, in diffusers' order (always in float32).
            noise: z for every step, [steps, B, ...], or a callable: step index -> [B, ...]. Needs `x_T`.
            x_T: the start [B, ...] instead of one from the noise source.
            batch_size: B, where nothing else tells.
            class_labels: an int for all samples or integers [B].
            guidance: weight w of classifier-free guidance, m = m_u + w (m_c - m_u) (Ho & Salimans 2022, with w = 1 + w'
                of their eq. 6); 1.0 means none, and runs one network call per sample instead of two.
            model_kwargs: further keyword arguments of the model; tensors of B rows are repeated for guidance.
            callback: called after each step with a `StepResult` of live tensors: clone what outlives the call. It may
                write into x_t. Its x0 is None unless `return_x0`.
            return_x0: also return the last step's estimate of x_0.

        Returns:
            x, float32 [B, ...] on the sampler's device; or (x, x0).

        Raises:
            ValueError: arguments that contradict each other or do not fit.
            ModelOutputError: the model returned no prediction for x.
            SamplingError: a step failed; the original exception is its cause.
            torch.OutOfMemoryError: memory ran out; the sampler has freed its buffers and graphs, see `clear`.
        """
        request = self._resolve(call, x0_out=return_x0)
        with self._turn(), self._checkout(request.plan) as (program, engine):
            for result in self._run(program, engine, request):
                if callback is not None:
                    callback(result if return_x0 else result._replace(x0=None))
                    program.feed_network()
            x = program.x_t.clone()
            return (x, _present(program.x0).clone()) if return_x0 else x

    def steps(self, **call: Any) -> Iterator[StepResult]:
        """Yield a `StepResult` of copies after each step; arguments as in `sample`."""
        request = self._resolve(call, x0_out=True)
        with self._checkout(request.plan) as (program, engine):
            run = self._run(program, engine, request)
            while True:
                with self._turn():
                    live = next(run, None)
                    if live is None:
                        return
                    copies = live._replace(x_t=live.x_t.clone(), x0=_present(live.x0).clone())
                yield copies

    def warmup(self, *, return_x0: bool = False, **call: Any) -> None:
        """Compile and capture what a `sample` with these arguments needs, and run one step of it.

        A generator among the arguments advances; pass seeds instead. On CUDA, call it before other threads use the
        GPU: while a step is captured, PyTorch raises wherever the process waits for the device.
        """
        request = self._resolve(call, x0_out=return_x0)
        with self._turn(), self._checkout(request.plan) as (program, engine):
            next(self._run(program, engine, request), None)

    def refresh(self) -> None:
        """Take the model's weights again: needed after changes in place that leave no trace."""
        with self._turn():
            self.clear()
            self._network = None

    def clear(self) -> None:
        """Free buffers, captured graphs and their memory pool; the next call builds them again.

        Each batch size and each set of switches keeps its own until then.
        """
        with self._turn():
            self._generation += 1
            for _, engine in (entry for entries in self._programs.values() for entry in entries):
                engine.reset()
            self._programs.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _resolve(self, call: dict[str, Any], *, x0_out: bool) -> Call:
        return resolve_call(self.table, self.shape, self._limits, x0_out=x0_out, check_finite=self.check_finite, **call)

    def _run(self, program: Program, engine: Engine, call: Call) -> Iterator[StepResult]:
        """Algorithm 2: x_T ~ N(0, I); for t = T, ..., 1: x_{t-1} ~ p_theta(x_{t-1} | x_t)."""
        program.load(call.x_T, call.seed, call.sample_id, call.class_labels, call.guidance, call.kwargs)
        for i, t in enumerate(self._timesteps):
            with explain(f"step {i} of {len(self._timesteps)} (t = {t})", call.plan, self.shape, self.dtype):
                if call.draw is not None and self._noisy[i]:
                    _present(program.z).copy_(call.draw(i))
                engine.replay()
            yield StepResult(i, t, program.x_t, program.x0)
        if program.first_bad is not None:
            raise_if_bad(program.first_bad.tolist(), self._timesteps, call)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the sampler: one thread at a time, on its device, after whatever an earlier turn left running."""
        with self._lock, explain_cuda(), torch.inference_mode(False), torch.no_grad(), device_guard(self.device):
            if self._last_use is not None:
                torch.cuda.current_stream().wait_event(self._last_use)
            try:
                yield
            except torch.OutOfMemoryError:
                self.clear()
                raise
            finally:
                if self.device.type == "cuda":
                    # Fails where CUDA has failed; what ended the turn is the error to report.
                    with contextlib.suppress(RuntimeError):
                        self._last_use = torch.cuda.current_stream().record_event()

    @contextlib.contextmanager
    def _checkout(self, plan: Plan) -> Iterator[tuple[Program, Engine]]:
        """Lend a program that nobody else uses; one whose run failed is not used again."""
        with self._turn():
            self._notice_changes()
            idle = self._programs.setdefault(plan, [])
            with explain("preparation", plan, self.shape, self.dtype):
                program, engine = idle.pop() if idle else self._build(plan)
            generation = self._generation
        try:
            yield program, engine
        except GeneratorExit:
            self._take_back(plan, program, engine, generation)
            raise
        except BaseException:
            # Fails as well where CUDA has failed; what ended the run is the error to report.
            with contextlib.suppress(RuntimeError), self._turn():
                engine.reset()
            raise
        else:
            self._take_back(plan, program, engine, generation)

    def _take_back(self, plan: Plan, program: Program, engine: Engine, generation: int) -> None:
        with self._turn():
            if generation == self._generation:
                self._programs.setdefault(plan, []).append((program, engine))
            else:
                engine.reset()

    def _notice_changes(self) -> None:
        fingerprint = net.fingerprint(self.model)
        if fingerprint != self._fingerprint:
            self.refresh()
            self._fingerprint = fingerprint

    def _build(self, plan: Plan) -> tuple[Program, Engine]:
        if self._network is None:
            self._network = net.NetworkSource(
                net.place(self.model, self.device, self.dtype),
                self.table.timesteps.to(self.device),
                compile_model=self.compiles,
                strict=self._strict_compile,
            )
        program = Program(
            plan,
            self._network.for_batch(plan.network_batch),
            self.table,
            self.shape,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
            compiled=self.compiles,
        )
        engine = self._new_engine()
        try:
            engine.capture(program.step, program.rewind)
        except Exception as error:
            if self._strict_graph or not self.uses_graph or isinstance(error, ModelOutputError) or is_oom(error):
                raise
            # What the step cannot do in the plain loop either is no reason to give up graphs.
            program.step()
            program.rewind()
            logger.warning("no CUDA graph, the steps run one by one (cuda_graph=True raises instead): %s", error)
            self.uses_graph = False
            engine = self._new_engine()
            engine.capture(program.step, program.rewind)
        return program, engine

    def _new_engine(self) -> Engine:
        return CudaGraphEngine(self._pool) if self.uses_graph else LoopEngine()


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
