"""denoising-diffusion-pytorch's GaussianDiffusion on the fused step: same constructor, state_dict, draws and images.

Change the import, or wrap a live instance:

    from fastddpm.integrations.lucidrains import GaussianDiffusion
    diffusion = fastddpm.integrations.lucidrains.accelerate(diffusion)

docs/drop-in.md lists what is reproduced because images depend on it, what is changed on purpose, and what is missing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastddpm import ops
from fastddpm.integrations.lucidrains import tables
from fastddpm.integrations.lucidrains.network import Called, Kwargs
from fastddpm.integrations.lucidrains.process import DiffusionProcess
from fastddpm.integrations.shared import (
    NoiseSource,
    Seeding,
    draws_randomly,
    fits_rows,
    look_through,
    overrides,
    replay,
    require,
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
        model: called as model(x, t, None, **model_forward_kwargs), x float32 [B, C, H, W], t int64 [B]; has the
            attributes channels, out_dim and self_condition.
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
        NotImplementedError: immiscible training.
    """

    @torch.inference_mode()
    def p_sample(
        self,
        x: Tensor,
        t: int,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Kwargs = None,
        **seeding: Unpack[Seeding],
    ) -> tuple[Tensor, Tensor]:
        """Draw x_{t-1}; return it and x_0, clipped where clip_denoised. t is one int for the whole batch."""
        source = NoiseSource.resolve(len(x), **seeding)
        t, step = int(t), torch.full((1,), self.num_timesteps - 1 - int(t), device=x.device)
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        # torch.compile fuses the plain form itself, and cannot trace the check that the kept rows are current.
        if torch.compiler.is_compiling() or overrides(self, _STEP_PARTS[1:]):
            named = self._named(model_forward_kwargs, x_self_cond)
            mean, _, log_variance, x_start = self.p_mean_variance(x, times, clip_denoised=clip_denoised, **named)
        else:
            output = self._predict(x, times, x_self_cond, model_forward_kwargs)
            if fits_rows(x, output):
                x_start, rows = torch.empty_like(x), self._cached("rows", _ddpm_rows, self.objective)
                noise = source.at(step, x) if t > 0 else None
                how = {"clip": clip_denoised, "backend": self.sampler_options.get("backend", "auto")}
                return ops.p_sample(x, output, rows, step, noise, x0_out=x_start, **how), x_start
            x_start = self._start_from(output, x, times)
            x_start = x_start.clamp(-1.0, 1.0) if clip_denoised else x_start
            mean, _, log_variance = self.q_posterior(x_start, x, times)
        z = source.z(step, x) if t > 0 else 0.0
        return mean + (0.5 * log_variance).exp() * z, x_start

    @torch.inference_mode()
    def p_sample_loop(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        return_noise: bool = False,
        model_forward_kwargs: Kwargs = None,
        **seeding: Unpack[Seeding],
    ) -> Any:
        """Draw images by T steps of p_sample; see `sample`."""
        source = NoiseSource.resolve(shape[0], **seeding)
        x_T = source.start(torch.empty(*shape, device=self.device))
        states = self._p_sample_states(x_T, self.num_timesteps, source, model_forward_kwargs, return_all_timesteps)
        return self._result(states, return_all_timesteps, return_noise)

    @torch.inference_mode()
    def ddim_sample(
        self,
        shape: Sequence[int],
        return_all_timesteps: bool = False,
        *,
        return_noise: bool = False,
        model_forward_kwargs: Kwargs = None,
        **seeding: Unpack[Seeding],
    ) -> Any:
        """Draw images by sampling_timesteps steps of DDIM (Song et al. 2021, eq. 12); see `sample`."""
        source = NoiseSource.resolve(shape[0], **seeding)
        x_T = source.start(torch.empty(*shape, device=self.device))
        if self._steps_alone():
            times = tables.ddim_timesteps(self.num_timesteps, self.sampling_timesteps)
            step = partial(self._ddim_step, source=source, kwargs=model_forward_kwargs)
            steps = [partial(step, i=i, t=t, t_next=t_next) for i, (t, t_next) in enumerate(itertools.pairwise(times))]
            states = self._step_by_step(x_T, steps, return_all_timesteps)
        else:
            settings = (self.objective, self.sampling_timesteps, float(self.ddim_sampling_eta), self._rederives)
            table = self._cached("ddim", tables.ddim_table, *settings)
            states = self._run(table, x_T, source, model_forward_kwargs, return_all_timesteps)
        return self._result(states, return_all_timesteps, return_noise)

    @torch.inference_mode()
    def sample(
        self,
        batch_size: int | None = None,
        return_all_timesteps: bool = False,
        *,
        return_noise: bool = False,
        model_forward_kwargs: Kwargs = None,
        **seeding: Unpack[Seeding],
    ) -> Any:
        """Draw images, by DDIM where is_ddim_sampling, else by DDPM.

        Args:
            batch_size: B; default as many as seeds or sample_ids are given, else 16.
            return_all_timesteps: return every state, x_T first.
            return_noise: return x_T too.
            model_forward_kwargs: what the network takes besides x and t; a tensor has one row per image.
            seeding: seeds, one per image; or one seed for all, told apart by sample_ids.

        Returns:
            float32 [B, C, H, W] (or [B, steps + 1, C, H, W]), x_0 mapped to [0, 1] where auto_normalize; not clamped.
            With return_noise, that and x_T.
        """
        if batch_size is None and (seeding.get("seeds") is not None or seeding.get("sample_ids") is not None):
            batch_size = NoiseSource.resolve(None, **seeding).batch
        draw = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        given: dict[str, Any] = {"return_noise": return_noise, "model_forward_kwargs": model_forward_kwargs}
        given = {name: value for name, value in given.items() if value}
        shape = (_DEFAULT_BATCH if batch_size is None else batch_size, *self._shape)
        return draw(shape, return_all_timesteps=return_all_timesteps, **given, **seeding)

    @torch.inference_mode()
    def interpolate(
        self, x1: Tensor, x2: Tensor, t: int | None = None, lam: float = 0.5, *, model_forward_kwargs: Kwargs = None
    ) -> Tensor:
        """Mix x1 and x2, both in [-1, 1], by lam after t steps of noising, and denoise   (Ho et al. 2020, section 4.3).

        Returns:
            x_0 in [-1, 1], of x1's shape.
        """
        require(x1.shape == x2.shape, f"x1 and x2 must have one shape, got {list(x1.shape)} and {list(x2.shape)}")
        t = self.num_timesteps - 1 if t is None else t
        x_1, x_2 = (self.q_sample(x, torch.full((len(x),), t, device=x.device)) for x in (x1, x2))
        return self._p_sample_states((1 - lam) * x_1 + lam * x_2, t, NoiseSource(), model_forward_kwargs)[-1]

    @property
    def _shape(self) -> tuple[int, ...]:
        """One sample's."""
        return (self.channels, *self.image_size)

    def _p_sample_states(
        self, x: Tensor, start: int, source: NoiseSource, kwargs: Kwargs, keep_all: bool = False
    ) -> list[Tensor]:
        """Return x and, by p_sample at start - 1 .. 0, the states after it, or the last alone."""
        if self._steps_alone() or x.dtype != torch.float32 or start == 0:
            arguments = {**self._step_arguments(kwargs), **source.arguments}
            steps = [lambda x, t=t, **last: self.p_sample(x, t, **last, **arguments) for t in reversed(range(start))]
            return self._step_by_step(x, steps, keep_all)
        name = "ddpm" if start == self.num_timesteps else "part"
        return self._run(self._cached(name, tables.ddpm_table, self.objective, start), x, source, kwargs, keep_all)

    def _step_arguments(self, kwargs: Kwargs) -> dict[str, Any]:
        """Return the arguments by which p_sample takes them."""
        return self._named(kwargs)

    def _ddim_step(
        self, x: Tensor, i: int, t: int, t_next: int, source: NoiseSource, kwargs: Kwargs, x_self_cond: Any = None
    ) -> tuple[Tensor, Tensor]:
        times = torch.full((len(x),), t, device=self.device, dtype=torch.long)
        flags: dict[str, Any] = {"rederive_pred_noise": True} if self._rederives else {}
        eps, x_start = self.model_predictions(x, times, clip_x_start=True, **flags, **self._named(kwargs, x_self_cond))
        if t_next < 0:
            return x_start, x_start
        alpha, alpha_next = self._buffer("alphas_cumprod")[t], self._buffer("alphas_cumprod")[t_next]
        sigma = self.ddim_sampling_eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
        z = source.z(torch.tensor([i], device="cpu"), x)
        return x_start * alpha_next.sqrt() + (1 - alpha_next - sigma**2).sqrt() * eps + sigma * z, x_start

    def _steps_alone(self) -> bool:
        return overrides(self, _STEP_PARTS) or draws_randomly(self.model)

    def _step_by_step(self, x: Tensor, steps: Iterable[Callable[..., Any]], keep_all: bool) -> list[Tensor]:
        states, last = [x], dict[str, Tensor]()
        for step in tqdm(steps, desc=_DESCRIPTION):
            x, x_start = step(x, **last)
            last = {"x_self_cond": x_start} if self.self_condition else {}
            states[1:] = [*states[1:], x] if keep_all else [x]
        return states

    def _run(self, table: Table, x_T: Tensor, source: NoiseSource, kwargs: Kwargs, keep_all: bool) -> list[Tensor]:
        states = [x_T]

        def on_step(result: StepResult) -> None:
            bar.update()
            if keep_all or result.index == len(table) - 1:
                states.append(result.x_t.clone())

        settings = {name: value for name, value in (kwargs or {}).items() if name in self._settings}
        conditions = {name: value for name, value in (kwargs or {}).items() if name not in self._settings}
        sampler = self._sampler(table, x_T.shape, settings)
        # The original draws a z even where eta = 0 multiplies it, except before the last step.
        draws = [True] * (len(table) - 1) + [False]
        with tqdm(total=len(table), desc=_DESCRIPTION) as bar:
            replay(sampler, source, x_T, draws, on_step, model_kwargs=conditions)
        return states

    def _result(self, states: Sequence[Tensor], keep_all: bool, return_noise: bool) -> Any:
        if keep_all and not self._shows_all:
            raise TypeError("arguments after the first go by name: return_noise=, model_forward_kwargs=")
        x = self.unnormalize(torch.stack(list(states), dim=1) if keep_all else states[-1])
        return (x, states[0]) if return_noise else x

    def _sampler(self, table: Table, shape: Sequence[int], settings: Mapping[str, Any]) -> Sampler:
        network = look_through(self.model)
        # Tables and modules compare by identity.
        return self._samplers.get(
            (table, network, network.training, self.self_condition, *settings.items(), *shape[1:], self.device),
            Called(network, self._call, settings, self.self_condition),
            table,
            shape[1:],
            batch=shape[0],
            device=self.device,
            options=self.sampler_options,
        )


def _ddpm_rows(buffers: dict[str, Tensor], objective: str) -> Tensor:
    """Return the rows of `ddpm_table` in its order, on the buffers' device."""
    return tables.ddpm_table(buffers, objective).rows.to(buffers["betas"].device)
