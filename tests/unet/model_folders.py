"""A small network's folder, and ways to damage it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.unet.unet import UNetConfig
from tests import tiny

CONFIG = UNetConfig(**{**tiny.ATTENTION, "attention_head_dim": 8, "num_class_embeds": 3, "null_class": 2})
DIFFUSION = DiffusionConfig(beta_schedule="cosine", num_timesteps=500, prediction_type="v", clip_range=None)
ATTENTION = "mid_block.attentions.0.to_q.weight"
T_AND_LABELS = (torch.tensor([3, 400]), torch.tensor([0, 1]))


def assert_same_weights(got: torch.nn.Module, want: torch.nn.Module) -> None:
    assert got.state_dict().keys() == want.state_dict().keys()
    for name, tensor in want.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def forget_digest(folder: Path) -> None:
    edit_config(folder, _weights_sha256=None)


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors and drop their digest, so that the next check has to find what is wrong."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    forget_digest(folder)


def write_header(folder: Path, header: bytes | dict[str, Any], *, announced: int | None = None, data: int = 0) -> None:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(content) if announced is None else announced)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(length + content + bytes(data))
    forget_digest(folder)
