"""diffusers' DDPMScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.integrations.diffusers.fused import FusedScheduler
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.diffusers.rows import ddpm_rows
from fastddpm.integrations.shared import Draw, fuses
from fastddpm.schedules.diffusion import LEARNED
from fastddpm.tables.table import Table


class FastDDPMScheduler(FusedScheduler, DDPMScheduler):
    """`diffusers.DDPMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    ``pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)`` is the whole change. A step reads nothing
    back from the device and compiles with ``fullgraph=True``, with an int or a tensor as timestep, unless a
    `torch.Generator` is passed, which cannot be traced. Float64 and tensors that need gradients take diffusers' own
    step. docs/drop-in.md lists what differs.
    """

    _original = DDPMScheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps, by number or as a list; see `diffusers.DDPMScheduler.set_timesteps`."""
        if num_inference_steps is not None:
            integer("num_inference_steps", num_inference_steps, 1)
        super().set_timesteps(num_inference_steps, None, timesteps)
        self.move_timesteps(device)

    def settings(self) -> dict[str, Any]:
        """Return what rows are made of; diffusers reads the variance type in two places."""
        return {
            "alphas_cumprod": self.alphas_cumprod,
            "timesteps": self.timesteps,
            "listed": self.takes_only_listed,
            "prediction_type": self.config.prediction_type,
            "variance_kind": self.config.variance_type,
            "variance_type": self.variance_type,
            "bound": self.bound,
        }

    @property
    def takes_only_listed(self) -> bool:
        """Every timestep is taken until set_timesteps was called."""
        return self.custom_timesteps or self.num_inference_steps is not None

    def transitions(self) -> tuple[Tensor, Tensor]:
        """Each timestep leads to the next of the list; to t - 1 until set_timesteps was called."""
        if not self.takes_only_listed:
            t = torch.arange(len(self.alphas_cumprod), device="cpu")
            return t, t - 1
        t = self.listed()
        return t, torch.cat([t[1:], t.new_tensor([-1])])

    def make_rows(self, t: Tensor, prev_t: Tensor, **options: Any) -> Tensor:
        """Tabulate the steps from t to prev_t."""
        return ddpm_rows(
            self.float32_alphas_cumprod(),
            t,
            prev_t,
            prediction_type=self.config.prediction_type,
            variance_kind=self.config.variance_type,
            variance_type=self.variance_type,
            bound=self.bound,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Take x_t to x_{t-1} ~ p_theta(x_{t-1} | x_t) (Ho et al. 2020, Algorithm 2).

        Args:
            model_output: the network's output, [B, C, ...], or [B, 2C, ...] for a learned variance.
            timestep: t, an int or a tensor of one integer.
            sample: x_t, [B, C, ...].
            generator: where z is drawn from, one for all or one per sample; default torch's global generator.
            return_dict: return an object with prev_sample and pred_original_sample; else the two as a tuple.

        Raises:
            IndexError: t is no integer, or not in the list that set_timesteps made.
            ValueError: shapes do not fit, or the prediction type is unknown.
            TypeError: the variance is learned, and the output has no second half.
        """
        if not fuses(model_output, sample):
            return super().step(model_output, timestep, sample, generator, return_dict)
        x_prev, x_0 = self.advance(model_output, timestep, sample, lambda output: draw_like(output, generator))
        if not return_dict:
            return x_prev, x_0
        return DDPMSchedulerOutput(prev_sample=x_prev, pred_original_sample=x_0)

    def advance(self, model_output: Tensor, timestep: int | Tensor, x_t: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return x_{t-1} and x_0; `draw` makes z, and is called where diffusers draws."""
        t = self.host_timestep(timestep)
        # A timestep that only the accelerator knows may be 0, whose row leaves the noise out.
        noisy = t is None or t > 0
        kind = self.config.variance_type
        learned = self.variance_type in LEARNED and model_output.shape[1] == 2 * x_t.shape[1]
        if kind in LEARNED and noisy and not learned:
            raise TypeError(
                f"variance_type {kind!r} needs an output of {2 * x_t.shape[1]} channels, twice the sample's, got "
                f"{model_output.shape[1]}; choose a fixed variance_type"
            )
        m, v = model_output.split(x_t.shape[1], dim=1) if learned else (model_output, None)
        z = draw(m) if noisy else None
        if kind != "learned_range":
            model_output, learned = m, False
        if kind == "learned" and z is not None and v is not None:
            z = z * ((0.5 * v.float()).exp() if self.variance_type == "learned_range" else v.float().sqrt())
        rows, row = self.table("step", x_t.device), self.row(timestep, t, x_t.device)
        return self.execute(rows, row, model_output, x_t, z, learned=learned)

    def draws(self, t: int) -> bool:
        """Whether diffusers draws noise at timestep t."""
        return t > 0

    @property
    def fits_a_table(self) -> bool:
        """Whether rows express a run; they have no term for the variance itself, which is diffusers' "learned"."""
        kind = self.config.variance_type
        return super().fits_a_table and kind != "learned" and (kind == self.variance_type or kind not in LEARNED)

    def as_table(self, *, quiet_end: bool = False) -> Table:
        """Write the run that set_timesteps chose as a `Table`, if it fits one.

        Args:
            quiet_end: add no noise in the last step, where diffusers does so at its t > 0.
        """
        return self.tabulate({}, quiet_end=quiet_end, learned=self.variance_type == "learned_range")

    def _get_variance(self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None) -> Any:
        # diffusers returns the logarithm of beta here, and its step takes the square root of that.
        name = variance_type or self.config.variance_type
        return super()._get_variance(t, predicted_variance, "fixed_large" if name == "fixed_large_log" else name)
