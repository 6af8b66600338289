"""The UNet's form with fused normalisations: the same outputs, fewer operations, and no copy of a skip connection."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import Sampler, Schedule, ddpm_table
from fastddpm.errors import BackendUnavailable
from fastddpm.unet.forms import inference_form, use_channels_last
from fastddpm.unet.fused import denoise
from fastddpm.unet.unet import UNet
from tests.tiny import ATTENTION, PLAIN, tiny_unet

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift", "num_class_embeds": 3, "null_class": 2},
    "padded after": {"downsample_padding": 0},
    "scaled middle": {"mid_block_scale_factor": 2**0.5},
    "gelu": {"act_fn": "gelu"},
    "no attention in the middle": {"add_attention": False},
    "two blocks a level, centred": {"layers_per_block": 2, "center_input_sample": True},
}


def outputs(unet: UNet) -> tuple[Tensor, Tensor]:
    """What a network gives, and what its fused form does."""
    form = inference_form(unet)
    use_channels_last(form)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=unet.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        time = unet.project_time(unet.embed(torch.tensor([3, 500])))
        return unet.denoise(x, time), denoise(form, x, time)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_form_is_the_network_to_rounding(name: str) -> None:
    for base in (PLAIN, ATTENTION):
        expected, found = outputs(tiny_unet(base, **CONFIGS[name]))
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fused_form_takes_bfloat16() -> None:
    expected, found = outputs(tiny_unet(ATTENTION).to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert float((found - expected).float().norm() / expected.float().norm()) < 2e-2


def test_fused_form_normalises_once_each_and_joins_nothing() -> None:
    unet, seen = tiny_unet(ATTENTION), Counter[str]()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[func.name()] += 1
            return func(*args, **(kwargs or {}))

    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())
    form = inference_form(unet)
    use_channels_last(form)
    x = torch.zeros(2, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        time = unet.project_time(unet.embed(torch.tensor([3, 500])))
        with Record():
            denoise(form, x, time)
    assert seen["fastddpm::group_norm"] == norms
    assert not {"aten::cat", "aten::native_group_norm", "aten::silu"} & set(seen)


def test_fused_norms_are_refused_where_they_cannot_be() -> None:
    table = ddpm_table(Schedule.linear(50), steps=3)
    with pytest.raises(ValueError, match="norm"):
        Sampler(tiny_unet(), table, (1, 8, 8), norm="triton")
    sampler = Sampler(tiny_unet(), table, (1, 8, 8), norm="fused")
    with pytest.raises(BackendUnavailable, match=r"fastddpm\.UNet on CUDA.*on cpu; leave it out"):
        sampler.sample(seeds=[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_norms_give_the_same_images_on_cuda(dtype: torch.dtype) -> None:
    table = ddpm_table(Schedule.linear(50), steps=4)
    fused, plain = (
        Sampler(tiny_unet(ATTENTION), table, (1, 8, 8), device="cuda", dtype=dtype, norm=norm).sample(seeds=[1, 2])
        for norm in ("fused", "torch")
    )
    assert float((fused - plain).norm() / plain.norm()) < (2e-2 if dtype == torch.float32 else 1e-1)
