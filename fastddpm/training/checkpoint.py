"""Training checkpoints: one safetensors file, written atomically, its header carrying the rest of the state as JSON.

Never pickle. A crash at any moment leaves the previous checkpoint, or the new one, and at most a ``*.tmp`` file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import parse_object
from fastddpm.training.ema import EMA

FORMAT = "fastddpm-training-1"
CHECKPOINT = "checkpoint.safetensors"


def save_checkpoint(
    folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write model, average and optimiser, and ``state`` (JSON), to ``folder/checkpoint.safetensors``."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors[f"ema.{name}"] = ema.weights[name]
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value
    # clone(): no two entries may share storage; contiguous: the file format knows no channels_last.
    on_disk = {name: v.cpu().clone(memory_format=torch.contiguous_format) for name, v in tensors.items()}
    metadata = {"format": FORMAT, "state": json.dumps(state, allow_nan=False)}
    write_files({folder / CHECKPOINT: save(on_disk, metadata)})


def load_checkpoint(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load ``folder/checkpoint.safetensors`` into model, average and optimiser, and return its ``state``.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    path = folder / CHECKPOINT
    state = read_state(folder)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name, p in model.named_parameters():
            if f"model.{name}" not in names or list(p.shape) != file.get_slice(f"model.{name}").get_shape():
                raise ValueError(f"{path}: no weights of shape {list(p.shape)} for {name}; it is of another model")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(file.get_tensor(f"model.{name}"))
        ema.load({name: file.get_tensor(f"ema.{name}") for name in ema.weights})
        for name, p in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = file.get_tensor(f"optimizer.{key}.{name}")
                # like p: the optimiser's fused loops need its moments in the parameter's memory format.
                optimizer.state[p][key] = value if key == "step" else torch.empty_like(p).copy_(value)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return the ``state`` that a checkpoint was saved with, without loading its tensors.

    Raises:
        ValueError: the file is damaged or not a training checkpoint.
    """
    path = folder / CHECKPOINT
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"it is not a {FORMAT} file")
        return parse_object(metadata["state"].encode(), source="its state")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a usable checkpoint: {error}") from error
