"""The fused group normalisation: its twin against PyTorch's own layers in float64, and the operator inside PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fastddpm.ops.group_norm import group_norm
from tests.ops.norm_cases import CASES, NormCase

FULL = NormCase(2, 16, (8, 8), 4, skip=8, residual=True, bias=True, time=2, keep=True)


def oracle(x: Tensor, skip: Tensor | None, residual: Tensor | None, **rest: Any) -> tuple[Tensor, Tensor]:
    """The layers as a UNet has them: (y, u)."""
    rest = {name: value.double() if isinstance(value, Tensor) else value for name, value in rest.items()}
    u, time = x.double(), rest["time"]
    if rest["bias"] is not None:
        u = u + rest["bias"][:, None, None]
    if time is not None and not rest["scale_shift"]:
        u = u + time[:, :, None, None]
    if residual is not None:
        u = u + residual.double()
    if skip is not None:
        u = torch.cat([u, skip.double()], dim=1)
    stored = u.to(x.dtype).double() if rest["keep"] else u
    y = functional.group_norm(stored, rest["groups"], rest["weight"], rest["beta"], rest["tiny"])
    if rest["scale_shift"]:
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + shift
    return functional.silu(y) if rest["silu"] else y, u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twin_is_the_layers_in_float64(case: NormCase, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    y, u = group_norm(**arguments, backend="torch")
    expected, added = oracle(**arguments)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    if case.keep:
        torch.testing.assert_close(u.double(), added, rtol=tolerance, atol=tolerance)
    else:
        assert u.numel() == 0


def test_operator_is_opaque_and_known_to_fake_tensors() -> None:
    arguments = FULL.arguments(torch.float32)
    positional = [
        arguments[name] for name in ("x", "weight", "beta", "groups", "tiny", "skip", "residual", "bias", "time")
    ]
    torch.library.opcheck(
        torch.ops.fastddpm.group_norm.default,
        (*positional, False, True, True, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(lambda **named: group_norm(**named), backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(**arguments), group_norm(**arguments)))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="fake CUDA tensors need a CUDA build of PyTorch")
def test_operator_keeps_images_channels_last_on_cuda() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
        y, u = group_norm(x, torch.empty(24), torch.empty(24), 4, 1e-5, skip=x[:, :8], keep=True)
    assert y.shape == (2, 24, 8, 8)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert u.is_contiguous(memory_format=torch.channels_last)
    assert u.shape == y.shape


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(1, 6, 2, 2)
    with pytest.raises(ValueError, match="4 groups do not divide 6 channels"):
        group_norm(x, torch.ones(6), torch.ones(6), 4, 1e-5)
    with pytest.raises(ValueError, match="32 bits"):
        group_norm(x[:1, :, :1, :1].expand(1, 6, 1 << 15, 1 << 15), torch.ones(6), torch.ones(6), 2, 1e-5)
