"""DDPMScheduler and DDIMScheduler of diffusers with their arithmetic in fused operations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from fastddpm.integrations.diffusers.fused import FusedScheduler
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.diffusers.rows import LEARNED, ddim_rows, ddpm_rows
from fastddpm.integrations.shared import FUSED_DTYPES, Draw, needs_gradient
from fastddpm.tables.table import Table


class FastDDPMScheduler(FusedScheduler, DDPMScheduler):
    """`diffusers.DDPMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    ``pipe.scheduler = FastDDPMScheduler.from_config(pipe.scheduler.config)`` is the whole change. A step reads nothing
    back from the device and compiles with ``fullgraph=True``, with an int or a tensor as timestep, unless a
    `torch.Generator` is passed, which cannot be traced. Float64 and tensors that need gradients take diffusers' own
    step. The package's docstring lists what differs.
    """

    _original = DDPMScheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the timesteps, by number or as a list; see `diffusers.DDPMScheduler.set_timesteps`."""
        _check_steps(num_inference_steps)
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
            t = torch.arange(len(self.alphas_cumprod))
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
        if not _fuses(model_output, sample):
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


class FastDDIMScheduler(FusedScheduler, DDIMScheduler):
    """`diffusers.DDIMScheduler`, same arguments, configuration, files and numbers, on the fused operations.

    As `FastDDPMScheduler` in every other respect.
    """

    _original = DDIMScheduler
    _default_options: ClassVar[dict[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps by number; see `diffusers.DDIMScheduler.set_timesteps`."""
        _check_steps(num_inference_steps)
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
        t = torch.arange(len(self.alphas_cumprod))
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
        if not _fuses(model_output, sample):
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


def _fuses(model_output: Tensor, sample: Tensor) -> bool:
    """Tell whether the fused step takes these tensors; float64 and gradients go through diffusers' own."""
    dtypes_fit = model_output.dtype in FUSED_DTYPES and sample.dtype in FUSED_DTYPES
    return dtypes_fit and not needs_gradient(model_output, sample)


def _check_steps(num_inference_steps: int | None) -> None:
    """Raise ValueError for no steps, which diffusers divides by."""
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")


def fast_scheduler(scheduler: Any) -> Any:
    """Return a DDPMScheduler or DDIMScheduler in its fast form, its present state included; others as they are."""
    fast_classes: dict[type, Any] = {DDPMScheduler: FastDDPMScheduler, DDIMScheduler: FastDDIMScheduler}
    fast_class = fast_classes.get(type(scheduler))
    if fast_class is None:
        return scheduler
    fast = fast_class.from_config(scheduler.config)
    for name, value in vars(scheduler).items():
        setattr(fast, name, value)
    return fast
