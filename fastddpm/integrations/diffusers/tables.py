"""Rows by timestep: made when first used, kept on the device of the samples, made anew when the scheduler changes."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastddpm.integrations.diffusers.rows import PREDICTION_TYPES, by_timestep, q_rows

_CPU = torch.device("cpu")
_FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Attributes of diffusers' schedulers that rows are made from; assigning one of them makes the rows anew.
_SOURCES = frozenset(
    {
        "_internal_dict",
        "alphas_cumprod",
        "custom_timesteps",
        "final_alpha_cumprod",
        "num_inference_steps",
        "timesteps",
        "variance_type",
    }
)
# eta is part of a table's key: a caller who varies it at every step must not fill the memory.
_MAX_TABLES = 32


@dataclass
class _State:
    """What was made of the scheduler's attributes since they last changed.

    Attributes:
        listed: `timesteps` on the CPU.
        visited: the same as Python numbers, made when first needed.
        tables: by kind, device and options.
    """

    listed: Tensor
    visited: list[int] | None = None
    tables: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


class RowTables(ABC):
    """Mixin before one of diffusers' scheduler classes: rows, and timesteps found without reading from a device."""

    alphas_cumprod: Tensor
    timesteps: Tensor
    config: Any
    _original: ClassVar[type]
    _default_options: ClassVar[dict[str, Any]] = {}
    _state: _State | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Saved files name a class by its __name__ and its instance's __module__, and are to load where there is no
        # fastddpm. The class itself is still found, and pickled, by its __qualname__ and its own __module__.
        cls.__name__ = getattr(cls, "_original", cls).__name__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__new__(cls)
        object.__setattr__(scheduler, "__module__", cls._original.__module__)
        return scheduler

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _SOURCES:
            object.__setattr__(self, "_state", None)

    @property
    @abstractmethod
    def takes_only_listed(self) -> bool:
        """Whether a step takes only the timesteps that set_timesteps listed, not all 0..T-1."""

    @abstractmethod
    def transitions(self) -> tuple[Tensor, Tensor]:
        """Return the timesteps that a step takes, int64 [n] on the CPU, and the ones that they lead to."""

    @abstractmethod
    def make_rows(self, t: Tensor, prev_t: Tensor, **options: Any) -> Tensor:
        """Tabulate the steps from t to prev_t on the CPU, float32 [n, K]."""

    def step_rows(self, **options: Any) -> Tensor:
        """Tabulate all steps by timestep on the CPU, float32 [T + 1, K]; NaN where there is none."""
        T = len(self.alphas_cumprod)
        t, prev_t = self.transitions()
        known = (t >= 0) & (t < T)
        t, prev_t = t[known], prev_t[known]
        return by_timestep(self.make_rows(t, prev_t, **options), t, T)

    def float32_alphas_cumprod(self) -> Tensor:
        """Return alpha_bar as diffusers computed it: float32 [T] on the CPU."""
        return self.alphas_cumprod.detach().cpu().float()

    def move_timesteps(self, device: torch.device | str | None) -> None:
        """Move `timesteps` from the CPU to a device, keeping what the host can read."""
        listed = self.timesteps
        self.timesteps = listed.to(device)
        self._state = _State(listed)
        if self.config.prediction_type in PREDICTION_TYPES:
            # Made now, so that a compiled step finds them.
            self.table("step", self.timesteps.device, **self._default_options)
            self.table("index", self.timesteps.device)

    def listed(self) -> Tensor:
        """Return `timesteps` on the CPU."""
        return self._current().listed

    def visited(self) -> list[int]:
        """Return `timesteps` as Python numbers."""
        state = self._current()
        if state.visited is None:
            state.visited = state.listed.tolist()
        return state.visited

    def table(self, kind: str, device: torch.device, **options: Any) -> Tensor:
        """Return a table on `device`: the rows of "step", "q" (add_noise) or "v" (get_velocity), or 0..T as "index"."""
        tables = self._current().tables
        key = (kind, str(device), *options.values())
        if key not in tables:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                # Made under inference_mode, it would be useless to a later call that needs gradients.
                with torch.inference_mode(False):
                    return self.table(kind, device, **options)
            if len(tables) >= _MAX_TABLES:
                tables.clear()
            on_cpu = self._make(kind, options) if device.type == "cpu" else self.table(kind, _CPU, **options)
            tables[key] = on_cpu.to(device)
        return tables[key]

    def _current(self) -> _State:
        if self._state is None:
            self._state = _State(self.timesteps.cpu())
        return self._state

    def _make(self, kind: str, options: dict[str, Any]) -> Tensor:
        if kind == "index":
            return torch.arange(len(self.alphas_cumprod) + 1)
        if kind == "step":
            return self.step_rows(**options)
        rows = q_rows(self.float32_alphas_cumprod())
        return rows * torch.tensor([1.0, -1.0]) if kind == "v" else rows

    def host_timestep(self, timestep: Any) -> int | None:
        """Return the timestep as a Python int, or None where only the accelerator knows it.

        Raises:
            IndexError: it is no integer, or not one that a step takes.
            RuntimeError: it holds more than one timestep.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise RuntimeError(f"timestep must hold one value, got shape {list(timestep.shape)}; step takes one t")
            if timestep.is_floating_point() or timestep.is_complex():
                raise IndexError(f"timestep must be an integer, got {timestep.dtype}; it is an index into the schedule")
            if torch.compiler.is_compiling():
                return None
            known = self._read_on_host(timestep)
        else:
            # operator.index would make a constant of the symbolic int that a compiled step is given.
            known = timestep if isinstance(timestep, int) else _as_int(timestep)
        if known is not None:
            self.check_timestep(known)
        return known

    def _read_on_host(self, timestep: Tensor) -> int | None:
        if timestep.device.type == "cpu":
            return int(timestep)
        # `for t in scheduler.timesteps` yields views, whose place in the list the host knows.
        whole = self.timesteps
        if timestep.device != whole.device or timestep.dtype != whole.dtype:
            return None
        if timestep.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return None
        distance = int(timestep.storage_offset()) - int(whole.storage_offset())
        position, remainder = divmod(distance, whole.stride(0) or 1)
        visited = self.visited()
        return visited[position] if remainder == 0 and 0 <= position < len(visited) else None

    def check_timestep(self, t: int) -> None:
        """Raise IndexError unless a step takes timestep t."""
        T = len(self.alphas_cumprod)
        if not 0 <= t < T:
            raise IndexError(f"timestep {t} is out of range; the schedule has timesteps 0 to {T - 1}")
        # Looking up a symbolic number would compile once per timestep; the row of one that is not listed is NaN.
        if not torch.compiler.is_compiling() and self.takes_only_listed and t not in self.visited():
            raise IndexError(f"timestep {t} is not in the list that set_timesteps made; step takes those in .timesteps")

    def row(self, timestep: Any, known: int | None, device: torch.device) -> Tensor:
        """Return the row's index, int64 [1] on `device`, without reading from the device."""
        if known is not None:
            return self.table("index", device).narrow(0, known, 1)
        return self.safe_index(timestep.reshape(1), device)

    def safe_index(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """Return int64 indices [n] on `device`; those out of range become T, whose row is NaN."""
        T = len(self.alphas_cumprod)
        t = timesteps.to(device=device, dtype=torch.int64)
        return t.where((t >= 0) & (t < T), T)


def fuses(*tensors: Tensor) -> bool:
    """Tell whether the fused operations take these dtypes; float64 is not among them."""
    return all(tensor.dtype in _FUSED_DTYPES for tensor in tensors)


def needs_gradient(*tensors: Tensor) -> bool:
    """Tell whether something is to be differentiated, which a step that returns x_0 as well cannot be."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _as_int(timestep: Any) -> int:
    try:
        return operator.index(timestep)
    except TypeError:
        raise IndexError(f"timestep must be an integer or a tensor of one, got {timestep!r}") from None
