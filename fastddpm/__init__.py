"""fastddpm: a drop-in, high-performance sampler for denoising diffusion probabilistic models.

The maths is in `fastddpm.reference`, in the paper's own form; `fastddpm.sample` is the front door. Names are imported
on first use, so that `import fastddpm` loads neither torch, triton nor any optional dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.acceleration import accelerate as accelerate
    from fastddpm.ddim import ddim_inversion_table as ddim_inversion_table
    from fastddpm.ddim import ddim_table as ddim_table
    from fastddpm.ddpm import ddpm_table as ddpm_table
    from fastddpm.diffusion import DiffusionConfig as DiffusionConfig
    from fastddpm.dpm_solver import dpm_solver_table as dpm_solver_table
    from fastddpm.errors import BackendUnavailable as BackendUnavailable
    from fastddpm.likelihood import bits_per_dim as bits_per_dim
    from fastddpm.loss import ddpm_loss as ddpm_loss
    from fastddpm.noise import randn as randn
    from fastddpm.sampler import Sampler as Sampler
    from fastddpm.sampling import sample as sample
    from fastddpm.schedule import Schedule as Schedule
    from fastddpm.table import Table as Table
    from fastddpm.unet import UNet as UNet
    from fastddpm.unet import UNetConfig as UNetConfig
    from fastddpm.weights import load as load
    from fastddpm.weights import save_pretrained as save_pretrained

__version__ = "0.1.0"

_HOME = {
    "BackendUnavailable": "errors",
    "DiffusionConfig": "diffusion",
    "Sampler": "sampler",
    "Schedule": "schedule",
    "Table": "table",
    "UNet": "unet",
    "UNetConfig": "unet",
    "accelerate": "acceleration",
    "bits_per_dim": "likelihood",
    "ddim_inversion_table": "ddim",
    "ddim_table": "ddim",
    "ddpm_loss": "loss",
    "ddpm_table": "ddpm",
    "dpm_solver_table": "dpm_solver",
    "load": "weights",
    "randn": "noise",
    "sample": "sampling",
    "save_pretrained": "weights",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastddpm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
