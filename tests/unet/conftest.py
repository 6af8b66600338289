"""What several test modules of model folders start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet
from tests.unet.model_folders import (
    CONFIG,
    DIFFUSION,
)


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    model = UNet(CONFIG, zero_init=False).eval()
    model.diffusion = DIFFUSION
    return model


@pytest.fixture
def folder(model: UNet, tmp_path: Path) -> Path:
    """A sound flat model folder, for tests to damage."""
    save_pretrained(model, tmp_path / "model")
    return tmp_path / "model"
