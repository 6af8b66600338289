"""Forward process, posterior, network distribution and guidance behind `fastddpm.integrations.openai`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.openai import tables
from fastddpm.integrations.openai.tables import LossType, ModelMeanType, ModelVarType
from fastddpm.integrations.shared import require

Model = Callable[..., Any]
Kwargs = Mapping[str, Any] | None


class DiffusionProcess(tables.Tables):
    """Everything of GaussianDiffusion except losses and drawing samples; see `fastddpm.integrations.openai`.

    Every method takes t as int64 [B], one 0-based timestep per sample.
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type = tables.as_member(ModelMeanType, model_mean_type)
        self.model_var_type = tables.as_member(ModelVarType, model_var_type)
        self.loss_type = tables.as_member(LossType, loss_type)
        self.rescale_timesteps = rescale_timesteps
        betas = np.array(betas, dtype=np.float64)
        require(betas.ndim == 1 and len(betas) > 0, f"betas must be 1-D and not empty, got shape {betas.shape}")
        inside = (betas > 0) & (betas <= 1)
        require(bool(inside.all()), f"betas must lie in (0, 1], got {betas[~inside][:1]} at t = {np.argmin(inside)}")
        self.num_timesteps = len(betas)
        attributes = tables.make_tables(betas)
        vars(self).update(attributes)
        self._uploads: dict[tuple[str, torch.device], Tensor] = {}
        self._tables = {**attributes, **tables.derive_tables(attributes, self.model_var_type)}

    def __setattr__(self, name: str, value: Any) -> None:
        if "_tables" in vars(self) and (name in self._tables or name in ("model_mean_type", "model_var_type")):
            raise AttributeError(f"{name} is fixed, since rows are made of it; build another diffusion instead")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_uploads": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of q(x_t | x_0), in x_start's shape   (Ho et al. 2020, eq. 4)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self._at("one_minus_alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0) = N(sqrt(alpha_bar) x_0, (1 - alpha_bar) I)   (eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        _require_same_shape("noise", noise, "x_start", x_start)
        needs_grad = torch.is_grad_enabled() and (x_start.requires_grad or noise.requires_grad)
        if x_start.dtype == noise.dtype == torch.float32 and not needs_grad:
            rows = self._upload("q_rows", x_start.device, lambda: tables.q_rows(self._tables))
            return ops.q_sample(x_start, rows, t, noise)  # type: ignore[return-value]
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), in x_t's shape   (eq. 7)."""
        _require_same_shape("x_start", x_start, "x_t", x_t)
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """Return mean, variance, log_variance of p_theta(x_{t-1} | x_t), and pred_xstart, each in x's shape.

        Args:
            model: called as model(x, t, **model_kwargs).
            x: x_t [B, C, ...].
            clip_denoised: clamp pred_xstart to [-1, 1].
            denoised_fn: applied to pred_xstart before the clamp.
        """
        return self._distribution(self._predict(model, x, t, model_kwargs), x, t, clip_denoised, denoised_fn)

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """Shift the mean by variance * grad log p(y | x_t)   (Dhariwal & Nichol 2021, Algorithm 1)."""
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self, cond_fn: Model, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Replace eps by eps - sqrt(1 - alpha_bar) grad log p(y | x_t)   (Dhariwal & Nichol 2021, Algorithm 2)."""
        eps = self._predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        eps = eps - (1 - self._at("alphas_cumprod", t, x)).sqrt() * gradient
        x_start = self._predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {**p_mean_var, "pred_xstart": x_start, "mean": mean}

    def _predict(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        require(tuple(t.shape) == (len(x),), f"t must have shape [{len(x)}], one per sample; got {list(t.shape)}")
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        channels = x.shape[1] * (2 if self.model_var_type in tables.LEARNED else 1)
        expected = (len(x), channels, *x.shape[2:])
        require(
            tuple(output.shape) == expected,
            f"the model returned shape {tuple(output.shape)}, expected {expected} for {self.model_var_type}",
        )
        return output

    def _distribution(
        self,
        output: Tensor,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: Callable[[Tensor], Tensor] | None,
    ) -> dict[str, Tensor]:
        if self.model_var_type in tables.LEARNED:
            output, log_variance = output.chunk(2, dim=1)
            if self.model_var_type is ModelVarType.LEARNED_RANGE:
                # f log beta + (1 - f) log beta_tilde, f = (v + 1) / 2   (Nichol & Dhariwal 2021, eq. 15)
                fraction = (log_variance + 1) / 2
                large, small = self._at("log_betas", t, x), self._at("posterior_log_variance_clipped", t, x)
                log_variance = fraction * large + (1 - fraction) * small
            variance = log_variance.exp()
        else:
            variance, log_variance = self._at("model_variance", t, x), self._at("model_log_variance", t, x)
        mean = x_start = output
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            x_start = self._predict_xstart_from_xprev(x, t, output)
        elif self.model_mean_type is ModelMeanType.EPSILON:
            x_start = self._predict_xstart_from_eps(x, t, output)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if self.model_mean_type is not ModelMeanType.PREVIOUS_X:
            mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x_start}

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        A, R = self._at("sqrt_recip_alphas_cumprod", t, x_t), self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return A * x_t - R * eps

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        return self._at("recip_coef1", t, x_t) * xprev - self._at("coef2_over_coef1", t, x_t) * x_t

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        A, R = self._at("sqrt_recip_alphas_cumprod", t, x_t), self._at("sqrt_recipm1_alphas_cumprod", t, x_t)
        return (A * x_t - pred_xstart) / R

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """Return what the network is given for t."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Pick table[t] for every sample, float32, expanded to the shape of `like`."""
        table = self._upload(name, t.device, lambda: tables.f32(self._tables[name]))
        return table[t].to(like.device).reshape(-1, *[1] * (like.dim() - 1)).expand(like.shape)

    def _upload(self, name: str, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        """Return build() on `device`, built once for each name and device."""
        key = (name, device)
        if key not in self._uploads:
            # A tensor made under inference_mode could not serve in training afterwards.
            with torch.inference_mode(False):
                self._uploads[key] = build().to(device)
        return self._uploads[key]


def _require_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    require(
        value.shape == other.shape,
        f"{name} must have the shape of {other_name}, {list(other.shape)}; got {list(value.shape)}",
    )
