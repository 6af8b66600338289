"""Group normalisation along channels is group normalisation: against float64 and PyTorch's layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastddpm.unet.group_norm import ChannelsLastGroupNorm


def layer(groups: int, channels: int) -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(groups, channels, eps=1e-5).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    return norm


def images(channels: int, offset: float = 0.0) -> Tensor:
    x = torch.randn(3, channels, 5, 7, generator=torch.Generator().manual_seed(1)) + offset
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (8, 16), (4, 12), (5, 5)])
# Far from zero a variance taken as a difference of squares would be lost.
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_float32_is_within_1e6_of_float64(groups: int, channels: int, offset: float) -> None:
    norm, x = layer(groups, channels), images(channels, offset)
    y = ChannelsLastGroupNorm(norm)(x)
    exact = layer(groups, channels).double()(x.double())
    # Sums of values near 1000 are rounded to 1e-4 of the values' standard deviation.
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=2e-6 + 2e-7 * offset)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_shift_is_added_before() -> None:
    norm, x = layer(4, 12), images(12)
    shift = 10 * torch.randn(3, 12, generator=torch.Generator().manual_seed(2))
    exact = layer(4, 12).double()(x.double() + shift.double()[:, :, None, None])
    torch.testing.assert_close(ChannelsLastGroupNorm(norm)(x, shift).double(), exact, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_float32_rounded_once(dtype: torch.dtype) -> None:
    norm, x = layer(8, 16).to(dtype), images(16).to(dtype)
    y = ChannelsLastGroupNorm(norm)(x)
    assert torch.equal(y, ChannelsLastGroupNorm(norm.float())(x.float()).to(dtype))


def test_constant_group_is_its_bias() -> None:
    norm = layer(4, 8)
    y = ChannelsLastGroupNorm(norm)(torch.full((2, 8, 4, 4), 3.0))
    torch.testing.assert_close(y, norm.bias.reshape(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-6)


def test_nan_stays_in_its_sample_and_group() -> None:
    x = images(8)
    x[1, 2, 0, 0] = float("nan")
    y = ChannelsLastGroupNorm(layer(4, 8))(x)
    assert y[1, 2:4].isnan().all()
    assert torch.isfinite(y).flatten(2).all(dim=2).sum() == 3 * 8 - 2
