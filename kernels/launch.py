"""What every launcher shares: alignment, strides, the device guard, and the description of a compiled variant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from fastddpm.kernels.tiles import NUM_WARPS, TILE, block_groups
from torch import Tensor

# Contraction is switched off by name: Triton's default differs between releases and changes bits.
OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}

NOISE_NONE, NOISE_COUNTER, NOISE_GIVEN = 0, 1, 2

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}


class Variant(NamedTuple):
    """One compiled form of a kernel, as ``triton.compile(ASTSource(fn, signature, constexprs), options=...)`` takes it.

    No argument carries an assumption about divisibility: alignment is the constant ``ALIGNED``, and everything that
    is no constant is in ``do_not_specialize``.
    """

    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


# Key and counter words of a draw: seed, sample_id and step, int64 [B] or [1] each, and the stream.
Words = tuple[Tensor, Tensor, Tensor, int]


def make_variant(fn: Any, types: dict[str, torch.dtype | None], constants: dict[str, Any]) -> Variant:
    """Describe a variant from its pointers' dtypes (None: not passed) and constants; integers are 32 bits wide."""
    signature: dict[str, str] = {}
    constexprs = dict(constants)
    for name in fn.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name not in types:
            signature[name] = "i32"
        elif (dtype := types[name]) is None:
            signature[name], constexprs[name] = "constexpr", None
        else:
            signature[name] = f"*{_TYPES[dtype]}"
    return Variant(fn, signature, constexprs, dict(OPTIONS))


def tile_constants(groups: int, aligned: bool) -> dict[str, Any]:
    """The constants that follow from the shape."""
    return {"ALIGNED": aligned, "BLOCK_G": block_groups(groups), "TILE": TILE}


def is_aligned(n: int, *tensors: Tensor | None) -> bool:
    """Whether groups of four can move as one: whole groups in n elements, and 16-byte aligned storage throughout."""
    return n % 4 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def sample_stride(values: Tensor, batch: int) -> int:
    """0 for one value for all samples, 1 for one each."""
    if values.shape not in ((1,), (batch,)) or not values.is_contiguous():
        raise ValueError(f"expected contiguous [1] or [{batch}], got {tuple(values.shape)}, strides {values.stride()}")
    return 0 if values.shape[0] == 1 else 1


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on whatever device is current: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
