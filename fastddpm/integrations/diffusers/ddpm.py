"""diffusers' DDPMScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastddpm.integrations.diffusers.fused import FusedScheduler
from fastddpm.integrations.diffusers.rows import ddpm_rows
from fastddpm.integrations.shared import Draw
from fastddpm.schedules.diffusion import LEARNED


class FastDDPMScheduler(FusedScheduler, DDPMScheduler):
    """`diffusers.DDPMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    ``pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)`` is the whole change. `step` takes x_t to
    x_{t-1} ~ p_theta(x_{t-1} | x_t) (Ho et al. 2020, Algorithm 2). It reads nothing back from the device and compiles
    with ``fullgraph=True``, with an int or a tensor as timestep, unless a `torch.Generator` is passed, which cannot be
    traced. Float64 and tensors that need gradients take diffusers' own step. docs/drop-in.md lists what differs.

    Raises (in `step`):
        IndexError: the timestep is no integer, or not in the list that set_timesteps made.
        ValueError: shapes do not fit, or the prediction type is unknown.
        TypeError: the variance is learned, and the output has no second half.
    """

    _original, _output = DDPMScheduler, DDPMSchedulerOutput
    _rows_of = staticmethod(ddpm_rows)

    def settings(self) -> dict[str, Any]:
        """Return what rows are made of; diffusers reads the variance type in two places."""
        return {
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

    def advance(
        self, model_output: Tensor, timestep: int | Tensor, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
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

    def flags(self, **options: Any) -> dict[str, Any]:
        """Say whether the network's second half is a variance."""
        return {"learned": self.variance_type == "learned_range"}

    def _get_variance(self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None) -> Any:
        # diffusers returns the logarithm of beta here, and its step takes the square root of that.
        name = variance_type or self.config.variance_type
        return super()._get_variance(t, predicted_variance, "fixed_large" if name == "fixed_large_log" else name)
