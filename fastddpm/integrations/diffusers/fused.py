"""DDPM's and DDIM's scheduler on rows by timestep, which follow whatever its attributes and its config say now."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers import timesteps as at
from fastddpm.integrations.diffusers.fast import FastScheduler
from fastddpm.integrations.diffusers.rows import PREDICTION_TYPES, dynamic_rows, q_rows
from fastddpm.ops.operators import DTYPES
from fastddpm.tables.table import COLUMN, K, Table

_CPU = torch.device("cpu")
# eta is part of a table's key: a caller who varies it at every step must not fill the memory.
_MAX_TABLES = 32


@dataclass
class _Made:
    """What was made of a scheduler's settings.

    Attributes:
        settings: what it was made of, by name.
        versions: how often the tensors among them had been written into; None where a compiled step cannot tell.
        listed: `timesteps` on the CPU.
        tables: by kind, device and options.
    """

    settings: Mapping[str, Any]
    versions: list[int] | None
    listed: Tensor
    tables: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def visited(self) -> list[int]:
        """`listed` as Python numbers."""
        return self.listed.tolist()

    def holds_for(self, settings: Mapping[str, Any]) -> bool:
        """Whether nothing has changed since."""
        for name, value in settings.items():
            kept = self.settings[name]
            if value is not kept if isinstance(value, Tensor) else value != kept:
                return False
        versions = _versions(settings)
        return versions is None or self.versions is None or versions == self.versions


def _versions(settings: Mapping[str, Any]) -> list[int] | None:
    if torch.compiler.is_compiling():
        return None
    # Tensors made under inference_mode count no versions.
    return [v._version for v in settings.values() if isinstance(v, Tensor) and not v.is_inference()]


class FusedScheduler(FastScheduler):
    """Mixin before diffusers' DDPMScheduler or DDIMScheduler."""

    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int | None
    config: Any
    _default_options: ClassVar[dict[str, Any]] = {}
    # Makes rows of alpha_bar, t, prev_t, `settings` and a step's options.
    _rows_of: ClassVar[Callable[..., Tensor]]
    _made: _Made | None = None

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what rows are made of besides alpha_bar and timesteps, each read where diffusers' step reads it."""

    @abstractmethod
    def flags(self, **options: Any) -> dict[str, Any]:
        """Return the flags of a table made of rows."""

    @property
    def takes_only_listed(self) -> bool:
        """Whether a step takes only the timesteps that set_timesteps listed, not all 0..T-1."""
        return False

    @abstractmethod
    def transitions(self) -> tuple[Tensor, Tensor]:
        """Return the timesteps that a step takes, int64 [n] on the CPU, and the ones that they lead to."""

    @property
    def clips(self) -> bool:
        """Whether x_0 is clipped to a fixed range; dynamic thresholding takes precedence, as in diffusers."""
        return bool(self.config.clip_sample) and not self.config.thresholding

    @property
    def bound(self) -> float:
        """The clipping range, inf for none."""
        return float(self.config.clip_sample_range) if self.clips else float("inf")

    @property
    def fits_a_table(self) -> bool:
        """Whether rows that are the same for all samples express a run; dynamic thresholding makes them per sample."""
        return not self.config.thresholding

    @property
    def visited(self) -> list[int]:
        """`timesteps` as Python numbers."""
        return self._current().visited

    def listed(self) -> Tensor:
        """Return `timesteps` on the CPU."""
        return self._current().listed

    def choose_timesteps(self, device: torch.device | str | None = None, **arguments: Any) -> None:
        """Choose them on the CPU, and move them to the device, keeping what the host can read."""
        super().choose_timesteps(**arguments)
        listed = self.timesteps
        self.timesteps = listed.to(device)
        self._made = self._make(listed)
        if self.config.prediction_type in PREDICTION_TYPES:
            # Made now, so that a compiled step finds them.
            self.table("step", self.timesteps.device, **self._default_options)
            self.table("index", self.timesteps.device)

    def table(self, kind: str, device: torch.device, **options: Any) -> Tensor:
        """Return a table on `device`: the rows of "step", "q" (add_noise) or "v" (get_velocity), or 0..T as "index".

        It has a row for each timestep and one more; rows are float32, and NaN where there is no such step.
        """
        tables = self._current().tables
        key = (kind, str(device), *options.values())
        if key not in tables:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                # Made under inference_mode, it would be useless to a later call that needs gradients.
                with torch.inference_mode(False):
                    return self.table(kind, device, **options)
            if len(tables) >= _MAX_TABLES:
                tables.clear()
            on_cpu = self._tabulate(kind, options) if device.type == "cpu" else self.table(kind, _CPU, **options)
            tables[key] = on_cpu.to(device)
        return tables[key]

    def _current(self) -> _Made:
        if self._made is None or not self._made.holds_for(self._all_settings()):
            self._made = self._make(self.timesteps.cpu())
        return self._made

    def _make(self, listed: Tensor) -> _Made:
        settings = self._all_settings()
        return _Made(settings, _versions(settings), listed)

    def _all_settings(self) -> dict[str, Any]:
        spacing = (self.config.num_train_timesteps, self.num_inference_steps, self.takes_only_listed)
        tensors = {"alphas_cumprod": self.alphas_cumprod, "timesteps": self.timesteps}
        return {**tensors, "spacing": spacing, **self.settings()}

    def _tabulate(self, kind: str, options: dict[str, Any]) -> Tensor:
        T = len(self.alphas_cumprod)
        if kind == "index":
            return torch.arange(T + 1, device="cpu")
        # As diffusers computed it.
        alpha_bar = self.alphas_cumprod.detach().cpu().float()
        if kind == "step":
            t, prev_t = self.transitions()
            known = (t >= 0) & (t < T)
            rows = self._rows_of(alpha_bar, t[known], prev_t[known], **self.settings(), **options)
            by_timestep = rows.new_full((T + 1, K), float("nan"))
            by_timestep[t[known]] = rows
            return by_timestep
        rows = q_rows(alpha_bar)
        return rows * torch.tensor([1.0, -1.0], device="cpu") if kind == "v" else rows

    def host_timestep(self, timestep: Any) -> int | None:
        """Return the timestep as a Python int, checked, or None where only the accelerator knows it."""
        known = at.on_host(timestep, self.timesteps, lambda: self.visited)
        if known is not None:
            self.check_timestep(known)
        return known

    def check_timestep(self, t: int) -> None:
        """Raise IndexError unless a step takes timestep t."""
        T = len(self.alphas_cumprod)
        if not 0 <= t < T:
            raise IndexError(f"timestep {t} is out of range; the schedule has timesteps 0 to {T - 1}")
        # Looking up a symbolic number would compile once per timestep; the row of one that is not listed is NaN.
        if not torch.compiler.is_compiling() and self.takes_only_listed and t not in self.visited:
            raise IndexError(f"timestep {t} is not in the list that set_timesteps made; step takes those in .timesteps")

    def row(self, timestep: Any, known: int | None, device: torch.device) -> Tensor:
        """Return the row's index, int64 [1] on `device`, without reading from the device."""
        if known is not None:
            return self.table("index", device).narrow(0, known, 1)
        return at.safe_index(timestep.reshape(1), len(self.alphas_cumprod), device)

    def as_table(self, *, quiet_end: bool = False, **options: Any) -> Table:
        """Write the run that set_timesteps chose as a `Table`, if it fits one.

        Args:
            quiet_end: add no noise in the last step, where diffusers may.
            options: those of the step.

        Raises:
            IndexError: a timestep is out of range.
        """
        for t in self.visited:
            self.check_timestep(t)
        rows64 = self.table("step", _CPU, **options)[self.listed()].double()
        if quiet_end:
            rows64[-1, COLUMN["sigma"]] = 0.0
        name = f"diffusers' {self._original.__name__}"
        return Table(rows64, self.listed(), name=name, clip=self.clips, **self.flags(**options))

    def execute(self, rows: Tensor, row: Tensor, output: Tensor, x_t: Tensor, z: Tensor | None, **flags: Any) -> Any:
        """Run one row of a table; return x_prev and x_0, both in the dtype that x_t and the output promote to."""
        dtype = torch.promote_types(output.dtype, x_t.dtype)
        x_t = x_t.to(dtype)
        scale = None
        if self.config.thresholding:
            m = output[:, : x_t.shape[1]]
            scale, rows = dynamic_rows(
                rows[row], x_t, m, self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            )
            row = torch.arange(len(rows), device=rows.device)
        # Divided by s before its only rounding, so float32 until then.
        x_0 = x_t.new_empty(x_t.shape, dtype=dtype if scale is None else torch.float32)
        clip = self.clips or scale is not None
        x_prev = ops.p_sample(x_t, output, rows, row, z, clip=clip, x0_out=x_0, **flags)
        return x_prev, x_0 if scale is None else (x_0 / scale).to(dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise data, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4).

        Args:
            original_samples: x_0, [B, ...].
            noise: eps, of the same shape (or one that broadcasts).
            timesteps: integers [B] or [1].

        Returns:
            [B, ...] in the dtype that both promote to; the coefficients are float32 whatever that is.

        Raises:
            IndexError: a timestep on the CPU is out of range (on an accelerator its sample is NaN), or no integer.
        """
        return self._mix("q", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022); as `add_noise` else."""
        return self._mix("v", noise, sample, timesteps)

    def _mix(self, kind: str, x: Tensor, y: Tensor, timesteps: Tensor) -> Tensor:
        timesteps, T = timesteps.flatten(), len(self.alphas_cumprod)
        at.check_on_host(timesteps, T)
        index = at.safe_index(timesteps, T, x.device)
        shape = torch.broadcast_shapes(x.shape, y.shape, (len(index), *[1] * (max(x.dim(), y.dim()) - 1)))
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype).expand(shape), y.to(dtype).expand(shape)
        if dtype in DTYPES:
            return ops.q_sample(x, self.table(kind, x.device), index, y)  # type: ignore[return-value]
        # Float64, as diffusers mixes it.
        alpha_bar = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)
        alpha_bar = torch.cat([alpha_bar, alpha_bar.new_full((1,), float("nan"))])[index]
        alpha_bar = alpha_bar.view(-1, *[1] * (x.dim() - 1))
        signal, noise = alpha_bar.sqrt() * x, (1 - alpha_bar).sqrt() * y
        return signal - noise if kind == "v" else signal + noise
