"""Networks from folders in the layouts of `fastddpm.unet.save`, or by the name of one that is shipped. Never pickle."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastddpm.files.safejson import read_object
from fastddpm.files.tensors import read_tensors, refuse_escape
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.save import CONFIG, EXTRA_KEYS, MODEL_CLASS, OLD_WEIGHTS, SCHEDULER, WEIGHTS
from fastddpm.unet.unet import UNet

SHIPPED = Path(__file__).parent.parent / "models"

_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")
# Attention layers had other names before diffusers 0.16; google/ddpm-cifar10-32 is still stored so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(\.attentions\.\d+\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")


def load(name_or_dir: str | os.PathLike[str]) -> UNet:
    """Load a network from a folder, or one that ships with the package by its name.

    Args:
        name_or_dir: name of a shipped model ("digits"), or a folder in either layout. Only files in the
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
    # On the meta device, so that no memory is taken for a configuration before its weights are seen to be there.
    with torch.device("meta"):
        model = UNet(config, zero_init=False)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tensors = read_tensors(_find_weights(unet_folder, folder), expected, _modern_name, digest)
    model.load_state_dict(tensors, assign=True)
    model.diffusion = _read_diffusion(folder)
    return model.eval()


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
    extras = {f"_{key}": key for key in EXTRA_KEYS}
    return {extras.get(key, key): value for key, value in raw.items()}


def _pop_digest(raw: dict[str, Any]) -> str | None:
    digest = raw.pop("weights_sha256", None)
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"weights_sha256 must be 64 lower-case hexadecimal digits, got {repr(digest)[:80]}")
    return digest


def _find_weights(unet_folder: Path, folder: Path) -> Path:
    for name in (WEIGHTS, OLD_WEIGHTS):
        path = unet_folder / name
        if path.exists() or path.is_symlink():
            refuse_escape(path, folder)
            return path
    for path in sorted(unet_folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            raise ValueError(_no_pickle(path))
    raise FileNotFoundError(f"{unet_folder}: no {WEIGHTS} beside {CONFIG}")


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
