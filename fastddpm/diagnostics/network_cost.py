"""What a call of a UNet costs on a GPU, by kind of kernel: launches, and bytes to and from the tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm.diagnostics.lowering import Call, lower
from fastddpm.unet.config import UNetConfig
from fastddpm.unet.inference import cuda_form
from fastddpm.unet.unet import UNet

NORMS, RESIZING = "norms, adds, joins", "upsampling, padding"
# By the operator that runs it; one that is missing is an error.
_KINDS = {
    "convolution": "convolutions",
    "addmm": "products",
    "mm": "products",
    "bmm": "products",
    "_scaled_dot_product_flash_attention": "attention",
    "_scaled_dot_product_efficient_attention": "attention",
    "group_norm": NORMS,
}
KINDS = (NORMS, RESIZING, "convolutions", "products", "attention")


class Cost(NamedTuple):
    """Kernels launched, and bytes moved if every kernel moves each of its tensors once."""

    launches: int
    bytes: int


def network_cost(config: UNetConfig, batch: int, arch: str, *, fuse: bool) -> dict[str, Cost]:
    """Lower a network in bfloat16, as a sampler compiles it on CUDA, and add up its kernels by kind.

    A convolution, a product and an attention count as one launch: what cuDNN and cuBLAS put before or after their
    kernels (padding, split sums) only a GPU shows.

    Args:
        batch: rows of the network's input.
        arch: "sm_90".
        fuse: with `norm="fused"`.

    Raises:
        BackendUnavailable: see `lowering.lower`.
        ValueError: the configuration does not say how large an image is.
    """
    with torch.device("meta"):
        form = cuda_form(UNet(config, zero_init=False).eval().to(torch.bfloat16), fuse)
    weights = dict(form.named_parameters())
    # Each block's time projection by itself: Inductor counts the whole of a tensor of which a part is read.
    vars(form)["forward"] = lambda x, *time: form.denoise(form.form, x, time)
    blocks = len(form.widths)

    def denoise(x: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        values = dict(zip(weights, inputs[blocks:], strict=True))
        return (torch.func.functional_call(form, values, (x, *inputs[:blocks])),)

    height, width = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
    if height is None or width is None:
        raise ValueError("the network's configuration names no sample_size")
    like = form.form.conv_in.weight
    x = like.new_empty(batch, height, width, config.in_channels).movedim(-1, 1)
    time = like.new_empty(batch, sum(form.widths)).split(form.widths, dim=1)
    costs = dict.fromkeys(KINDS, Cost(0, 0))
    for call in lower(denoise, [x, *time, *weights.values()], arch):
        kind, (launches, moved) = _kind(call), _cost(call)
        costs[kind] = Cost(costs[kind].launches + launches, costs[kind].bytes + moved)
    return costs


def _kind(call: Call) -> str:
    if not call.generated:
        (operator,) = call.operators
        return _KINDS[operator]
    return RESIZING if call.operators & {"upsample_nearest2d", "constant_pad_nd"} else NORMS


def _cost(call: Call) -> Cost:
    """One launch; a normalisation of groups that no program holds has a second, which reads its input once more."""
    if not call.arguments:
        return Cost(1, call.bytes)
    from fastddpm.kernels.group_norm import group_norm_launches

    x, weight, *rest = (
        torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        if isinstance(value, Tensor)
        else value
        for value in call.arguments
    )
    y = x.new_empty(len(x), len(weight), *x.shape[2:])
    launches = len(list(group_norm_launches(x, weight, *rest[:9], y, None)))
    return Cost(launches, call.bytes + (launches - 1) * y.nbytes)
