"""fastddpm: a drop-in, high-performance sampler for denoising diffusion probabilistic models.

The maths is in `fastddpm.reference`, in the paper's own form; `fastddpm.sample` is the front door. Names are imported
on first use, so that `import fastddpm` loads neither torch, triton nor any optional dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastddpm.errors import BackendUnavailable as BackendUnavailable
    from fastddpm.files.images import save_grid as save_grid
    from fastddpm.integrations import accelerate as accelerate
    from fastddpm.ops.draw import randn as randn
    from fastddpm.sampling.edits import slerp as slerp
    from fastddpm.sampling.sample import sample as sample
    from fastddpm.sampling.sampler import Sampler as Sampler
    from fastddpm.schedules.diffusion import DiffusionConfig as DiffusionConfig
    from fastddpm.schedules.schedule import Schedule as Schedule
    from fastddpm.tables.ddim import ddim_inversion_table as ddim_inversion_table
    from fastddpm.tables.ddim import ddim_table as ddim_table
    from fastddpm.tables.ddpm import ddpm_table as ddpm_table
    from fastddpm.tables.dpm_solver import dpm_solver_table as dpm_solver_table
    from fastddpm.tables.table import Table as Table
    from fastddpm.training.likelihood import bits_per_dim as bits_per_dim
    from fastddpm.training.loss import ddpm_loss as ddpm_loss
    from fastddpm.unet.load import load as load
    from fastddpm.unet.save import save_pretrained as save_pretrained
    from fastddpm.unet.unet import UNet as UNet
    from fastddpm.unet.unet import UNetConfig as UNetConfig

__version__ = "0.2.0"

_HOME = {
    "BackendUnavailable": "errors",
    "DiffusionConfig": "schedules.diffusion",
    "Sampler": "sampling.sampler",
    "Schedule": "schedules.schedule",
    "Table": "tables.table",
    "UNet": "unet.unet",
    "UNetConfig": "unet.config",
    "accelerate": "integrations",
    "bits_per_dim": "training.likelihood",
    "ddim_inversion_table": "tables.ddim",
    "ddim_table": "tables.ddim",
    "ddpm_loss": "training.loss",
    "ddpm_table": "tables.ddpm",
    "dpm_solver_table": "tables.dpm_solver",
    "load": "unet.load",
    "randn": "ops.draw",
    "sample": "sampling.sample",
    "save_grid": "files.images",
    "save_pretrained": "unet.save",
    "slerp": "sampling.edits",
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
