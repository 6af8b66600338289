"""Training losses and the variational bound of `fastddpm.integrations.openai`, in bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastddpm.integrations.openai.process import DiffusionProcess, Kwargs, Model
from fastddpm.integrations.openai.tables import LEARNED, LossType, ModelMeanType
from fastddpm.reference import discretized_log_likelihood, mean_flat, normal_kl


class TrainingLosses(DiffusionProcess):
    """The losses; see `fastddpm.integrations.openai`."""

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return each sample's "loss", float [B]; the MSE forms also return "mse" and, with a learned variance, "vb".

        In the MSE forms the bound trains the variances only: the mean is detached there (Nichol & Dhariwal 2021,
        section 3.1).

        Args:
            model: called as model(x_t, t, **model_kwargs).
            x_start: x_0 [B, C, ...] in [-1, 1].
            t: int64 [B].
            noise: eps [B, C, ...]; drawn where None.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
            scale = self.num_timesteps if self.loss_type is LossType.RESCALED_KL else 1
            return {"loss": bound["output"] * scale}
        output = self._predict(model, x_t, t, model_kwargs)
        terms: dict[str, Tensor] = {}
        if self.model_var_type in LEARNED:
            output, values = output.chunk(2, dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            bound = self._vb_terms_bpd(lambda *_, **__: frozen, x_start, x_t, t, clip_denoised=False)
            scale_mse = self.num_timesteps / 1000.0 if self.loss_type is LossType.RESCALED_MSE else 1.0
            terms["vb"] = bound["output"] * scale_mse
        terms["mse"] = mean_flat((self._target(x_start, x_t, t, noise) - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """Evaluate the whole variational bound, and the errors behind it, at every timestep.

        Returns:
            total_bpd [B], prior_bpd [B]; vb, xstart_mse, mse [B, T], the highest timestep first.
        """
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), i, device=x_start.device, dtype=torch.int64)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                bound = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, bound["pred_xstart"])
            terms["vb"].append(bound["output"])
            terms["xstart_mse"].append(mean_flat((bound["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        stacked: dict[str, Tensor] = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": stacked["vb"].sum(dim=1) + prior, "prior_bpd": prior, **stacked}

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.model_mean_type is ModelMeanType.EPSILON:
            return noise
        if self.model_mean_type is ModelMeanType.START_X:
            return x_start
        return self.q_posterior_mean_variance(x_start, x_t, t)[0]

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Any]:
        """Return the term of the bound at t (Ho et al. 2020, eq. 5) as "output" [B], and pred_xstart.

        t > 0: KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t)); t = 0: -log p_theta(x_0 | x_1), discretised.
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = mean_flat(normal_kl(mean, log_variance, out["mean"], out["log_variance"]))
        likelihood = discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])
        output = torch.where(t == 0, -mean_flat(likelihood), kl) / math.log(2.0)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """Return KL(q(x_T | x_0) || N(0, I)) [B], which no training changes."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device, dtype=torch.int64)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros((), device=x_start.device)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2.0)


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log of a Gaussian's mass in the 8-bit bin around x, by the originals' distribution function."""
    return discretized_log_likelihood(x, means, log_scales, cdf=_normal_cdf)


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the standard normal's distribution function by a tanh (Page 1977), as the originals do."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
