"""Training checkpoints: one safetensors file, written atomically, its header carrying the rest of the state as JSON.

Never pickle. A crash at any moment leaves the previous checkpoint, or the new one, and at most a ``*.tmp`` file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastddpm.checks import integer, number
from fastddpm.files.atomic import write_files
from fastddpm.files.safejson import parse_object
from fastddpm.files.tensors import SafetensorsFile, read_tensors
from fastddpm.machine.ranks import ALONE, Ranks
from fastddpm.training.ema import EMA
from fastddpm.training.shards import fill, gathered

FORMAT = "fastddpm-training-1"
CHECKPOINT = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks = ALONE,
) -> None:
    """Write model, average and optimiser, and rank 0's ``state`` (JSON), to ``folder/checkpoint.safetensors``."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p
        tensors[f"ema.{name}"] = ema.weights[name]
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{key}.{name}"] = value
    on_disk = gathered(tensors, ranks)
    # One entry: safetensors writes several in an order that differs from call to call.
    metadata = {"state": json.dumps({"format": FORMAT, **state}, allow_nan=False)}
    if ranks.rank == 0:
        write_files({folder / CHECKPOINT: save(on_disk, metadata)})


def load_checkpoint(folder: Path, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load ``folder/checkpoint.safetensors`` into model, average and optimiser, and return its ``state``.

    Raises:
        ValueError: the file is damaged or belongs to another model.
    """
    path, state = folder / CHECKPOINT, read_state(folder)
    parameters = dict(model.named_parameters())
    kinds = ("model", "ema", *(f"optimizer.{key}" for key in _MOMENTS))
    expected = {f"{kind}.{name}": p.shape for kind in kinds for name, p in parameters.items()}
    expected |= {f"optimizer.step.{name}": torch.Size() for name in parameters}
    tensors = read_tensors(SafetensorsFile(path), expected)
    for name, p in parameters.items():
        fill(p, tensors[f"model.{name}"])
        fill(ema.weights[name], tensors[f"ema.{name}"])
        optimizer.state[p]["step"] = tensors[f"optimizer.step.{name}"].to(p.device)
        for key in _MOMENTS:
            # like p: the optimiser's fused loops need its moments in the parameter's memory format.
            optimizer.state[p][key] = fill(torch.empty_like(p), tensors[f"optimizer.{key}.{name}"])
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return the ``state`` that a checkpoint was saved with, without loading its tensors.

    Raises:
        ValueError: the file is damaged or not a training checkpoint.
    """
    path = folder / CHECKPOINT
    try:
        metadata = SafetensorsFile(path).metadata
        state = parse_object(metadata.get("state", "{}").encode(), source="its state")
        if state.pop("format", metadata.get("format")) != FORMAT:
            raise ValueError(f"it is not a {FORMAT} file")
        integer("step", state.get("step"), 0)
        log = state.get("log")
        if not isinstance(log, dict):
            raise ValueError("its state has no log")
        integer("count", log.get("count", 0), 0)
        number("sum", log.get("sum", 0.0))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a usable checkpoint: {error}") from error
    return state
