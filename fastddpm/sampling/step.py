"""One reverse step over static buffers, for one batch size and one set of switches; and what its errors read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.errors import FastDDPMError, ModelOutputError, SamplingError
from fastddpm.noise import v1 as noise
from fastddpm.sampling.guidance import gradient, rescaled, shifted
from fastddpm.sampling.network import Network, unwrap
from fastddpm.sampling.options import Options
from fastddpm.sampling.request import COUNTER, GIVEN, Request, StepKey
from fastddpm.tables.table import COLUMN, Table


class StaticStep:
    """Static buffers, and the parts of the step that works on them.

    No part makes a decision that depends on a tensor's value, or reads what a request sets except through the buffers,
    so that the step may be captured before the first request's data arrive.

    Args:
        options: shape, device, the network's dtype, the fused step's backend.

    Attributes:
        x_t: the state, float32 [B, ...]; each step replaces it by x_{t-1}.
        x0: the last estimate of x_0, float32 [B, ...], where the key keeps it.
        history: the older x0 that the table's rows need, float32 [H, B, ...], a ring: see `ops.p_sample`.
        z: the noise of the next step, float32 [B, ...]: the caller's where the key says "given", or drawn ahead.
        row: the next row of the table, int64 [1].
        graph: the step as a CUDA graph, where it was captured.
    """

    def __init__(self, key: StepKey, network: Network, table: Table, options: Options) -> None:
        self.key, self.network, self.table, self.options = key, network, table, options
        self._reads_t = getattr(network, "reads_t", True)
        B, n, shape, dtype = key.batch, key.network_batch, options.shape, options.dtype

        def buffer(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=options.device)

        self.graph: torch.cuda.CUDAGraph | None = None
        self.rows = table.rows.to(options.device, copy=True)
        self.timesteps = table.timesteps.to(options.device, copy=True)
        self.levels = None if table.levels is None else table.levels.to(options.device, torch.float32)
        # The same for every input of the network; as a view of it, an index of its own is never made.
        self._index = buffer(n, dtype=torch.int64)
        self.row = self._index[:1]
        self.t = buffer(n, dtype=table.timesteps.dtype)
        self.seed = buffer(B, dtype=torch.int64)
        self.sample_id = buffer(B, dtype=torch.int64)
        self.class_labels = buffer(n, dtype=torch.int64) if key.labels else None
        self.x_in = buffer(n, *shape, dtype=dtype).to(memory_format=network.memory_format)
        # Not the network's input, which a network may write into.
        self.x_t = buffer(B, *shape)
        self.x0 = buffer(B, *shape) if key.x0_out or options.self_condition else None
        self.history = buffer(table.history, B, *shape) if table.history else None
        self._compiled = options.compiles and getattr(network, "compiles_step", True)
        self._how: dict[str, Any] = {"backend": options.backend, "compiled": self._compiled}
        # The compiled twin of the step makes memory for noise that it draws itself; for normals two by two, the
        # compiled twin of the draw needs none.
        pays = self._compiled and options.device.type == "cpu" and not options.uses_triton and math.prod(shape) % 2 == 0
        self._draws_ahead = key.noise == COUNTER and (pays or key.cond_form == "mean")
        self._forward = noise.Counter(self.seed, self.sample_id, self.row, noise.STREAM_FORWARD)
        # Known data, and where they are not.
        self.known = (buffer(B, *shape), buffer(B, *shape, dtype=torch.bool)) if key.masked else ()
        self.z = buffer(B, *shape) if key.noise == GIVEN or self._draws_ahead else None
        self.first_bad = buffer(B, dtype=torch.int64) if key.check_finite else None
        self._rescale = buffer(1) if key.rescaled else None
        self._shift = buffer(len(table)) if key.cond_form == "epsilon" else None
        self._kwargs = {name: buffer(*size, dtype=dtype) for name, size, dtype in key.buffers}
        self.x0_in = torch.zeros_like(self.x_in) if options.self_condition else None
        if options.self_condition and self.x0_in is not None:
            self._kwargs[options.self_condition] = self.x0_in
        if self.class_labels is not None:
            self._kwargs["class_labels"] = self.class_labels
        self.kwargs = {**self._kwargs, **dict(key.values)}
        network.load(self.class_labels)

    def predict(self) -> Tensor:
        """Return m = model(x_t, t), [B, ...], or [2B, ...] with guidance that is left to the step."""
        if self.key.guided:
            self.x_in[self.key.batch :].copy_(self.x_in[: self.key.batch])
        if self._reads_t or self.key.cond_fn:
            torch.index_select(self.timesteps, 0, self._index, out=self.t)
        m = self._checked(unwrap(self.network(self.x_in, self.t, self.row, self.kwargs)))
        if self._rescale is not None:
            m = rescaled(m, self._column("w"), self._rescale, self.options.shape[0])
        if self._shift is not None:
            m = shifted(m, self._shift.index_select(0, self.row) * self._gradient(), self.options.shape[0])
        return m

    def _column(self, name: str) -> Tensor:
        return self.rows[:, COLUMN[name]].index_select(0, self.row)

    def _gradient(self) -> Tensor:
        assert self.key.cond_fn is not None
        kwargs = {name: value for name, value in self.kwargs.items() if value is not self.x0_in}
        return gradient(self.key.cond_fn, self.x_t, self.t, kwargs)

    def update(self, m: Tensor) -> None:
        """Replace x_t by x_{t-1} ~ p_theta(x_{t-1} | x_t), given the network's output m."""
        table = self.table
        ops.p_sample(
            self.x_t,
            m,
            self.rows,
            self.row,
            self._noise(m),
            clip=table.clip,
            learned=table.learned,
            guided=self.key.guided and not self.key.rescaled,
            use_m=table.use_m,
            history=self.history,
            out=self.x_t,
            x0_out=self.x0,
            # What is pasted changes x_t once more.
            low_out=None if self.key.masked else self.x_in[: self.key.batch],
            **self._how,
        )
        if self.x0_in is not None and self.x0 is not None:
            self.x0_in.unflatten(0, (1 + self.key.guided, self.key.batch)).copy_(self.x0)
        if self.first_bad is not None:
            bad = ~torch.isfinite(self.x_t).flatten(1).all(dim=1)
            self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), self.row, self.first_bad))

    def settle(self, compiled: bool | None) -> bool:
        """Whether the network runs compiled, from now on; see `Network`."""
        settle = getattr(self.network, "settle", None)
        return self.options.compiles if settle is None else settle(self.x_in, self.t, self.kwargs, compiled)

    def next_row(self) -> None:
        """Go on to the next row of the table."""
        self._index.add_(1)

    def paste(self) -> None:
        """Replace the known part of x_t by a draw from q(x_t | known) at its level (Lugmayr et al. 2022, eq. 8a)."""
        if self.known and self.levels is not None:
            known, drawn = self.known
            ops.q_sample(known, self.levels, self.row, self._forward, out=self.x_t, keep=drawn, **self._how)
            self.feed_network()

    def _noise(self, m: Tensor) -> noise.Counter | Tensor | None:
        if self.key.noise == COUNTER:
            counter = noise.Counter(self.seed, self.sample_id, self.row, noise.STREAM_REVERSE)
            if not self._draws_ahead:
                return counter
            ops.randn(counter, self.options.shape, out=self.z, **self._how)
        if self.key.cond_form == "mean" and self.z is not None:
            # mu + std (z + std g): the mean moves by Sigma g   (Dhariwal & Nichol 2021, Algorithm 1).
            std = self._column("sigma")
            if self.table.learned:
                v = m[: self.key.batch, self.options.shape[0] :]
                std = std * torch.exp(self._column("h0") + self._column("h1") * v)
            self.z.add_(std * self._gradient())
        return self.z

    def rewind(self, row: int = 0) -> None:
        """Go back to the first row, or to another, leaving the other buffers as they are."""
        self._index.fill_(row)

    def load(self, request: Request) -> None:
        """Write a request's data into the buffers; x_T ~ N(0, I) comes from the seeds unless the caller brings it."""
        self.rewind()
        self.seed.copy_(request.seed)
        self.sample_id.copy_(request.sample_id)
        self.rows[:, COLUMN["w"]] = request.guidance.w
        if self._rescale is not None:
            self._rescale.fill_(request.guidance.phi)
        if self._shift is not None and request.guidance.shift is not None:
            self._shift.copy_(request.guidance.shift)
        if self.class_labels is not None and request.class_labels is not None:
            self.class_labels.copy_(request.class_labels)
        self._load_kwargs(request.kwargs)
        for scratch in (self.x0, self.x0_in, self.history, self.z):
            if scratch is not None:
                scratch.zero_()
        if self.first_bad is not None:
            self.first_bad.fill_(-1)
        for buffer, given in zip(self.known, request.known or (), strict=True):
            buffer.copy_(given)
        self.x_t.copy_(self._first_state(request))
        self.paste()
        self.feed_network()
        self.network.load(self.class_labels)

    def _first_state(self, request: Request) -> Tensor:
        if request.init is not None and self.levels is not None:
            # SDEdit (Meng et al. 2022).
            x_0 = request.init.to(self.levels)
            eps = self._forward if request.x_T is None else request.x_T.to(x_0)
            return ops.q_sample(x_0, self.levels, self.row, eps, backend=self.options.backend)  # type: ignore[return-value]
        if request.x_T is not None:
            return request.x_T
        counter = self._forward._replace(stream=noise.STREAM_X_T)
        return ops.randn(counter, self.options.shape, backend=self.options.backend)

    def _load_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        self.kwargs = dict(self._kwargs)
        for name, value in kwargs.items():
            buffer = self._kwargs.get(name)
            if buffer is None:
                self.kwargs[name] = value.to(self.x_t.device, copy=True) if isinstance(value, Tensor) else value
            elif isinstance(value, Tensor):
                buffer.copy_(value)
            else:
                buffer.fill_(value)

    def feed_network(self) -> None:
        """Copy x_t into the network's input; needed after x_t was edited."""
        self.x_in[: self.key.batch].copy_(self.x_t)

    def _checked(self, m: Any) -> Tensor:
        if not isinstance(m, Tensor):
            raise ModelOutputError(
                f"the model returned {type(m).__name__}; it must return a tensor, or an object with a tensor `.sample`"
            )
        n, (channels, *rest) = self.key.network_batch, self.options.shape
        expected = (n, 2 * channels if self.table.learned else channels, *rest)
        if tuple(m.shape) == expected:
            return m
        message = (
            f"the model returned shape {tuple(m.shape)} for x of shape {tuple(self.x_in.shape)}; expected {expected}"
        )
        if tuple(m.shape) == (n, 2 * channels, *rest):
            message += "; an output of twice the channels needs variance_type 'learned' or 'learned_range'"
        elif self.table.learned and tuple(m.shape) == (n, channels, *rest):
            message += "; a table with a learned variance needs twice the channels: use a fixed variance_type"
        raise ModelOutputError(message)


def is_oom(error: BaseException) -> bool:
    """Tell whether memory ran out, on a GPU or on the CPU (where PyTorch raises a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextlib.contextmanager
def explain(where: str, key: StepKey, options: Options) -> Iterator[None]:
    """Raise what goes wrong inside again with its place; the original is the cause.

    Raises:
        torch.OutOfMemoryError: memory ran out; the message has the sizes.
        ModelOutputError: the model returned no prediction.
        SamplingError: anything else but the library's own errors, which pass as they are.
    """
    try:
        yield
    except ModelOutputError as error:
        raise ModelOutputError(f"{where}: {error}") from error
    except FastDDPMError:
        raise
    except Exception as error:
        if is_oom(error):
            size = f"network input [{key.network_batch}, {', '.join(map(str, options.shape))}] in {options.dtype}"
            raise torch.OutOfMemoryError(
                f"out of memory at {where}, {size}; use a smaller batch or dtype=torch.bfloat16 ({error})"
            ) from error
        raise SamplingError(f"{where} failed: {type(error).__name__}: {error}{_advice(error)}") from error


@contextlib.contextmanager
def explain_cuda() -> Iterator[None]:
    """Say what an error of CUDA means for the process, where `explain` has not.

    Raises:
        SamplingError: CUDA failed; other errors pass as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FastDDPMError) or is_oom(error) or not _advice(error):
            raise
        raise SamplingError(f"{error}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    if "CUDA error" in str(error):
        return " (this process may not be able to use CUDA any more: start a new one)"
    return ""


def raise_if_bad(first_bad: Sequence[int], timesteps: Sequence[float], request: Request) -> None:
    """Raise SamplingError when a sample's first non-finite step is recorded (-1: none)."""
    bad = [(step, i) for i, step in enumerate(first_bad) if step >= 0]
    if bad:
        step, i = min(bad)
        others = f" ({len(bad)} of {len(first_bad)} samples affected)" if len(bad) > 1 else ""
        raise SamplingError(
            f"x_t is not finite after step {step} (t = {timesteps[step]}) for {request.name(i)}{others}; look at the "
            "model's output there, or run it in float32"
        )
