"""The installed package."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def original() -> Any:
    return pytest.importorskip(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
        reason="denoising-diffusion-pytorch, or the torchvision that it imports, is not installed",
        exc_type=ImportError,
    )
