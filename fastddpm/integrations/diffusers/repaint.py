"""diffusers' RePaintScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import RePaintScheduler
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.fast import FastScheduler
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.diffusers.rows import ddim_rows
from fastddpm.integrations.shared import Draw, fuses


class FastRePaintScheduler(FastScheduler, RePaintScheduler):
    """`diffusers.RePaintScheduler`, same arguments, configuration, files, noise and numbers, on the fused operations.

    `step` takes x_t to x_{t - T // n}, known where the mask is 1, as in diffusers and other than in `fastddpm.sample`.
    It draws once for both parts; going up draws at each timestep on the way, as diffusers does. Float64 and tensors
    that need gradients take diffusers' own step.
    """

    _original, _output = RePaintScheduler, RePaintSchedulerOutput

    def is_fused(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> bool:
        """Whether fused operations take the step; diffusers' own takes mixed dtypes too."""
        return fuses(model_output, sample, options["original_image"]) and model_output.dtype == sample.dtype

    def advance(  # type: ignore[override]
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, original_image: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t - T // n} and x_0; `draw` makes z."""
        t, device = int(timestep), x_t.device
        prev_t = t - self.config.num_train_timesteps // self.num_inference_steps
        alpha_bar, end = self.alphas_cumprod.float(), self.final_alpha_cumprod.float()
        visited, reached = (torch.tensor([at], device="cpu") for at in (t, prev_t))
        rows = ddim_rows(alpha_bar, visited, reached, end, prediction_type="epsilon", bound=1.0, eta=self.eta)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        z, x_0, clip = draw(model_output), torch.empty_like(x_t), self.config.clip_sample
        unknown = ops.p_sample(x_t, model_output, rows.to(device), first, z, clip=clip, use_m=True, x0_out=x_0)
        alpha_bar_prev = alpha_bar[prev_t] if prev_t >= 0 else end
        level = torch.stack([alpha_bar_prev.sqrt(), (1 - alpha_bar_prev).sqrt()])[None].to(device)
        known: Any = ops.q_sample(original_image.to(x_t.dtype).expand_as(x_t), level, first, z)
        return mask * known + (1.0 - mask) * unknown, x_0

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Any = None) -> Tensor:
        """Take x_t up by T // n timesteps, x = sqrt(1 - beta) x + sqrt(beta) z each (Ho et al. 2020, eq. 2)."""
        if not fuses(sample):
            return super().undo_step(sample, timestep, generator)
        n, t = self.config.num_train_timesteps // self.num_inference_steps, int(timestep)
        betas = self.betas.float()[t : t + n]
        rows = torch.stack([(1 - betas).sqrt(), betas.sqrt()], dim=1).to(sample.device)
        for i in range(n):
            at = torch.full((1,), i, dtype=torch.int64, device=sample.device)
            sample = ops.q_sample(sample, rows, at, draw_like(sample, generator))  # type: ignore[assignment]
        return sample
