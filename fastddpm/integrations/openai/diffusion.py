"""OpenAI's improved-diffusion and guided-diffusion on the fused step: the same classes, arguments, draws and images.

Change the import, or wrap the object that create_gaussian_diffusion returned:

    from fastddpm.integrations.openai import SpacedDiffusion, space_timesteps
    diffusion = fastddpm.integrations.openai.accelerate(diffusion)

docs/drop-in.md lists what is reproduced because images depend on it, what is changed on purpose, and what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from fastddpm.integrations.openai.losses import TrainingLosses
from fastddpm.integrations.openai.process import Kwargs, Model
from fastddpm.integrations.openai.steps import Call, StepRunner
from fastddpm.integrations.shared import NoiseSource, Seeding, check_options, require
from fastddpm.sampling.options import SamplerArguments

_ORIGINALS = ("improved_diffusion", "guided_diffusion")
DenoisedFn = Callable[[Tensor], Tensor] | None


class GaussianDiffusion(StepRunner, TrainingLosses):
    """Train and sample with OpenAI's arguments; tables are float64 NumPy attributes of the original's names.

    Sampling in float32 under torch.no_grad runs on the fused step. After the same torch.manual_seed it draws the same
    numbers in the same order as the original, the discarded ones included; with `seeds=`, or `seed=` and
    `sample_ids=`, noise is noise-v1 instead. Whole loops of an nn.Module without denoised_fn and cond_fn run in
    `Sampler`; everything else runs step by step, overridden methods included.

    Arguments that the sampling methods share:
        model: called as model(x, t, **model_kwargs), t int64 [B], or float32 in [0, 1000) with rescale_timesteps.
        x, t: the state [B, C, ...] and int64 [B], which may differ from sample to sample.
        shape, noise: of x_T; noise is x_T itself, drawn where None.
        clip_denoised, denoised_fn: applied to the estimate of x_0, denoised_fn first.
        cond_fn: gradient of log p(y | x_t), called as cond_fn(x, t, **model_kwargs).
        seeding: seeds, one per sample; or one seed for all, told apart by sample_ids.

    Args:
        betas: [T] in (0, 1].
        model_mean_type: what the network predicts.
        model_var_type: where the variance comes from.
        loss_type: the training objective.
        rescale_timesteps: give the network t * 1000 / T, as a float.

    Attributes:
        sampler_options: further arguments of `Sampler` for whole loops, e.g. {"compile": True}; empty at first.

    Raises:
        ValueError: (an AssertionError too, as in the original) betas outside (0, 1], or shapes that do not fit.
        TypeError: a type is no member of the enum.
    """

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        **seeding: Unpack[Seeding],
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} ~ p_theta(x_{t-1} | x_t) as "sample"; also return "pred_xstart"   (Ho et al. 2020, eq. 11)."""
        source = NoiseSource.resolve(len(x), **seeding)
        return self._step(Call("p", source, model, clip_denoised, denoised_fn, cond_fn, model_kwargs), x, t)

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **seeding: Unpack[Seeding],
    ) -> Tensor:
        """Draw x_0 by T steps of p_sample; `progress` shows a bar, `device` defaults to the model's."""
        source = NoiseSource.resolve(shape[0], **seeding)
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, 0.0)
        return self._loop(Call("p", source, model, *step, shape, noise, device, progress))

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        **seeding: Unpack[Seeding],
    ) -> Iterator[dict[str, Tensor]]:
        """Yield p_sample's result of each step of p_sample_loop."""
        source = NoiseSource.resolve(shape[0], **seeding)
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, 0.0)
        return self._progressive(Call("p", source, model, *step, shape, noise, device, progress))

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        **seeding: Unpack[Seeding],
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} by DDIM as "sample"; also return "pred_xstart"   (Song et al. 2021, eq. 12)."""
        source = NoiseSource.resolve(len(x), **seeding)
        return self._step(Call("ddim", source, model, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta), x, t)

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """Go from x_t to x_{t+1} along the deterministic DDIM path, from data towards noise; eta must be 0."""
        require(eta == 0.0, f"ddim_reverse_sample follows the deterministic path only: eta must be 0, got {eta}")
        return self._step(Call("reverse", NoiseSource(), model, clip_denoised, denoised_fn, None, model_kwargs), x, t)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **seeding: Unpack[Seeding],
    ) -> Tensor:
        """Draw x_0 by T steps of ddim_sample; `progress` shows a bar, `device` defaults to the model's."""
        source = NoiseSource.resolve(shape[0], **seeding)
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return self._loop(Call("ddim", source, model, *step, shape, noise, device, progress))

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn = None,
        cond_fn: Model | None = None,
        model_kwargs: Kwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        **seeding: Unpack[Seeding],
    ) -> Iterator[dict[str, Tensor]]:
        """Yield ddim_sample's result of each step of ddim_sample_loop."""
        source = NoiseSource.resolve(shape[0], **seeding)
        step = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)
        return self._progressive(Call("ddim", source, model, *step, shape, noise, device, progress))


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over some of the timesteps of another: beta'_i = 1 - alpha_bar_i / alpha_bar_{i-1} of those kept.

    The network, and cond_fn, are given the timesteps of the original process (Nichol & Dhariwal 2021, section 4).

    Args:
        use_timesteps: the timesteps to keep, in any order; see `space_timesteps`.
        kwargs: the arguments of `GaussianDiffusion`, betas being those of the original process.

    Attributes:
        use_timesteps: set of int.
        timestep_map: the same, ascending: the timestep of each step.
        original_num_steps: T of the original process.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        base = GaussianDiffusion(**kwargs)
        self.use_timesteps = {int(t) for t in use_timesteps}
        self.timestep_map = sorted(self.use_timesteps)
        self.original_num_steps = base.num_timesteps
        require(
            bool(self.timestep_map) and self.timestep_map[0] >= 0 and self.timestep_map[-1] < base.num_timesteps,
            f"use_timesteps must name timesteps in 0..{base.num_timesteps - 1}, got {self.timestep_map[-3:]}",
        )
        bar = base.alphas_cumprod[self.timestep_map]
        super().__init__(**{**kwargs, "betas": 1 - bar / np.append(1.0, bar[:-1])})

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        mapped = self._upload("timestep_map", t.device, lambda: torch.tensor(self.timestep_map, device="cpu"))[t]
        return mapped.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else mapped


def accelerate(diffusion: Any, **sampler_options: Unpack[SamplerArguments]) -> GaussianDiffusion:
    """Return the GaussianDiffusion or SpacedDiffusion of this module that equals a live one of OpenAI's packages.

    Args:
        diffusion: an improved_diffusion or guided_diffusion GaussianDiffusion or SpacedDiffusion.
        sampler_options: further arguments of `Sampler` for whole loops: compile, dtype, backend, ...

    Raises:
        TypeError: another class, a subclass included: what it changes would be lost.
    """
    check_options(sampler_options)
    kind = type(diffusion)
    if isinstance(diffusion, GaussianDiffusion):
        fast = diffusion
    elif kind.__module__.split(".")[0] in _ORIGINALS and kind.__name__ in ("GaussianDiffusion", "SpacedDiffusion"):
        names = ("betas", "model_mean_type", "model_var_type", "loss_type", "rescale_timesteps")
        options = {name: getattr(diffusion, name) for name in names}
        if kind.__name__ == "GaussianDiffusion":
            fast = GaussianDiffusion(**options)
        else:
            # The betas of the original process are gone; those of the steps kept are all that sampling needs.
            fast = SpacedDiffusion.__new__(SpacedDiffusion)
            fast.timestep_map = list(diffusion.timestep_map)
            fast.use_timesteps = set(diffusion.timestep_map)
            fast.original_num_steps = diffusion.original_num_steps
            GaussianDiffusion.__init__(fast, **options)
    else:
        raise TypeError(
            f"accelerate takes GaussianDiffusion or SpacedDiffusion of {' or '.join(_ORIGINALS)}, got "
            f"{kind.__module__}.{kind.__qualname__}; build one of fastddpm.integrations.openai, or a subclass of it"
        )
    fast.sampler_options.update(sampler_options)
    return fast
