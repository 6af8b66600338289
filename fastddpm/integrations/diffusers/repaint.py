"""diffusers' RePaintScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import RePaintScheduler
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.fused import NamedAsOriginal
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.diffusers.rows import ddim_rows
from fastddpm.integrations.shared import fuses


class FastRePaintScheduler(NamedAsOriginal, RePaintScheduler):
    """`diffusers.RePaintScheduler`, same arguments, configuration, files, noise and numbers, on the fused operations.

    The mask is 1 where the image is known, as in diffusers and other than in `fastddpm.sample`. A step draws once for
    both parts; going up draws at each timestep on the way, as diffusers does. Float64 and tensors that need gradients
    take diffusers' own step.
    """

    _original = RePaintScheduler

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> RePaintSchedulerOutput | tuple[Tensor, Tensor]:
        """Take x_t to x_{t - T // n}, known where the mask is 1; see `diffusers.RePaintScheduler.step`."""
        if not fuses(model_output, sample, original_image) or model_output.dtype != sample.dtype:
            return super().step(model_output, timestep, sample, original_image, mask, generator, return_dict)
        t, device = int(timestep), sample.device
        prev_t = t - self.config.num_train_timesteps // self.num_inference_steps
        alpha_bar = self.alphas_cumprod.float()
        end = self.final_alpha_cumprod.float()
        rows = ddim_rows(
            alpha_bar,
            end,
            torch.tensor([t], device="cpu"),
            torch.tensor([prev_t], device="cpu"),
            prediction_type="epsilon",
            bound=1.0,
            eta=self.eta,
            use_clipped_model_output=False,
        ).to(device)
        first = torch.zeros(1, dtype=torch.int64, device=device)
        z, x_0 = draw_like(model_output, generator), torch.empty_like(sample)
        unknown = ops.p_sample(
            sample, model_output, rows, first, z, clip=self.config.clip_sample, use_m=True, x0_out=x_0
        )
        reached = alpha_bar[prev_t] if prev_t >= 0 else end
        level = torch.stack([reached.sqrt(), (1 - reached).sqrt()])[None].to(device)
        known = ops.q_sample(original_image.to(sample.dtype).expand_as(sample), level, first, z)
        assert isinstance(known, Tensor)
        x_prev = mask * known + (1.0 - mask) * unknown
        return RePaintSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0) if return_dict else (x_prev, x_0)

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
