"""Upsampling by sub-pixel convolution computes nearest upsampling and the convolution behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastddpm.unet.subpixel import SubpixelUpsample

SIZES = [(1, 1, 1, 1, 1), (2, 3, 5, 4, 7), (1, 16, 8, 3, 2)]


def plain(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize(("B", "C_in", "C_out", "H", "W"), SIZES)
@torch.no_grad()
def test_subpixel_matches_float64(B: int, C_in: int, C_out: int, H: int, W: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(C_in, C_out, 3, padding=1).double(), torch.randn(B, C_in, H, W, dtype=torch.float64)
    want = plain(conv, x)
    torch.testing.assert_close(SubpixelUpsample(conv)(x), want, rtol=1e-12, atol=1e-12)
    got = SubpixelUpsample(conv.float())(x.float())
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * float(want.abs().max()))


@torch.no_grad()
def test_subpixel_is_exact_on_small_integers() -> None:
    """In bfloat16 too, on the borders too."""
    generator = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.bfloat16)
    for tensor in (conv.weight, conv.bias):
        tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))  # type: ignore[union-attr]
    x = torch.randint(-2, 3, (2, 2, 3, 5), generator=generator).to(torch.bfloat16)
    assert torch.equal(SubpixelUpsample(conv)(x), plain(conv, x))


@torch.no_grad()
def test_subpixel_weights_are_rounded_once() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, dtype=torch.bfloat16)
    # 1 + 2^-8 + 2^-8 = 1 + 2^-7, of which bfloat16 would lose both small parts one by one.
    conv.weight.copy_(torch.tensor([[0.0, 0, 0], [0, 1, 2**-8], [0, 2**-8, 0]]))
    even = SubpixelUpsample(conv).weight[0, 0]
    assert even.tolist() == [[0.0, 0.0], [0.0, 1 + 2**-7]]
