"""diffusers' DDIMScheduler with its arithmetic in fused operations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from fastddpm.integrations.diffusers.fused import FusedScheduler
from fastddpm.integrations.diffusers.rows import ddim_rows
from fastddpm.integrations.shared import Draw


class FastDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`diffusers.DDIMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    `step` takes x_t to x_{t - T // n} (Song et al. 2021, eq. 12). As `FastDDPMScheduler` in every other respect.

    Raises (in `step`):
        ValueError: set_timesteps was not called, both sources of noise are given, or shapes do not fit.
        IndexError: the timestep is no integer, or out of range.
    """

    _original, _output = DDIMScheduler, DDIMSchedulerOutput
    _rows_of = staticmethod(ddim_rows)
    _default_options: ClassVar[dict[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

    def settings(self) -> dict[str, Any]:
        """Return what rows are made of."""
        return {
            "final_alpha_cumprod": self.final_alpha_cumprod,
            "prediction_type": self.config.prediction_type,
            "bound": self.bound,
        }

    def transitions(self) -> tuple[Tensor, Tensor]:
        """Each timestep leads to t - T // n, whatever the list says."""
        t = torch.arange(len(self.alphas_cumprod), device="cpu")
        return t, t - self.config.num_train_timesteps // (self.num_inference_steps or 1)

    def advance(  # type: ignore[override]
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

    def flags(self, use_clipped_model_output: bool = False, **options: Any) -> dict[str, Any]:
        """Say whether eps is the network's output."""
        return {"use_m": not use_clipped_model_output}
