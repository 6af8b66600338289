"""The forward process of both schedulers: add_noise and get_velocity on the fused q_sample."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.tables import RowTables, fuses


class Noising(RowTables):
    """Mixin before one of diffusers' scheduler classes."""

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
        timesteps = timesteps.flatten()
        self._check_on_host(timesteps)
        index = self.safe_index(timesteps, x.device)
        shape = torch.broadcast_shapes(x.shape, y.shape, (len(index), *[1] * (max(x.dim(), y.dim()) - 1)))
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype).expand(shape), y.to(dtype).expand(shape)
        if not fuses(x, y):
            return self._mix_in_float64(kind, x, y, index)
        mixed = ops.q_sample(x, self.table(kind, x.device), index, y)
        assert isinstance(mixed, Tensor)
        return mixed

    def _mix_in_float64(self, kind: str, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Mix as diffusers does, in the dtype of the samples."""
        alpha_bar = self.alphas_cumprod.to(device=x.device, dtype=x.dtype)
        alpha_bar = torch.cat([alpha_bar, alpha_bar.new_full((1,), float("nan"))])[index]
        alpha_bar = alpha_bar.view(-1, *[1] * (x.dim() - 1))
        signal, noise = alpha_bar.sqrt() * x, (1 - alpha_bar).sqrt() * y
        return signal - noise if kind == "v" else signal + noise

    def _check_on_host(self, timesteps: Tensor) -> None:
        if timesteps.is_floating_point() or timesteps.is_complex():
            raise IndexError(f"timesteps must be integers, got {timesteps.dtype}; they are indices into the schedule")
        if timesteps.device.type != "cpu" or torch.compiler.is_compiling() or timesteps.numel() == 0:
            return
        T, low, high = len(self.alphas_cumprod), int(timesteps.min()), int(timesteps.max())
        if low < 0 or high >= T:
            raise IndexError(f"timesteps must lie in 0..{T - 1}, got {low if low < 0 else high}")
