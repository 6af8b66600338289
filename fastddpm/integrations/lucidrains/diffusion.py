"""denoising-diffusion-pytorch's GaussianDiffusion on the fused step: same constructor, state_dict, draws and images.

Change the import, or wrap a live instance:

    from fastddpm.integrations.lucidrains import GaussianDiffusion
    diffusion = fastddpm.integrations.lucidrains.accelerate(diffusion)

Reproduced, since images depend on it: the float32 arithmetic of each step, no draw before the last step, a draw that
eta = 0 throws away in DDIM, timesteps truncated towards zero, loss weights by the signal-to-noise ratio.
Changed on purpose: "linear" with 20 timesteps or fewer is refused (NaN in the original), offset noise is not added into
the caller's tensor, and whole runs keep x_t contiguous and in float32 (so a pred_x0 network that returns channels_last
gets its noise in logical order). Missing: self-conditioning, immiscible training, interpolate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddpm import ops
from fastddpm.integrations.lucidrains import tables
from fastddpm.integrations.lucidrains.process import (
    DiffusionProcess,
    WithoutSelfCondition,
    unsupported,
)
from fastddpm.integrations.shared import (
    NoiseSource,
    Seeding,
    draws_randomly,
    fits_rows,
    look_through,
    overrides,
    replay,
)
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.tables.table import Table

_DEFAULT_BATCH = 16
_DESCRIPTION = "sampling loop time step"
_STEP_PARTS = (
    "p_sample",
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_noise_from_start",
    "predict_start_from_v",
)


class GaussianDiffusion(DiffusionProcess):
    """Train and sample with denoising-diffusion-pytorch's arguments, attributes and checkpoints.

    Sampling in float32 runs on the fused step. After the same torch.manual_seed it draws the same numbers in the same
    order as the original; with `seeds=`, or `seed=` and `sample_ids=`, noise is noise-v1 instead. A subclass that
    replaces a part of the step (p_sample, p_mean_variance, model_predictions, q_posterior, predict_*) is run step by
    step with that part.

    Args:
        model: called as model(x, t, None), x float32 [B, C, H, W], t int64 [B]; has the attributes channels, out_dim
            and self_condition.
        image_size: int or (height, width).
        timesteps: T.
        sampling_timesteps: steps of `sample`; fewer than T select DDIM.
        objective: "pred_noise", "pred_x0" or "pred_v".
        beta_schedule: "linear", "cosine" or "sigmoid".
        schedule_fn_kwargs: further arguments of the schedule (cosine: s; sigmoid: start, end, tau).
        ddim_sampling_eta: eta of DDIM.
        auto_normalize: images are in [0, 1] outside and [-1, 1] inside.
        offset_noise_strength: strength of the per-channel offset added to training noise.
        min_snr_loss_weight: cap the signal-to-noise ratio in the loss weight (Hang et al. 2023).
        min_snr_gamma: that cap.
        immiscible: not supported.

    Attributes:
        sampler_options: further arguments of `Sampler` for whole runs, e.g. {"compile": True}; empty at first.

    Raises:
        ValueError: a value does not fit (an AssertionError too, where the original raises that).
        NotImplementedError: self-conditioning or immiscible training.
    """

    @torch.inference_mode()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        **seeding: Unpack[Seeding],
    ) -> tuple[Tensor, Tensor]:
        """Draw x_{t-1}; return it and the clipped x_0. t is one int for the whole batch."""
        return self._p_sample(x, int(t), x_self_cond, NoiseSource.resolve(len(x), **seeding))

    @torch.inference_mode()
    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        **seeding: Unpack[Seeding],
    ) -> Tensor:
        """Draw images by T steps of p_sample; see `sample`."""
        source = NoiseSource.resolve(shape[0], **seeding)
        if self._steps_alone():
            steps = [
                lambda x, t=t: self.p_sample(x, t, **source.arguments)[0] for t in reversed(range(self.num_timesteps))
            ]
            return self._step_by_step(shape, source, steps, return_all_timesteps)
        table = self._cached("ddpm", tables.ddpm_table, self.objective)
        return self._run(table, shape, source, [True] * (len(table) - 1) + [False], return_all_timesteps)

    @torch.inference_mode()
    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        **seeding: Unpack[Seeding],
    ) -> Tensor:
        """Draw images by sampling_timesteps steps of DDIM (Song et al. 2021, eq. 12); see `sample`."""
        source = NoiseSource.resolve(shape[0], **seeding)
        if self._steps_alone():
            times = tables.ddim_timesteps(self.num_timesteps, self.sampling_timesteps)
            steps = [
                lambda x, i=i, t=t, after=after: self._ddim_step(x, i, t, after, source)
                for i, (t, after) in enumerate(itertools.pairwise(times))
            ]
            return self._step_by_step(shape, source, steps, return_all_timesteps)
        table = self._cached(
            "ddim", tables.ddim_table, self.objective, self.sampling_timesteps, float(self.ddim_sampling_eta)
        )
        # The original draws a z even where eta = 0 multiplies it, except before the last step.
        return self._run(table, shape, source, [True] * (len(table) - 1) + [False], return_all_timesteps)

    @torch.inference_mode()
    def sample(
        self,
        batch_size: int | None = None,
        return_all_timesteps: bool = False,
        **seeding: Unpack[Seeding],
    ) -> Tensor:
        """Draw images, by DDIM where is_ddim_sampling, else by DDPM.

        Args:
            batch_size: B; default as many as seeds or sample_ids are given, else 16.
            return_all_timesteps: return every state, x_T first.
            seeding: seeds, one per image; or one seed for all, told apart by sample_ids.

        Returns:
            float32 [B, C, H, W] (or [B, steps + 1, C, H, W]), x_0 mapped to [0, 1] where auto_normalize; not clamped.
        """
        if batch_size is None:
            counted = seeding.get("seeds") is not None or seeding.get("sample_ids") is not None
            batch_size = NoiseSource.resolve(None, **seeding).batch if counted else _DEFAULT_BATCH
        draw = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        shape = (batch_size, self.channels, *self.image_size)
        return draw(shape, return_all_timesteps=return_all_timesteps, **seeding)

    def interpolate(self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5) -> Tensor:
        """Not supported."""
        raise unsupported("interpolate")

    def _p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None, source: NoiseSource) -> tuple[Tensor, Tensor]:
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        step = torch.full((1,), self.num_timesteps - 1 - t, device=x.device)
        # torch.compile fuses the plain form itself, and cannot trace the check that the kept rows are current.
        if torch.compiler.is_compiling() or overrides(self, GaussianDiffusion, _STEP_PARTS[1:]):
            mean, _, log_variance, x_start = self.p_mean_variance(x, times, x_self_cond, clip_denoised=True)
        else:
            output = self._call_model(x, times, x_self_cond)
            if fits_rows(x, output):
                x_start, rows = torch.empty_like(x), self._cached("rows", _ddpm_rows, self.objective)
                noise = source.at(step, x) if t > 0 else None
                backend = self.sampler_options.get("backend", "auto")
                return ops.p_sample(x, output, rows, step, noise, clip=True, x0_out=x_start, backend=backend), x_start
            x_start = self._start_from(output, x, times).clamp(-1.0, 1.0)
            mean, _, log_variance = self.q_posterior(x_start, x, times)
        z = source.z(step, x) if t > 0 else 0.0
        return mean + (0.5 * log_variance).exp() * z, x_start

    def _ddim_step(self, x: Tensor, step: int, t: int, t_next: int, source: NoiseSource) -> Tensor:
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        eps, x_start = self.model_predictions(x, times, None, clip_x_start=True, rederive_pred_noise=True)
        if t_next < 0:
            return x_start
        alpha, alpha_next = self._buffer("alphas_cumprod")[t], self._buffer("alphas_cumprod")[t_next]
        sigma = self.ddim_sampling_eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
        z = source.z(torch.tensor([step]), x)
        return x_start * alpha_next.sqrt() + (1 - alpha_next - sigma**2).sqrt() * eps + sigma * z

    def _steps_alone(self) -> bool:
        return overrides(self, GaussianDiffusion, _STEP_PARTS) or draws_randomly(self.model)

    def _step_by_step(
        self, shape: Sequence[int], source: NoiseSource, steps: Sequence[Callable[[Tensor], Tensor]], keep_all: bool
    ) -> Tensor:
        x = source.start(torch.empty(*shape, device=self.device))
        states = [x]
        for step in tqdm(steps, desc=_DESCRIPTION):
            x = step(x)
            if keep_all:
                states.append(x)
        return self.unnormalize(torch.stack(states, dim=1) if keep_all else x)

    def _run(
        self, table: Table, shape: Sequence[int], source: NoiseSource, draws: Sequence[bool], keep_all: bool
    ) -> Tensor:
        x_T = source.start(torch.empty(*shape, device=self.device))
        states = [x_T]

        def on_step(result: StepResult) -> None:
            bar.update()
            if keep_all:
                states.append(result.x_t.clone())

        with tqdm(total=len(table), desc=_DESCRIPTION) as bar:
            x = replay(self._sampler(table, shape), source, x_T, draws, on_step)
        return self.unnormalize(torch.stack(states, dim=1) if keep_all else x)

    def _sampler(self, table: Table, shape: Sequence[int]) -> Sampler:
        network = look_through(self.model)
        # Tables and modules compare by identity.
        return self._samplers.get(
            (table, network, network.training, *shape[1:], self.device),
            WithoutSelfCondition(network),
            table,
            shape[1:],
            batch=shape[0],
            device=self.device,
            options=self.sampler_options,
        )


def _ddpm_rows(buffers: dict[str, Tensor], objective: str) -> Tensor:
    """Return the rows of `ddpm_table` in its order, on the buffers' device."""
    return tables.ddpm_table(buffers, objective).rows.to(buffers["betas"].device)
