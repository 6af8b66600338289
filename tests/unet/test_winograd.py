"""Winograd's F(4x4, 3x3) computes the convolution, alone and behind nearest upsampling."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastddpm.unet.winograd import WinogradConv2d, WinogradUpsample, fits

# Tiles of 4x4 outputs: one, a row, and more than one in each direction with B > 1 and C_in != C_out.
SIZES = [(1, 3, 3, 4, 4), (2, 5, 7, 8, 12), (1, 16, 8, 4, 20)]


@pytest.mark.parametrize(("B", "C_in", "C_out", "H", "W"), SIZES)
@torch.no_grad()
def test_winograd_matches_float64_convolution(B: int, C_in: int, C_out: int, H: int, W: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(C_in, C_out, 3, padding=1), torch.randn(B, C_in, H, W)
    got = WinogradConv2d(conv)(x)
    want = conv.double()(x.double())
    assert got.shape == want.shape
    assert (got - want).norm() < 3e-6 * want.norm()


@pytest.mark.parametrize(("B", "C_in", "C_out", "H", "W"), SIZES)
@torch.no_grad()
def test_winograd_upsample_matches_float64(B: int, C_in: int, C_out: int, H: int, W: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(C_in, C_out, 3, padding=1), torch.randn(B, C_in, H // 2, W // 2)
    got = WinogradUpsample(conv)(x)
    want = conv.double()(functional.interpolate(x.double(), scale_factor=2.0, mode="nearest"))
    assert got.shape == want.shape
    assert (got - want).norm() < 3e-6 * want.norm()


@torch.no_grad()
def test_winograd_is_exact_on_small_integers() -> None:
    """On the borders too: a constant image shows what the padding adds."""
    conv, x = nn.Conv2d(2, 2, 3, padding=1), torch.ones(1, 2, 8, 8)
    conv.weight.copy_(24 * torch.randint(-2, 3, conv.weight.shape, generator=torch.Generator().manual_seed(0)))
    conv.bias.zero_()
    torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=0, atol=2e-3)
    want = conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(WinogradUpsample(conv)(x), want, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16),
    ],
)
def test_fits_refuses_other_convolutions(conv: nn.Conv2d) -> None:
    assert not fits(conv)
    assert fits(nn.Conv2d(4, 4, 3, padding=1))
