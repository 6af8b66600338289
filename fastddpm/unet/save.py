"""Models on disk: a folder with a configuration, weights and a schedule, in diffusers' two layouts. Never pickle.

flat       config.json, scheduler_config.json, diffusion_pytorch_model.safetensors (model.safetensors is read too)
pipeline   model_index.json, unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json

Beside UNet2DModel's keys, config.json may hold null_class (see `UNetConfig`) and weights_sha256, which is verified when
it is there; both are written with a leading underscore, which makes diffusers skip them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import to_json
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.config import UNetConfig

CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
WEIGHTS, OLD_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
MODEL_CLASS = "UNet2DModel"
EXTRA_KEYS = ("null_class", "weights_sha256")


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], layout: str = "flat", dtype: torch.dtype | None = None
) -> None:
    """Write a network so that `load` and diffusers read it; each file is replaced atomically, the configuration last.

    Args:
        model: a `UNet`, compiled or not. A `diffusion` of None is written as Ho et al.'s.
        directory: created if need be; other files in it than an older model's are left alone.
        layout: "flat" or "pipeline" (diffusers' DDPMPipeline).
        dtype: dtype to store; None keeps the weights' own.

    Raises:
        TypeError: model is no UNet, or dtype is not floating point.
        ValueError: an unknown layout, a weight that is not finite in `dtype`, or a folder that holds a model in the
            other layout.
        OSError: the files could not be written; the old ones are intact.
    """
    unet: Any = getattr(model, "_orig_mod", model)
    # Checked by its configuration: the network imports this module.
    if not isinstance(getattr(unet, "config", None), UNetConfig):
        raise TypeError(f"model must be a fastddpm.UNet, got {type(model).__name__}")
    if layout not in ("flat", "pipeline"):
        raise ValueError(f"layout must be 'flat' or 'pipeline', got {layout!r}")
    folder = Path(directory)
    flat = layout == "flat"
    if (folder / ("unet" if flat else CONFIG)).exists():
        raise ValueError(f"{folder} holds a model in the other layout than {layout!r}; save to another folder")
    content = _weights_bytes(unet, dtype)
    digest = hashlib.sha256(content).hexdigest()
    config = {(f"_{key}" if key in EXTRA_KEYS else key): value for key, value in unet.config.to_dict().items()}
    unet_folder, scheduler_folder = (folder, folder) if flat else (folder / "unet", folder / "scheduler")
    files = {
        unet_folder / WEIGHTS: content,
        scheduler_folder / SCHEDULER: to_json((unet.diffusion or DiffusionConfig()).to_scheduler_config()),
        unet_folder / CONFIG: to_json({"_class_name": MODEL_CLASS, "_weights_sha256": digest, **config}),
    }
    if not flat:
        parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", MODEL_CLASS]}
        files[folder / INDEX] = to_json({"_class_name": "DDPMPipeline", **parts})
    write_files(files)
    (unet_folder / OLD_WEIGHTS).unlink(missing_ok=True)


def _weights_bytes(model: nn.Module, dtype: torch.dtype | None) -> bytes:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(f"{name} is not finite in {stored.dtype}; nothing was written")
        tensors[name] = stored
    return save(tensors, metadata={"format": "pt"})
