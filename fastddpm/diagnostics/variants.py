"""The kernel variants that ``fastddpm inspect`` and the tests compile: one of each kind that a sampler launches.

A variant is a launch as ``fastddpm.ops`` makes it, of tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastddpm.diagnostics import compile_offline as offline
from fastddpm.diagnostics.step_cases import StepCase, arrange, inputs
from fastddpm.noise.v1 import Counter
from fastddpm.ops.twins import Flags

if TYPE_CHECKING:
    from fastddpm.kernels.launch import Launch

# CIFAR-10's shape, at a batch at which every program walks one tile; and one that fills any GPU many times over, so
# that a program walks several.
_IMAGES, _MANY_IMAGES = (64, 3, 32, 32), (16384, 3, 32, 32)
_POINTS = (100_000, 2)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """One launch of a kernel.

    Attributes:
        kernel: stem of the kernel, "p_sample".
        tensors: name in the paper of each pointer argument that scales with the batch.
        accesses: how often an element of such a tensor moves, where it is not once.
    """

    kernel: str
    name: str
    launch: Launch
    elements: int
    tensors: Mapping[str, str]
    accesses: Mapping[str, float]

    @property
    def elements_per_program(self) -> float:
        """Elements of x_t that a program covers on average, idle lanes counted in."""
        return self.elements / math.prod(self.launch.grid)

    @property
    def trips(self) -> tuple[int, ...]:
        """Rounds of the kernel's loop over channels or tiles, if it has one at this shape."""
        flags, repeat = self.launch.flags, self.launch.arguments.get("repeat")
        if flags["ALIGNED"] and (flags.get("M_NHWC") or flags.get("LOW_NHWC")):
            return (flags["CHANNELS"],)
        return (repeat,) if isinstance(repeat, int) else ()

    @property
    def bytes_per_element(self) -> float:
        """To and from the tensors that scale with the batch."""
        passed = ((name, self.launch.arguments[name]) for name in self.tensors)
        return sum(t.element_size() * self.accesses.get(name, 1) for name, t in passed if isinstance(t, Tensor))


def tensor(shape: tuple[int, ...], dtype: torch.dtype = FP32, layout: str = "contiguous") -> Tensor:
    """A tensor without data; ``layout`` as in `StepCase`."""
    return arrange(torch.empty(shape, dtype=dtype, device="meta"), layout)


def counter(batch: int) -> Counter:
    """A counter without data."""
    word = tensor((batch,), torch.int64)
    return Counter(word, word, word, 1)


def p_sample_variant(name: str, case: StepCase) -> Variant:
    """The reverse step."""
    from fastddpm.kernels.p_sample import p_sample_launch

    given, flags = inputs(case, device="meta"), case.flags
    launch = p_sample_launch(**given | {"ring": given["history"], "history": flags.history})
    names = {"x_ptr": "x_t", "m_ptr": "m", "z_ptr": "z", "ring_ptr": "history", "out_ptr": "x_prev"}
    names |= {"x0_out_ptr": "x0", "low_ptr": "low"}
    accesses = {"m_ptr": 1 + flags.learned + flags.guided, "ring_ptr": flags.history + 1}
    return Variant("p_sample", name, launch, math.prod(case.shape), names, accesses)


def q_sample_variant(
    name: str,
    shape: tuple[int, ...] = _IMAGES,
    *,
    x: torch.dtype = FP32,
    given: bool = False,
    eps_out: torch.dtype | None = None,
    keep: bool = False,
    layout: str = "contiguous",
) -> Variant:
    """The forward process; the noise is drawn in the kernel unless it is given."""
    from fastddpm.kernels.q_sample import q_sample_launch

    launch = q_sample_launch(
        tensor(shape, x, layout),
        tensor((1000, 2)),
        tensor(shape[:1], torch.int64),
        tensor(shape, x) if given else counter(shape[0]),
        tensor(shape, x),
        None if eps_out is None else tensor(shape, eps_out),
        tensor(shape, torch.bool) if keep else None,
    )
    names = {"x_ptr": "x_0", "noise_ptr": "eps", "out_ptr": "x_t", "eps_out_ptr": "eps_out", "keep_ptr": "keep"}
    return Variant("q_sample", name, launch, math.prod(shape), names, {})


def ddpm_loss_variant(
    name: str,
    shape: tuple[int, ...] = _IMAGES,
    *,
    m: torch.dtype = FP32,
    x: torch.dtype | None = None,
    draws: bool = True,
    gradient: bool = False,
    learned: bool = False,
    layout: str = "contiguous",
) -> Variant:
    """The training loss, or its gradient; ``x`` None: the target has no term in x_0.

    The partial sums, one for 32 groups of four, are left out of the bytes.
    """
    from fastddpm.kernels.ddpm_loss import ddpm_loss_launch

    batch, channels, *plane = shape
    output = tensor((batch, channels * (1 + learned), *plane), m, layout)
    launch, _ = ddpm_loss_launch(
        output,
        None if x is None else tensor(shape, x),
        tensor((1000, 3)),
        tensor((batch,), torch.int64),
        counter(batch) if draws else None,
        learned,
        tensor((batch,)) if gradient else None,
        output if gradient else None,
    )
    names = {"m_ptr": "m", "x_ptr": "x_0"} | ({"out_ptr": "grad_m"} if gradient else {})
    return Variant("ddpm_loss", name, launch, math.prod(shape), names, {})


def noise_variant(
    name: str, shape: tuple[int, ...] = _IMAGES, dtype: torch.dtype = FP32, layout: str = "contiguous"
) -> Variant:
    """The noise alone."""
    from fastddpm.kernels.noise import randn_launch

    out = tensor((shape[0], math.prod(shape[1:])), dtype, layout)
    return Variant("noise", name, randn_launch(out, counter(len(out))), out.numel(), {"out_ptr": "z"}, {})


def group_norm_variant(
    name: str, channels: int, size: int, *, skip: int = 0, dtype: torch.dtype = BF16, adds: bool = False
) -> Variant:
    """The first launch of a group normalisation of 32 groups with bias and time, or with bias, residual and sum."""
    from fastddpm.kernels.group_norm import group_norm_launches

    def image(width: int) -> Tensor:
        return tensor((16, width, size, size), dtype, "channels_last")

    total = channels + skip
    launch = next(
        group_norm_launches(
            image(channels),
            tensor((total,), dtype),
            tensor((total,), dtype),
            32,
            1e-5,
            image(skip) if skip else None,
            image(channels) if adds else None,
            tensor((channels,), dtype),
            None if adds else tensor((16, channels), dtype),
            False,
            True,
            image(total),
            image(total) if adds else None,
        )
    )
    names = {"x_ptr": "x", "skip_ptr": "skip", "residual_ptr": "residual", "sum_ptr": "sum", "y_ptr": "y"}
    part = channels / total
    accesses = {"x_ptr": part, "skip_ptr": 1 - part, "residual_ptr": part}
    return Variant("group_norm", name, launch, 16 * total * size * size, names, accesses)


def variants() -> list[Variant]:
    """All of them, kernel by kernel; of the reverse step every flag alone on top of a clipped float32 step.

    Raises:
        BackendUnavailable: if Triton is missing or set to interpret.
    """
    offline.load_triton()
    odd, nhwc, shifted = (64, 3, 31, 33), "channels_last", "shifted"

    def step(name: str, shape: tuple[int, ...] = _IMAGES, **changes: Any) -> Variant:
        return p_sample_variant(name, StepCase(shape, flags=Flags(clip=True)).but(**changes))

    return [
        step("float32"),
        step("float32, full row (c_m)", use_m=True),
        step("float32, large batch", _MANY_IMAGES),
        step("no clip", clip=False),
        step("learned variance", learned=True),
        step("guided", guided=True),
        step("one older x0 (2M)", history=1),
        step("two older x0 (3M, UniPC-2)", history=2),
        step("three older x0 (UniPC-3)", history=3),
        step("x0 stored", x0_out=FP32),
        step("bfloat16 copy out", low_out=BF16),
        step("bfloat16 m", m=BF16),
        step("bfloat16 m, bfloat16 copy out", m=BF16, low_out=BF16),
        step("bfloat16 throughout", x=BF16, m=BF16),
        step("float16 throughout", x=FP16, m=FP16),
        step("noise given", noise="given"),
        step("no noise (DDIM)", noise="none"),
        step("channels-last m", m_layout=nhwc),
        step("channels-last bfloat16 m and copy", m=BF16, m_layout=nhwc, low_out=BF16, low_layout=nhwc),
        step("3x8x8", (64, 3, 8, 8)),
        step("2-D points", _POINTS),
        step("n not a multiple of 4", odd),
        step("unaligned storage", layout=shifted),
        q_sample_variant("float32"),
        q_sample_variant("float32, eps returned", eps_out=FP32),
        q_sample_variant("bfloat16, eps returned", x=BF16, eps_out=BF16),
        q_sample_variant("noise given", given=True),
        q_sample_variant("known data", keep=True),
        q_sample_variant("2-D points", _POINTS),
        q_sample_variant("unaligned storage", layout=shifted),
        ddpm_loss_variant("epsilon"),
        ddpm_loss_variant("epsilon, gradient", gradient=True),
        ddpm_loss_variant("v", x=FP32),
        ddpm_loss_variant("v, gradient", x=FP32, gradient=True),
        ddpm_loss_variant("x_0", x=FP32, draws=False),
        ddpm_loss_variant("epsilon, bfloat16 m", m=BF16),
        ddpm_loss_variant("epsilon, learned variance", learned=True),
        ddpm_loss_variant("epsilon, channels-last m", layout=nhwc),
        ddpm_loss_variant("epsilon, channels-last m, gradient", layout=nhwc, gradient=True),
        ddpm_loss_variant("2-D points", _POINTS),
        ddpm_loss_variant("n not a multiple of 4", odd),
        ddpm_loss_variant("unaligned storage", layout=shifted),
        noise_variant("float32"),
        noise_variant("bfloat16", dtype=BF16),
        noise_variant("2-D points", _POINTS),
        noise_variant("unaligned storage", layout=shifted),
        group_norm_variant("128x32x32", 128, 32),
        group_norm_variant("128x32x32, residual", 128, 32, adds=True),
        group_norm_variant("256x32x32, residual", 256, 32, adds=True),
        group_norm_variant("256+128x32x32, residual", 256, 32, skip=128, adds=True),
        group_norm_variant("256x16x16", 256, 16),
        group_norm_variant("256+256x16x16, residual", 256, 16, skip=256, adds=True),
        group_norm_variant("256x8x8", 256, 8),
        group_norm_variant("256+256x4x4, residual", 256, 4, skip=256, adds=True),
    ]
