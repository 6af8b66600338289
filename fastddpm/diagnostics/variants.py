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
from fastddpm.noise.v1 import Counter
from fastddpm.ops.twins import Flags

if TYPE_CHECKING:
    from fastddpm.kernels.launch import Launch

# CIFAR-10's shape, at a batch at which every program walks one tile; and one that fills any GPU many times over, so
# that a program walks several.
_IMAGES, _MANY_IMAGES = (64, 3, 32, 32), (16384, 3, 32, 32)
_POINTS = (100_000, 2)
_CLIP = Flags(clip=True)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Variant:
    """One launch of a kernel.

    Attributes:
        kernel: stem of the kernel, "p_sample".
        name: what sets this variant apart.
        launch: the launch.
        elements: of x_t in the batch.
        tensors: name in the paper of each pointer argument that scales with the batch.
        accesses: how often an element of such a tensor moves, where it is not once.
    """

    kernel: str
    name: str
    launch: Launch
    elements: int
    tensors: Mapping[str, str]
    accesses: Mapping[str, int]

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
    def bytes_per_element(self) -> int:
        """To and from the tensors that scale with the batch."""
        passed = ((name, self.launch.arguments[name]) for name in self.tensors)
        return sum(t.element_size() * self.accesses.get(name, 1) for name, t in passed if isinstance(t, Tensor))


def tensor(shape: tuple[int, ...], dtype: torch.dtype = FP32, nhwc: bool = False, offset: int = 0) -> Tensor:
    """A tensor without data, channels-last or ``offset`` elements off its alignment if asked for."""
    if nhwc:
        return tensor((shape[0], *shape[2:], shape[1]), dtype).movedim(-1, 1)
    return torch.empty(math.prod(shape) + offset, dtype=dtype, device="meta")[offset:].view(shape)


def counter(batch: int) -> Counter:
    """A counter without data."""
    word = tensor((batch,), torch.int64)
    return Counter(word, word, word, 1)


def p_sample_variant(
    name: str,
    shape: tuple[int, ...] = _IMAGES,
    flags: Flags = _CLIP,
    noise: str = "counter",
    *,
    x: torch.dtype = FP32,
    m: torch.dtype | None = None,
    x0_out: torch.dtype | None = None,
    low_out: torch.dtype | None = None,
    m_nhwc: bool = False,
    low_nhwc: bool = False,
    offset: int = 0,
) -> Variant:
    """The reverse step; m has x's dtype unless another is given, and noise is "counter", "given" or "none"."""
    offline.load_triton()
    from fastddpm.kernels.p_sample import p_sample_launch

    batch, channels, *plane = shape
    m_shape = (batch * (1 + flags.guided), channels * (1 + flags.learned), *plane)
    launch = p_sample_launch(
        tensor(shape, x, offset=offset),
        tensor(m_shape, m or x, m_nhwc),
        tensor((1000, 14)),
        tensor((batch,), torch.int64),
        {"counter": counter(batch), "given": tensor(shape), "none": None}[noise],
        tensor(shape, x),
        x0_prev=tensor(shape, x) if flags.use_prev else None,
        x0_out=None if x0_out is None else tensor(shape, x0_out),
        low_out=None if low_out is None else tensor(shape, low_out, low_nhwc),
        **flags._asdict(),
    )
    names = {"x_ptr": "x_t", "m_ptr": "m", "z_ptr": "z", "x0_prev_ptr": "x0_prev", "out_ptr": "x_prev"}
    names |= {"x0_out_ptr": "x0", "low_ptr": "low"}
    accesses = {"m_ptr": 1 + flags.learned + flags.guided}
    return Variant("p_sample", name, launch, math.prod(shape), names, accesses)


def q_sample_variant(
    name: str,
    shape: tuple[int, ...] = _IMAGES,
    *,
    x: torch.dtype = FP32,
    given: bool = False,
    eps_out: torch.dtype | None = None,
    offset: int = 0,
) -> Variant:
    """The forward process; the noise is drawn in the kernel unless it is given."""
    offline.load_triton()
    from fastddpm.kernels.q_sample import q_sample_launch

    launch = q_sample_launch(
        tensor(shape, x, offset=offset),
        tensor((1000, 2)),
        tensor(shape[:1], torch.int64),
        tensor(shape, x) if given else counter(shape[0]),
        tensor(shape, x),
        None if eps_out is None else tensor(shape, eps_out),
    )
    names = {"x_ptr": "x_0", "noise_ptr": "eps", "out_ptr": "x_t", "eps_out_ptr": "eps_out"}
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
    m_nhwc: bool = False,
    offset: int = 0,
) -> Variant:
    """The training loss, or its gradient; ``x`` None: the target has no term in x_0.

    The partial sums, one for 32 groups of four, are left out of the bytes.
    """
    offline.load_triton()
    from fastddpm.kernels.ddpm_loss import ddpm_loss_launch

    batch, channels, *plane = shape
    output = tensor((batch, channels * (1 + learned), *plane), m, m_nhwc, offset)
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
    name: str, shape: tuple[int, ...] = _IMAGES, dtype: torch.dtype = FP32, *, offset: int = 0
) -> Variant:
    """The noise alone."""
    offline.load_triton()
    from fastddpm.kernels.noise import randn_launch

    out = tensor((shape[0], math.prod(shape[1:])), dtype, offset=offset)
    return Variant("noise", name, randn_launch(out, counter(len(out))), out.numel(), {"out_ptr": "z"}, {})


def variants() -> list[Variant]:
    """All of them, kernel by kernel; of the reverse step every flag alone on top of a clipped float32 step.

    Raises:
        BackendUnavailable: if Triton is missing or set to interpret.
    """
    step, clip, odd = p_sample_variant, _CLIP, (64, 3, 31, 33)
    low: dict[str, Any] = {"m": BF16, "low_out": BF16}
    return [
        step("float32"),
        step("float32, full row (c_m)", flags=clip._replace(use_m=True)),
        step("float32, large batch", _MANY_IMAGES),
        step("no clip", flags=Flags()),
        step("learned variance", flags=clip._replace(learned=True)),
        step("guided", flags=clip._replace(guided=True)),
        step("x0_prev (2M)", flags=clip._replace(use_prev=True)),
        step("x0 stored", x0_out=FP32),
        step("bfloat16 copy out", low_out=BF16),
        step("bfloat16 m", m=BF16),
        step("bfloat16 m, bfloat16 copy out", **low),
        step("bfloat16 throughout", x=BF16),
        step("float16 throughout", x=FP16),
        step("noise given", noise="given"),
        step("no noise (DDIM)", noise="none"),
        step("channels-last m", m_nhwc=True),
        step("channels-last bfloat16 m and copy", **low, m_nhwc=True, low_nhwc=True),
        step("3x8x8", (64, 3, 8, 8)),
        step("2-D points", _POINTS),
        step("n not a multiple of 4", odd),
        step("unaligned storage", offset=1),
        q_sample_variant("float32"),
        q_sample_variant("float32, eps returned", eps_out=FP32),
        q_sample_variant("bfloat16, eps returned", x=BF16, eps_out=BF16),
        q_sample_variant("noise given", given=True),
        q_sample_variant("2-D points", _POINTS),
        q_sample_variant("unaligned storage", offset=1),
        ddpm_loss_variant("epsilon"),
        ddpm_loss_variant("epsilon, gradient", gradient=True),
        ddpm_loss_variant("v", x=FP32),
        ddpm_loss_variant("v, gradient", x=FP32, gradient=True),
        ddpm_loss_variant("x_0", x=FP32, draws=False),
        ddpm_loss_variant("epsilon, bfloat16 m", m=BF16),
        ddpm_loss_variant("epsilon, learned variance", learned=True),
        ddpm_loss_variant("epsilon, channels-last m", m_nhwc=True),
        ddpm_loss_variant("epsilon, channels-last m, gradient", m_nhwc=True, gradient=True),
        ddpm_loss_variant("2-D points", _POINTS),
        ddpm_loss_variant("n not a multiple of 4", odd),
        ddpm_loss_variant("unaligned storage", offset=1),
        noise_variant("float32"),
        noise_variant("bfloat16", dtype=BF16),
        noise_variant("2-D points", _POINTS),
        noise_variant("unaligned storage", offset=1),
    ]
