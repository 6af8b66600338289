"""Models on disk: a folder with a configuration, weights and a schedule, in diffusers' two layouts. Never pickle.

flat       config.json, scheduler_config.json, model.safetensors (or diffusion_pytorch_model.safetensors)
pipeline   model_index.json, unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/scheduler_config.json

Beside UNet2DModel's keys, config.json may hold null_class (see `UNetConfig`) and weights_sha256, which is verified when
it is there; both are written with a leading underscore, which makes diffusers skip them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import read_object
from fastddpm.files.tensors import read_tensors, refuse_escape, sha256
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.unet import UNet

CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
FLAT_WEIGHTS, DIFFUSERS_WEIGHTS = "model.safetensors", "diffusion_pytorch_model.safetensors"
MODEL_CLASS = "UNet2DModel"
SHIPPED = Path(__file__).parent.parent / "models"

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
_EXTRA_KEYS = ("null_class", "weights_sha256")
# Attention layers had other names before diffusers 0.16; google/ddpm-cifar10-32 is still stored so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")


def load(name_or_dir: str | os.PathLike[str]) -> UNet:
    """Load a network from a folder, or one that ships with the package by its name.

    Args:
        name_or_dir: name of a shipped model ("digits"), or a folder in either layout of this module. Only files in the
            folder are read; nothing in it is executed.

    Returns:
        The network in eval mode, float32 on the CPU whatever the stored dtype, its `diffusion` set from
        scheduler_config.json (None, with a warning, where the folder has none).

    Raises:
        FileNotFoundError: no such model or file; the message lists the shipped models.
        ValueError: a file is damaged, hostile, of another architecture or of a feature that is not supported; the
            message names file and key. A pickle (.pt, .ckpt, .bin, ...) is refused.
    """
    folder = _find(name_or_dir)
    unet_folder = folder if (folder / CONFIG).exists() or not (folder / "unet").is_dir() else folder / "unet"
    raw = _read_config(unet_folder / CONFIG, folder)
    with _naming(unet_folder / CONFIG):
        digest = _pop_digest(raw)
        config = UNetConfig.from_dict(raw)
    weights = _find_weights(unet_folder, folder)
    if digest is not None and sha256(weights) != digest:
        raise ValueError(
            f"{weights}: its SHA-256 is not weights_sha256={digest} of {CONFIG}; it is damaged or not its own"
        )
    # On the meta device, so that no memory is taken for a configuration before its weights are seen to be there.
    with torch.device("meta"):
        model = UNet(config, zero_init=False)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_tensors(weights, expected, _modern_name), assign=True)
    model.diffusion = _read_diffusion(folder)
    return model.eval()


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], layout: str = "flat", dtype: torch.dtype | None = None
) -> None:
    """Write a network so that `load` and diffusers read it; each file is replaced atomically, the configuration last.

    Args:
        model: a `UNet`, compiled or not. A `diffusion` of None is written as Ho et al.'s.
        directory: created if need be; other files in it are left alone.
        layout: "flat" or "pipeline" (diffusers' DDPMPipeline).
        dtype: dtype to store; None keeps the weights' own.

    Raises:
        TypeError: model is no UNet, or dtype is not floating point.
        ValueError: an unknown layout, a weight that is not finite in `dtype`, or a folder that holds a model in the
            other layout.
        OSError: the files could not be written; the old ones are intact.
    """
    unet = getattr(model, "_orig_mod", model)
    if not isinstance(unet, UNet):
        raise TypeError(f"model must be a fastddpm.UNet, got {type(model).__name__}")
    if layout not in ("flat", "pipeline"):
        raise ValueError(f"layout must be 'flat' or 'pipeline', got {layout!r}")
    folder = Path(directory)
    flat = layout == "flat"
    if (folder / ("unet" if flat else CONFIG)).exists():
        raise ValueError(f"{folder} holds a model in the other layout than {layout!r}; save to another folder")
    content = _weights_bytes(unet, dtype)
    unet_folder = folder if flat else folder / "unet"
    # diffusers takes a pipeline's weights under one name only, and finds the scheduler in its own folder.
    files = {
        unet_folder / (FLAT_WEIGHTS if flat else DIFFUSERS_WEIGHTS): content,
        (folder if flat else folder / "scheduler") / SCHEDULER: _json_bytes(
            (unet.diffusion or DiffusionConfig()).to_scheduler_config()
        ),
        unet_folder / CONFIG: _json_bytes(_file_config(unet.config, hashlib.sha256(content).hexdigest())),
    }
    if not flat:
        files[folder / INDEX] = _json_bytes(
            {
                "_class_name": "DDPMPipeline",
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["diffusers", MODEL_CLASS],
            }
        )
    write_files(files)


def _find(name_or_dir: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_dir)
    path = Path(name)
    if path.suffix.lower() in _PICKLES and not path.is_dir():
        raise ValueError(_no_pickle(path))
    shipped = sorted(entry.parent.name for entry in SHIPPED.glob(f"*/{CONFIG}"))
    if name in shipped:
        return SHIPPED / name
    if not path.exists():
        listed = ", ".join(shipped) or "none in this installation"
        raise FileNotFoundError(f"no folder {name!r} and no shipped model of that name; shipped models: {listed}")
    if not path.is_dir():
        raise ValueError(f"{path}: not a folder; pass the folder that holds {CONFIG} and the weights")
    return path


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: refused: it may hold pickled objects, which can run code when loaded; "
        f"make safetensors of it with: fastddpm convert {path} OUTPUT_FOLDER"
    )


def _read_config(path: Path, folder: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {CONFIG} and no unet/{CONFIG}: not a model folder")
    refuse_escape(path, folder)
    raw = read_object(path)
    kind = raw.get("_class_name", MODEL_CLASS)
    if kind != MODEL_CLASS:
        raise ValueError(f"{path}: _class_name={repr(kind)[:80]} is not supported; only {MODEL_CLASS} is")
    extras = {f"_{key}": key for key in _EXTRA_KEYS}
    return {extras.get(key, key): value for key, value in raw.items()}


def _pop_digest(raw: dict[str, Any]) -> str | None:
    digest = raw.pop("weights_sha256", None)
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"weights_sha256 must be 64 lower-case hexadecimal digits, got {repr(digest)[:80]}")
    return digest


def _find_weights(unet_folder: Path, folder: Path) -> Path:
    for name in (FLAT_WEIGHTS, DIFFUSERS_WEIGHTS):
        path = unet_folder / name
        if path.exists() or path.is_symlink():
            refuse_escape(path, folder)
            return path
    for path in sorted(unet_folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise ValueError(_no_pickle(path))
    raise FileNotFoundError(f"{unet_folder}: no {FLAT_WEIGHTS} and no {DIFFUSERS_WEIGHTS} beside {CONFIG}")


def _read_diffusion(folder: Path) -> DiffusionConfig | None:
    for path in (folder / SCHEDULER, folder / "scheduler" / SCHEDULER):
        if path.exists():
            refuse_escape(path, folder)
            raw = read_object(path)
            with _naming(path):
                return DiffusionConfig.from_scheduler_config(raw)
    warnings.warn(
        f"{folder} has no {SCHEDULER}: what the network was trained for is unknown, and sampling assumes Ho et al.'s "
        "linear schedule and epsilon prediction; set model.diffusion if that is wrong",
        stacklevel=3,
    )
    return None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        # Bounded, since it may quote what the file holds.
        raise ValueError(f"{path}: {str(error)[:400]}") from error


def _modern_name(name: str) -> str:
    return _OLD_NAME.sub(lambda match: match[1] + _OLD_ATTENTION[match[2]], name)


def _weights_bytes(model: UNet, dtype: torch.dtype | None) -> bytes:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not stored.isfinite().all():
            raise ValueError(f"{name} is not finite in {stored.dtype}; nothing was written")
        tensors[name] = stored
    return save(tensors, metadata={"format": "pt"})


def _file_config(config: UNetConfig, digest: str) -> dict[str, Any]:
    values = {(f"_{key}" if key in _EXTRA_KEYS else key): value for key, value in config.to_dict().items()}
    return {"_class_name": MODEL_CLASS, "_weights_sha256": digest, **values}


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
