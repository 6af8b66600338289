"""A program: one reverse step over static buffers, for one batch size and one set of switches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.errors import ModelOutputError
from fastddpm.noise import v1 as noise
from fastddpm.ops.backend import use_triton
from fastddpm.sampling.model import Network, unwrap
from fastddpm.tables.table import COLUMN, K, Table

COUNTER, GIVEN, NONE = "counter", "given", "none"


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not in a buffer; calls of equal plans share one program.

    Attributes:
        batch: B, samples per step.
        noise: where z comes from: "counter" (seeds), "given" (a buffer that the caller fills) or "none".
        guided: two predictions per sample, and m = m_u + w (m_c - m_u).
        labels: the model is given class_labels.
        x0_out: the estimate of x_0 is kept.
        check_finite: each sample's first step with a NaN or Inf is recorded.
        kwargs: the model's further keyword arguments: (name, value), or (name, (shape, dtype)) for tensors.
    """

    batch: int
    noise: str = COUNTER
    guided: bool = False
    labels: bool = False
    x0_out: bool = False
    check_finite: bool = False
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def network_batch(self) -> int:
        """Rows of the network's input: 2B with guidance, the conditional half first."""
        return 2 * self.batch if self.guided else self.batch


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor among the model's keyword arguments."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Program:
    """Static buffers, and the step that works on them.

    `step` makes no decision that depends on a tensor's value and reads nothing that a call sets except through the
    buffers, so that an engine may capture it before the first call's data arrive.

    Args:
        plan: batch size and switches.
        network: what predicts.
        table: the rows.
        shape: one sample's shape.
        device: where the buffers live.
        dtype: what the network is given.
        backend: "auto", "triton" or "torch".
        compiled: where the fused step is the PyTorch twin on a CPU, run it through Inductor.

    Attributes:
        x_t: the state, float32 [B, ...]; each step replaces it by x_{t-1}.
        x0: the last estimate of x_0, float32 [B, ...], where the plan or the table keeps it.
        z: the noise of the next step, float32 [B, ...]: the caller's where the plan says "given", or drawn ahead.
        row: the next row of the table, int64 [1].
    """

    def __init__(
        self,
        plan: Plan,
        network: Network,
        table: Table,
        shape: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
        compiled: bool = False,
    ) -> None:
        self.plan, self.network, self.table, self.shape = plan, network, table, shape
        self._reads_t = getattr(network, "reads_t", True)
        self._backend, self._compiled = backend, compiled
        B, n = plan.batch, plan.network_batch

        def buffer(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.rows = buffer(len(table), K)
        self.timesteps = buffer(len(table), dtype=table.timesteps.dtype)
        # The same for every input of the network; as a view of it, an index of its own is never made.
        self._index = buffer(n, dtype=torch.int64)
        self.row = self._index[:1]
        self.t = buffer(n, dtype=table.timesteps.dtype)
        self.seed = buffer(B, dtype=torch.int64)
        self.sample_id = buffer(B, dtype=torch.int64)
        self.class_labels = buffer(n, dtype=torch.int64) if plan.labels else None
        self.x_in = buffer(n, *shape, dtype=dtype).to(memory_format=network.memory_format)
        self._own_input = dtype != torch.float32 or not self.x_in.is_contiguous()
        self.x_t = buffer(B, *shape) if self._own_input else self.x_in[:B]
        self.x0 = buffer(B, *shape) if plan.x0_out or table.history else None
        # The compiled twin of the step makes memory for noise that it draws itself; for normals two by two, the
        # compiled twin of the draw needs none.
        twin = device.type == "cpu" and not use_triton(backend, device)
        self._draws_ahead = compiled and twin and plan.noise == COUNTER and math.prod(shape) % 2 == 0
        self.z = buffer(B, *shape) if plan.noise == GIVEN or self._draws_ahead else None
        self.first_bad = buffer(B, dtype=torch.int64) if plan.check_finite else None
        self.kwargs = {
            name: buffer(*value.shape, dtype=value.dtype) if isinstance(value, TensorSpec) else value
            for name, value in plan.kwargs
        }
        if self.class_labels is not None:
            self.kwargs["class_labels"] = self.class_labels
        self.rows.copy_(table.rows)
        self.timesteps.copy_(table.timesteps)
        network.load(self.class_labels)

    def step(self) -> None:
        """Replace x_t by x_{t-1} ~ p_theta(x_{t-1} | x_t) and go on to the next row (Ho et al. 2020, Algorithm 2)."""
        if self.plan.guided:
            self.x_in[self.plan.batch :].copy_(self.x_in[: self.plan.batch])
        if self._reads_t:
            torch.index_select(self.timesteps, 0, self._index, out=self.t)
        m = self._checked(unwrap(self.network(self.x_in, self.t, self.row, self.kwargs)))
        self._p_sample(m)
        if self.first_bad is not None:
            self._record_non_finite(self.first_bad)
        self._index.add_(1)

    def _p_sample(self, m: Tensor) -> None:
        table = self.table
        ops.p_sample(
            self.x_t,
            m,
            self.rows,
            self.row,
            self._noise(),
            clip=table.clip,
            learned=table.learned,
            guided=self.plan.guided,
            use_m=table.use_m,
            use_prev=table.history > 0,
            x0_prev=self.x0 if table.history else None,
            out=self.x_t,
            x0_out=self.x0,
            low_out=self.x_in[: self.plan.batch] if self._own_input else None,
            backend=self._backend,
            compiled=self._compiled,
        )

    def _noise(self) -> noise.Counter | Tensor | None:
        if self.plan.noise != COUNTER:
            return self.z
        counter = noise.Counter(self.seed, self.sample_id, self.row, noise.STREAM_REVERSE)
        if not self._draws_ahead:
            return counter
        return ops.randn(counter, self.shape, backend=self._backend, compiled=True, out=self.z)

    def _record_non_finite(self, first_bad: Tensor) -> None:
        bad = ~torch.isfinite(self.x_t).flatten(1).all(dim=1)
        first_bad.copy_(torch.where(bad & (first_bad < 0), self.row, first_bad))

    def rewind(self) -> None:
        """Go back to the first row, leaving the other buffers as they are."""
        self._index.zero_()

    def load(
        self,
        x_T: Tensor | None,
        seed: Tensor,
        sample_id: Tensor,
        class_labels: Tensor | None,
        guidance: float,
        kwargs: Mapping[str, Any],
    ) -> None:
        """Write one call's data into the buffers; x_T is drawn from the seeds where it is None."""
        self.rewind()
        self.seed.copy_(seed)
        self.sample_id.copy_(sample_id)
        self.rows[:, COLUMN["w"]].fill_(guidance)
        if self.class_labels is not None and class_labels is not None:
            self.class_labels.copy_(class_labels)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                self.kwargs[name].copy_(value)
        for scratch in (self.x0, self.z):
            if scratch is not None:
                scratch.zero_()
        if self.first_bad is not None:
            self.first_bad.fill_(-1)
        self.x_t.copy_(self._draw_x_T() if x_T is None else x_T)
        self.feed_network()
        self.network.load(self.class_labels)

    def feed_network(self) -> None:
        """Copy x_t into the network's input, where that is a buffer of its own; needed after x_t was edited."""
        if self._own_input:
            self.x_in[: self.plan.batch].copy_(self.x_t)

    def _draw_x_T(self) -> Tensor:
        counter = noise.Counter(self.seed, self.sample_id, torch.zeros_like(self.row), noise.STREAM_X_T)
        return ops.randn(counter, self.shape, torch.float32, self.x_t.device, self._backend)

    def _checked(self, m: Any) -> Tensor:
        if not isinstance(m, Tensor):
            raise ModelOutputError(
                f"the model returned {type(m).__name__}; it must return a tensor, or an object with a tensor `.sample`"
            )
        n, (channels, *rest) = self.plan.network_batch, self.shape
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
