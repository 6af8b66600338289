"""diffusers' EulerDiscreteScheduler and EulerAncestralDiscreteScheduler with their arithmetic in fused operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.linear import LinearScheduler, M, X, unit, weights
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.shared import Draw
from fastddpm.tables.table import make_rows


class _EulerScheduler(LinearScheduler):
    """What the two Euler schedulers share: x_prev and x_0 are sums of x_t, the output and noise."""

    def respond(self, timestep: Any) -> tuple[Tensor, Any]:
        """Return the row of the next step, and a copy that has taken it."""
        e_x, e_m, zero = unit(X), unit(M), torch.zeros_like(unit(X))
        (x_prev, x_0), taken = self.take(timestep, {}, e_m, e_x, generator=torch.Generator().manual_seed(0))
        # What the step adds where there is nothing else is its deviation times this draw.
        (noise, _), _ = self.take(timestep, {}, zero, zero, generator=torch.Generator().manual_seed(0))
        z = draw_like(zero, torch.Generator().manual_seed(0))
        prev = weights(x_prev)
        (a, b, *_) = weights(x_0)
        row = make_rows(1, a=a, b=b, c_xt=prev[X], c_m=prev[M], sigma=float(noise[0, 0, 0] / z[0, 0, 0]))
        return row.float(), taken

    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev and x_0; `draw` makes z, and is called where diffusers draws."""
        step = self.next_step(timestep, x_t.device)
        dtype = torch.promote_types(model_output.dtype, x_t.dtype)
        x, x_0 = x_t.to(dtype), x_t.new_empty(x_t.shape, dtype=dtype)
        z = draw(model_output) if self.draws(0) else None
        x_prev = ops.p_sample(x, model_output, step.rows, step.first, z, clip=False, use_m=True, x0_out=x_0)
        vars(self).update(step.after)
        return x_prev.to(model_output.dtype), x_0


class FastEulerDiscreteScheduler(_EulerScheduler, EulerDiscreteScheduler):
    """`diffusers.EulerDiscreteScheduler`, as `FastDPMSolverMultistepScheduler`; with churn it takes diffusers' step."""

    _original = EulerDiscreteScheduler

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Take x_t to the next sigma (Karras et al. 2022); see `diffusers.EulerDiscreteScheduler.step`."""
        if s_churn > 0 or _is_integer(timestep) or not self.is_fused(model_output, sample):
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        x_prev, x_0 = self.advance(model_output, timestep, sample, draw_like)
        if not return_dict:
            return x_prev, x_0
        return EulerDiscreteSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)


class FastEulerAncestralDiscreteScheduler(_EulerScheduler, EulerAncestralDiscreteScheduler):
    """`diffusers.EulerAncestralDiscreteScheduler`, as `FastDPMSolverMultistepScheduler`."""

    _original = EulerAncestralDiscreteScheduler

    def draws(self, t: float) -> bool:
        """Always, also where the deviation is 0."""
        return True

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """Take x_t to the next sigma, with noise; see `diffusers.EulerAncestralDiscreteScheduler.step`."""
        if _is_integer(timestep) or not self.is_fused(model_output, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        x_prev, x_0 = self.advance(model_output, timestep, sample, lambda m: draw_like(m, generator))
        if not return_dict:
            return x_prev, x_0
        return EulerAncestralDiscreteSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)


def _is_integer(timestep: Any) -> bool:
    """Tell whether it is what diffusers refuses: a whole number in place of one of `timesteps`."""
    return isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
