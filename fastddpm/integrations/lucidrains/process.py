"""Forward process, posterior and training loss behind `fastddpm.integrations.lucidrains`.

Names of arguments, attributes and buffers are those of denoising-diffusion-pytorch (x_start, pred_v, ...).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm import ops
from fastddpm.checks import one_of
from fastddpm.integrations.kept_samplers import KeptSamplers
from fastddpm.integrations.lucidrains import tables
from fastddpm.integrations.lucidrains.network import Kwargs, check_network, unsupported
from fastddpm.integrations.shared import look_through, require


class ModelPrediction(NamedTuple):
    """What a network's output says of the noise and of x_0, both [B, C, H, W]."""

    pred_noise: Tensor
    pred_x_start: Tensor


class DiffusionProcess(nn.Module):
    """Everything of a diffusion except drawing samples; see `fastddpm.integrations.lucidrains`.

    Arguments that the methods share:
        model_forward_kwargs: what the network takes besides x and t; a tensor has one row per sample.
    """

    # A sample's sizes, and where they stand in the shape of a batch.
    _names: tuple[str, ...] = ("height", "width")
    _sizes = slice(2, None)
    # Whether DDIM takes eps again from the clipped x_0.
    _rederives = True
    # Which of model_forward_kwargs compiled code may keep.
    _settings: tuple[str, ...] = ()
    # Whether the original can return all states.
    _shows_all = True

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, Any] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        network: Any = look_through(model)
        channels = network.channels if channels is None else channels
        check_network(network, channels)
        if immiscible:
            raise unsupported("immiscible=True")
        if isinstance(image_size, int):
            image_size = (image_size,) * len(self._names)
        require(
            isinstance(image_size, (tuple, list)) and len(image_size) == len(self._names),
            f"image_size must be an integer or one each for {', '.join(self._names)}, got {image_size!r}",
        )
        require(
            objective in tables.OBJECTIVES,
            f"unknown objective {objective!r}; choose one of {', '.join(tables.OBJECTIVES)}",
        )
        one_of("beta schedule", beta_schedule, tables.SCHEDULES)
        betas = tables.SCHEDULES[beta_schedule](timesteps, **(schedule_fn_kwargs or {}))
        self.model = model
        self.channels = channels
        self.self_condition = bool(getattr(network, "self_condition", False))
        self.image_size = image_size
        self.objective = objective
        self.num_timesteps = timesteps
        self.sampling_timesteps = timesteps if sampling_timesteps is None else sampling_timesteps
        require(
            1 <= self.sampling_timesteps <= timesteps,
            f"sampling_timesteps must lie in 1..{timesteps} (timesteps), got {sampling_timesteps}",
        )
        self.is_ddim_sampling = self.sampling_timesteps < timesteps
        self.ddim_sampling_eta = ddim_sampling_eta
        self.immiscible = False
        self.offset_noise_strength = offset_noise_strength
        self.normalize: Callable[[Tensor], Tensor] = _to_symmetric if auto_normalize else _identity
        self.unnormalize: Callable[[Tensor], Tensor] = _to_unit if auto_normalize else _identity
        gamma = min_snr_gamma if min_snr_loss_weight else None
        for name, value in tables.make_buffers(betas, objective, gamma).items():
            self.register_buffer(name, value)
        self.sampler_options: dict[str, Any] = {}
        self._cache: dict[str, tuple[Any, Any]] = {}
        self._samplers = KeptSamplers()

    def __getstate__(self) -> dict[str, Any]:
        # Rows are built anew, not copied: EMA wrappers deep-copy this object.
        return {**self.__dict__, "_cache": {}}

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self._buffer("betas").device

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = sqrt(1 / alpha_bar) x_t - sqrt(1 / alpha_bar - 1) eps   (Ho et al. 2020, eq. 15)."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise
        )

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """eps = (sqrt(1 / alpha_bar) x_t - x_0) / sqrt(1 / alpha_bar - 1)   (eq. 15 solved for eps)."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - x0) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0   (Salimans & Ho 2022, section 4)."""
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * noise
            - self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start
        )

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v   (Salimans & Ho 2022, section 4)."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0)   (Ho et al. 2020, eq. 7)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self._at("posterior_variance", t, x_t), self._at("posterior_log_variance_clipped", t, x_t)

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
        model_forward_kwargs: Kwargs = None,
    ) -> ModelPrediction:
        """Return the noise and the x_0 that the network's output stands for; clip_x_start clamps x_0 to [-1, 1]."""
        output = self._predict(x, t, x_self_cond, model_forward_kwargs)
        x_start = self._start_from(output, x, t)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(output, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_denoised: bool = True,
        model_forward_kwargs: Kwargs = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of p_theta(x_{t-1} | x_t), and x_0   (eqs. 1 and 11)."""
        x_start = self.model_predictions(x, t, **self._named(model_forward_kwargs, x_self_cond)).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return (*self.q_posterior(x_start=x_start, x_t=x, t=t), x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I)   (eq. 4); autocast does not apply."""
        noise = torch.randn_like(x_start) if noise is None else noise
        plain = torch.compiler.is_compiling() or x_start.shape != noise.shape
        plain |= torch.is_grad_enabled() and (x_start.requires_grad or noise.requires_grad)
        if x_start.dtype == noise.dtype == torch.float32 and not plain:
            return ops.q_sample(x_start, self._cached("q", tables.q_rows), t, noise)  # type: ignore[return-value]
        with torch.autocast(x_start.device.type, enabled=False):
            return (
                self._at("sqrt_alphas_cumprod", t, x_start) * x_start
                + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
            )

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
        *,
        model_forward_kwargs: Kwargs = None,
        return_reduced_loss: bool = True,
    ) -> Tensor:
        """Return the weighted squared error between the network's output and its target (eq. 14 for pred_noise).

        Args:
            x_start: normalised images [B, C, H, W].
            t: int64 [B].
            noise: [B, C, H, W]; drawn where None.
            offset_noise_strength: overrides the constructor's.
            loss_reduction: "none" returns one loss per image, anything else their mean.
            return_reduced_loss: False returns one loss per element.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0.0:
            # The original adds this into the caller's tensor.
            noise = noise + strength * torch.randn(x_start.shape[:2], device=self.device)[:, :, None, None]
        x_t, x_self_cond = self.q_sample(x_start=x_start, t=t, noise=noise), None
        if self.self_condition and random.random() < 0.5:
            with torch.no_grad():
                x_self_cond = self.model_predictions(x_t, t, **self._named(model_forward_kwargs)).pred_x_start
        output = self._predict(x_t, t, x_self_cond, model_forward_kwargs)
        if self.objective == "pred_v":
            target = self.predict_v(x_start, t, noise)
        else:
            target = noise if self.objective == "pred_noise" else x_start
        loss = functional.mse_loss(output, target, reduction="none")
        loss = loss.mean(dim=tuple(range(1, loss.dim()))) if return_reduced_loss else loss
        loss = loss * self._at("loss_weight", t, loss)
        return loss if loss_reduction == "none" or not return_reduced_loss else loss.mean()

    def random_times(self, batch_size: int) -> Tensor:
        """Draw t uniformly from 0..T-1, int64 [B], from the global generator."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device).long()

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """Return the training loss of a batch of images [B, C, H, W] in [0, 1] at random timesteps (or `times`)."""
        require(
            tuple(img.shape[self._sizes]) == tuple(self.image_size),
            f"{' and '.join(self._names)} of image must be {tuple(self.image_size)}, got {tuple(img.shape)}",
        )
        times = self.random_times(len(img)) if times is None else times
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    def _predict(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None, kwargs: Kwargs) -> Tensor:
        given = {} if x_self_cond is None else {"x_self_cond": x_self_cond}
        return self._call(self.model, x, t, **given, **(kwargs or {}))

    def _named(self, kwargs: Kwargs, x_self_cond: Tensor | None = None) -> dict[str, Any]:
        """Return those that are given as arguments of a step, which a subclass may have written without them."""
        given = {"model_forward_kwargs": kwargs or None, "x_self_cond": x_self_cond}
        return {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def _call(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """Call the network as the original does in sampling."""
        return model(x, t, kwargs.pop("x_self_cond", None), **kwargs)

    def _start_from(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if self.objective == "pred_noise":
            return self.predict_start_from_noise(x, t, output)
        return output if self.objective == "pred_x0" else self.predict_start_from_v(x, t, output)

    def _buffer(self, name: str) -> Tensor:
        return getattr(self, name)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Pick buffer[t] for every sample, [B, 1, ...]."""
        return self._buffer(name).gather(-1, t).reshape(len(t), *[1] * (like.dim() - 1))

    def _cached(self, name: str, build: Callable[..., Any], *args: Any) -> Any:
        """Return build(buffers, *args), kept until a buffer or an argument changes."""
        buffers = {name: self._buffer(name) for name in tables.BUFFERS}
        versions = [(b.data_ptr(), 0 if b.is_inference() else b._version, b.device) for b in buffers.values()]
        kept = self._cache.get(name)
        if kept is None or kept[0] != (versions, args):
            # Rows made under inference_mode could not serve in training afterwards.
            with torch.inference_mode(False), torch.no_grad():
                kept = ((versions, args), build(buffers, *args))
            self._cache[name] = kept
        return kept[1]


def _to_symmetric(img: Tensor) -> Tensor:
    return img * 2 - 1


def _to_unit(img: Tensor) -> Tensor:
    return (img + 1) * 0.5


def _identity(img: Tensor) -> Tensor:
    return img
