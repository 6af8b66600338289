"""diffusers' DDIMScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.integrations.diffusers.fused import FusedScheduler
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.diffusers.rows import ddim_rows
from fastddpm.integrations.shared import Draw, fuses
from fastddpm.tables.table import Table


class FastDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`diffusers.DDIMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    As `FastDDPMScheduler` in every other respect.
    """

    _original = DDIMScheduler
    _default_options: ClassVar[dict[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps by number; see `diffusers.DDIMScheduler.set_timesteps`."""
        integer("num_inference_steps", num_inference_steps, 1)
        super().set_timesteps(num_inference_steps, None)
        self.move_timesteps(device)

    def settings(self) -> dict[str, Any]:
        """Return what rows are made of."""
        return {
            "alphas_cumprod": self.alphas_cumprod,
            "final_alpha_cumprod": self.final_alpha_cumprod,
            "timesteps": self.timesteps,
            "T": self.config.num_train_timesteps,
            "steps": self.num_inference_steps,
            "prediction_type": self.config.prediction_type,
            "bound": self.bound,
        }

    @property
    def takes_only_listed(self) -> bool:
        """Every timestep of the schedule is taken, listed or not."""
        return False

    def transitions(self) -> tuple[Tensor, Tensor]:
        """Each timestep leads to t - T // n, whatever the list says."""
        t = torch.arange(len(self.alphas_cumprod), device="cpu")
        return t, t - self.config.num_train_timesteps // (self.num_inference_steps or 1)

    def make_rows(self, t: Tensor, prev_t: Tensor, **options: Any) -> Tensor:
        """Tabulate the steps from t to prev_t for one eta and one of the two conventions for eps."""
        return ddim_rows(
            self.float32_alphas_cumprod(),
            self.final_alpha_cumprod.detach().cpu().float(),
            t,
            prev_t,
            prediction_type=self.config.prediction_type,
            bound=self.bound,
            **options,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take x_t to x_{t - T // n} (Song et al. 2021, eq. 12).

        Args:
            model_output: the network's output, [B, C, ...].
            timestep: t, an int or a tensor of one integer.
            sample: x_t, [B, C, ...].
            eta: 0 for the deterministic sampler, 1 for DDPM's noise.
            use_clipped_model_output: take eps from x_t and the clipped x_0.
            generator: where z is drawn from, one for all or one per sample; default torch's global generator.
            variance_noise: z itself, instead of a generator.
            return_dict: return an object with prev_sample and pred_original_sample; else the two as a tuple.

        Raises:
            ValueError: set_timesteps was not called, both sources of noise are given, or shapes do not fit.
            IndexError: t is no integer, or out of range.
        """
        if not fuses(model_output, sample):
            return super().step(
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        if eta > 0 and variance_noise is not None and generator is not None:
            raise ValueError("cannot take noise from both generator and variance_noise; leave one of them None")

        def draw(output: Tensor) -> Tensor:
            return draw_like(output, generator) if variance_noise is None else variance_noise

        x_prev, x_0 = self.advance(
            model_output, timestep, sample, draw, eta=eta, use_clipped_model_output=use_clipped_model_output
        )
        if not return_dict:
            return x_prev, x_0
        return DDIMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)

    def advance(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        x_t: Tensor,
        draw: Draw,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = False,
    ) -> tuple[Tensor, Tensor]:
        """Return x_{t - T // n} and x_0; `draw` makes z, and is called where diffusers draws."""
        if self.num_inference_steps is None:
            raise ValueError("the number of inference steps is not known; call set_timesteps first")
        t = self.host_timestep(timestep)
        z = draw(model_output) if eta > 0 else None
        clipped = bool(use_clipped_model_output)
        rows = self.table("step", x_t.device, eta=eta, use_clipped_model_output=clipped)
        return self.execute(rows, self.row(timestep, t, x_t.device), model_output, x_t, z, use_m=not clipped)

    def draws(self, t: int, eta: float = 0.0, use_clipped_model_output: bool = False) -> bool:
        """Whether diffusers draws noise at timestep t."""
        return eta > 0

    def as_table(self, *, quiet_end: bool = False, eta: float = 0.0, use_clipped_model_output: bool = False) -> Table:
        """Write the run that set_timesteps chose as a `Table`; arguments as in `step`."""
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
        return self.tabulate(options, quiet_end=quiet_end, use_m=not use_clipped_model_output)
