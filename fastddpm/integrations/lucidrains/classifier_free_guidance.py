"""The GaussianDiffusion of denoising-diffusion-pytorch's classifier_free_guidance on the fused step."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor, nn

from fastddpm.integrations.lucidrains import diffusion
from fastddpm.integrations.lucidrains.network import Kwargs, unsupported
from fastddpm.integrations.shared import Seeding, look_through


class GaussianDiffusion(diffusion.GaussianDiffusion):
    """Train and sample with classes as the original's class does.

    In sampling the network is called as model.forward_with_cond_scale(x, t, classes=, cond_scale=, rescaled_phi=), in
    training as model(x, t, classes=), and DDIM takes eps from the output itself where that predicts it. p_sample_loop
    and ddim_sample take these arguments as model_forward_kwargs.

    Arguments that the methods share:
        classes: int64 [B].
        cond_scale: weight of the guidance; 1 means none.
        rescaled_phi: how far the guided output is brought back to the deviation of the conditional one.

    Args:
        model: the network.
        use_cfg_plus_plus: not supported.
        options: as for `fastddpm.integrations.lucidrains.GaussianDiffusion`.

    Raises:
        ValueError: a value does not fit (an AssertionError too, where the original raises that).
        NotImplementedError: CFG++.
    """

    _rederives, _shows_all = False, False
    _settings = ("cond_scale", "rescaled_phi")

    def __init__(self, model: nn.Module, *, use_cfg_plus_plus: bool = False, **options: Any) -> None:
        if use_cfg_plus_plus:
            raise unsupported("use_cfg_plus_plus=True")
        defaults = {"objective": "pred_noise", "beta_schedule": "cosine", "ddim_sampling_eta": 1.0}
        super().__init__(model, **{**defaults, **options})
        self.use_cfg_plus_plus = False

    def p_sample(  # type: ignore[override]
        self,
        x: Tensor,
        t: int,
        classes: Tensor,
        cond_scale: float = 6.0,
        rescaled_phi: float = 0.7,
        clip_denoised: bool = True,
        **seeding: Unpack[Seeding],
    ) -> tuple[Tensor, Tensor]:
        """Draw x_{t-1}; return it and x_0, clipped where clip_denoised. t is one int for the whole batch."""
        kwargs = _condition(classes, cond_scale, rescaled_phi)
        return super().p_sample(x, t, clip_denoised=clip_denoised, model_forward_kwargs=kwargs, **seeding)

    def sample(  # type: ignore[override]
        self, classes: Tensor, cond_scale: float = 6.0, rescaled_phi: float = 0.7, **seeding: Unpack[Seeding]
    ) -> Tensor:
        """Draw an image of each class, [B, C, H, W] in [0, 1], by DDIM where is_ddim_sampling, else by DDPM."""
        kwargs = _condition(classes, cond_scale, rescaled_phi)
        return super().sample(len(classes), model_forward_kwargs=kwargs, **seeding)

    def interpolate(  # type: ignore[override]
        self, x1: Tensor, x2: Tensor, classes: Tensor, t: int | None = None, lam: float = 0.5
    ) -> Tensor:
        """Mix x1 and x2 by lam after t steps of noising, and denoise with the default guidance."""
        return super().interpolate(x1, x2, t, lam, model_forward_kwargs=_condition(classes, 6.0, 0.7))

    def p_losses(  # type: ignore[override]
        self, x_start: Tensor, t: Tensor, *, classes: Tensor, cond_keep_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return the weighted squared error; cond_keep_mask [B] says whose class the network is told."""
        kept = {} if cond_keep_mask is None else {"cond_keep_mask": cond_keep_mask}
        return super().p_losses(x_start, t, model_forward_kwargs={"classes": classes, **kept}, **options)

    def _step_arguments(self, kwargs: Kwargs) -> dict[str, Any]:
        return dict(kwargs or {})

    @staticmethod
    def _call(model: nn.Module, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        if "cond_scale" not in kwargs:
            return model(x, t, **kwargs)
        network: Any = look_through(model)
        output = network.forward_with_cond_scale(x, t, **kwargs)
        # With a scale of 1 there is no unconditional half beside it.
        return output if isinstance(output, Tensor) else output[0]


def _condition(classes: Tensor, cond_scale: float, rescaled_phi: float) -> dict[str, Any]:
    return {"classes": classes, "cond_scale": cond_scale, "rescaled_phi": rescaled_phi}
