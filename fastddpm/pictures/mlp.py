"""A small network for points: predicts the noise in x_t, and is trained in seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastddpm.checks import integer
from fastddpm.machine.devices import plain_torch
from fastddpm.sampling.network import Network
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.training.loss import ddpm_loss
from fastddpm.unet.blocks import timestep_embedding

# Sines and cosines of the time embedding; the fastest turn once in about 6 of 1000 timesteps.
_TIME_FEATURES = 64
# Steps from one loss that the bar shows to the next: to read it waits for the device.
_LOSS_EVERY = 50


class PointMLP(nn.Module):
    """eps_theta(x_t, t) for points: residual blocks, each shifted by an embedding of t.

    Args:
        diffusion: the process that the network is trained for; kept as `.diffusion`, where the sampler looks for it.
    """

    def __init__(self, diffusion: DiffusionConfig, dimension: int = 2, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.diffusion = diffusion
        self.first = nn.Linear(dimension, width)
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.last = nn.Linear(width, dimension)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise in x_t, float32 [B, D] like x, at timesteps t [B] (0-based)."""
        T = self.diffusion.num_timesteps
        if len(t) < T:
            return self.denoise(x, self.shifts(t))
        # What depends on t alone is computed once per timestep where there are fewer of these than points.
        return self.denoise(x, nn.functional.embedding(t.long(), self.shifts(torch.arange(T, device=t.device))))

    def shifts(self, t: Tensor) -> Tensor:
        """What the blocks add at timesteps t [N], side by side: [N, depth * width]."""
        # As in Ho et al. 2020, and the same angles whatever T is.
        position = t.float() * (1000.0 / self.diffusion.num_timesteps)
        emb = self.time(timestep_embedding(position, _TIME_FEATURES, flip_sin_to_cos=False, freq_shift=1))
        return torch.cat([block.shift(emb) for block in self.blocks], dim=1)  # type: ignore[operator]

    def denoise(self, x: Tensor, shifts: Tensor) -> Tensor:
        """The network after its embedding: x [B, D] and `shifts`, [B, depth * width] or one row for all."""
        h = self.first(x)
        for block, shift in zip(self.blocks, shifts.chunk(len(self.blocks), dim=1), strict=True):
            h = block(h, shift)
        return self.last(nn.functional.silu(h))

    def sampling_networks(self, timesteps: Tensor, *, compile_model: bool, strict: bool) -> Callable[[int], Network]:
        """Its form for sampling, where all points share a timestep: the shifts are looked up by row."""
        shifts = self.shifts(timesteps)
        network = _ByRow(lambda x, row: self.denoise(x, shifts[row]), compile_model=compile_model, strict=strict)
        return lambda batch: network


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.shift = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, shift: Tensor) -> Tensor:
        return h + self.outer(nn.functional.silu(self.inner(nn.functional.silu(h)) + shift))


class _ByRow(Network):
    """Calls with the row of the table instead of t."""

    reads_t = False
    shares_weights = False

    def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Mapping[str, Any]) -> Any:
        return self._call(x, row, **kwargs)


def train_points(
    x_0: Tensor,
    diffusion: DiffusionConfig,
    *,
    steps: int = 4000,
    batch: int = 1024,
    lr: float = 3e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    progress: bool = True,
) -> PointMLP:
    """Train a `PointMLP` by Algorithm 1 of Ho et al. 2020: L_simple, AdamW, the learning rate falling to 0 as a cosine.

    Batch, timesteps and noise of step n are functions of (seed, n).

    Args:
        x_0: float32 [N, D], the data.
        diffusion: schedule and T; predicts epsilon.
        batch: points per step, drawn with replacement.
        seed: of weights, batches, timesteps and noise.
        progress: show a bar with the loss on stderr.

    Returns:
        The trained network, in eval mode.

    Raises:
        ValueError: steps or batch is not positive, or the diffusion does not predict epsilon.
        FloatingPointError: the loss became infinite or NaN.
    """
    steps, batch = integer("steps", steps, 1), integer("batch", batch, 1)
    if diffusion.prediction_type != "epsilon":
        raise ValueError(f"the points' network predicts epsilon, got prediction_type {diffusion.prediction_type!r}")
    with torch.random.fork_rng(devices=[]), plain_torch():
        torch.manual_seed(seed % 2**63)
        model = PointMLP(diffusion, x_0.shape[1]).to(device)
    data, schedule = x_0.to(device), diffusion.schedule()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    bar = tqdm(range(steps), unit="step", desc="training", disable=not progress)
    for n in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * n / steps))
        k = np.random.Generator(np.random.Philox(key=[seed % 2**64, n])).integers(0, len(data), batch)
        # Timesteps and noise go by the place in the batch, as a point may come twice.
        loss = ddpm_loss(model, data[torch.from_numpy(k).to(device)], schedule, seed=seed, step=n, backend=backend)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if n % _LOSS_EVERY == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} after {steps} steps; use a smaller learning rate")
    return model.eval()
