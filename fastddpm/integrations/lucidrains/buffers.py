"""What the buffers of a diffusion in a checkpoint say: its betas, and what its network predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.checks import one_of, shown
from fastddpm.files.tensors import TensorFile
from fastddpm.integrations.lucidrains.tables import OBJECTIVES
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.ddpm import PREDICTION_TYPES

_PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}
_READ = ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod")


def diffusion_places(checkpoint: TensorFile) -> list[str]:
    """Return what stands before the buffers of each diffusion in a checkpoint."""
    prefixes = [name.removesuffix("betas") for name in checkpoint.tensors if name == "betas" or name.endswith(".betas")]
    return [prefix for prefix in prefixes if all(prefix + name in checkpoint.tensors for name in _READ)]


def read_diffusion(checkpoint: TensorFile, prefix: str, prediction: str | None, default: str | None) -> DiffusionConfig:
    """Read a schedule's betas, and recognise the target by the weights of denoising-diffusion-pytorch's loss.

    Args:
        prediction: "epsilon", "x_0" or "v", where the file cannot say it.
        default: the prediction where neither does; None refuses.

    Raises:
        ValueError: the buffers are no schedule, or `prediction` is missing, or another than theirs.
    """
    if prediction is not None:
        one_of("prediction", prediction, PREDICTION_TYPES)
    weight = f"{prefix}loss_weight"
    names = [prefix + name for name in _READ] + [weight] * (weight in checkpoint.tensors)
    lengths = {name: checkpoint.tensors[name] for name in names}
    shapes = {getattr(tensor, "shape", None) for tensor in lengths.values()}
    if len(shapes) != 1 or len(next(iter(shapes)) or ()) != 1:
        raise ValueError(f"{checkpoint.path}: {', '.join(map(shown, names))} differ in length: no diffusion's buffers")
    buffers = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.read(names).items()}
    found = _fitting_objectives(buffers) if "loss_weight" in buffers else []
    if len(found) > 1 or (not found and "loss_weight" in buffers):
        raise ValueError(f"{checkpoint.path}: loss_weight fits {len(found)} objectives, so it is damaged or unknown")
    if found and prediction not in (None, found[0]):
        raise ValueError(f"{checkpoint.path}: the network predicts {found[0]} by its loss_weight, not {prediction}")
    target = found[0] if found else prediction or default
    if target is None:
        raise ValueError(
            f"{checkpoint.path}: without a loss_weight it does not say what the network predicts; give prediction "
            f"(--prediction): {', '.join(PREDICTION_TYPES)}"
        )
    betas = tuple(buffers["betas"].double().tolist())
    return DiffusionConfig(num_timesteps=len(betas), trained_betas=betas, prediction_type=target)


def _fitting_objectives(buffers: dict[str, Tensor]) -> list[str]:
    """Return the predictions whose loss weights these are, for some cap on the signal-to-noise ratio or none."""
    snr = buffers["alphas_cumprod"].double() / buffers["sqrt_one_minus_alphas_cumprod"].double() ** 2
    factors = {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1.0}
    capped = {name: buffers["loss_weight"].double() * factors[name] for name in OBJECTIVES}
    return [
        _PREDICTION[name]
        for name, values in capped.items()
        if torch.allclose(values, snr.clamp(max=float(values.max())), rtol=1e-3, atol=0.0)
    ]
