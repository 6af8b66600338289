"""The kernel variants that ``fastddpm inspect`` and the tests compile: one of each kind that a sampler launches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastddpm.diagnostics import compile_offline as offline

# 3 x 32 x 32, CIFAR-10's shape, and a batch at which every program walks one tile.
_N, _CHANNELS, _BATCH = 3072, 3, 64
# A batch that fills any GPU many times over, so that a program walks several tiles.
_LARGE_BATCH = 16384


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel, at one shape.

    Attributes:
        kernel: stem of the kernel, "p_sample".
        name: what sets this variant apart.
        function: the jitted function.
        signature: Triton type of each argument.
        constants: value of each constant argument.
        options: compile options.
        elements_per_program: elements of x_t that a program covers on average, idle lanes counted in.
        trips: rounds of the kernel's loop, if it has one at this shape.
        bytes_per_element: to and from the tensors that scale with the batch.
        tensors: pointer argument to the tensor's name in the paper.
    """

    kernel: str
    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    elements_per_program: float
    trips: tuple[int, ...]
    bytes_per_element: int
    tensors: Mapping[str, str]


_P_TENSORS = {
    "x_ptr": "x_t",
    "m_ptr": "m",
    "z_ptr": "z",
    "x0_prev_ptr": "x0_prev",
    "out_ptr": "x_prev",
    "x0_out_ptr": "x0",
    "low_ptr": "low",
}
_Q_TENSORS = {"x_ptr": "x_0", "noise_ptr": "eps", "out_ptr": "x_t", "eps_out_ptr": "eps_out"}
_LOSS_TENSORS = {"m_ptr": "m", "x_ptr": "x_0"}
_BYTES = {"*fp32": 4, "*fp16": 2, "*bf16": 2}


def _traffic(signature: Mapping[str, str], tensors: Mapping[str, str], times: Mapping[str, int]) -> int:
    """Bytes per element: each tensor once, the network's output as often as it is read."""
    return sum(_BYTES[signature[p]] * times.get(p, 1) for p in tensors if signature[p] in _BYTES)


def p_sample_case(name: str, n: int = _N, channels: int = _CHANNELS, batch: int = _BATCH, **how: Any) -> Variant:
    """A variant of p_sample; ``how`` are the keywords of ``kernels.p_sample.p_sample_variant``."""
    offline.load_triton()
    from fastddpm.kernels import p_sample as kernel

    compiled = kernel.p_sample_variant(n, channels, **how)
    flags = how.get("flags", kernel.DEFAULT_FLAGS)
    shape = kernel.geometry(batch, n, channels, flags, compiled.constexprs["ALIGNED"])
    nhwc = compiled.constexprs["ALIGNED"] and (flags.m_nhwc or flags.low_nhwc)
    reads = {"m_ptr": 1 + int(flags.learned) + int(flags.guided)}
    return Variant(
        kernel="p_sample",
        name=name,
        function=compiled.fn,
        signature=compiled.signature,
        constants=compiled.constexprs,
        options=compiled.options,
        elements_per_program=batch * n / math.prod(shape.grid),
        trips=(shape.channels if nhwc else shape.repeat,),
        bytes_per_element=_traffic(compiled.signature, _P_TENSORS, reads),
        tensors=_P_TENSORS,
    )


def q_sample_case(name: str, n: int = _N, batch: int = _BATCH, **how: Any) -> Variant:
    """A variant of q_sample; ``how`` are the keywords of ``kernels.q_sample.q_sample_variant``."""
    offline.load_triton()
    from fastddpm.kernels import q_sample as kernel

    return _flat_case("q_sample", name, kernel.q_sample_variant(n, **how), n, batch, _Q_TENSORS)


def noise_case(name: str, n: int = _N, batch: int = _BATCH, **how: Any) -> Variant:
    """A variant of the kernel that stores noise; ``how`` are the keywords of ``kernels.noise.randn_variant``."""
    offline.load_triton()
    from fastddpm.kernels import noise as kernel

    return _flat_case("noise", name, kernel.randn_variant(n, **how), n, batch, {"out_ptr": "z"})


def ddpm_loss_case(name: str, n: int = _N, channels: int = _CHANNELS, batch: int = _BATCH, **how: Any) -> Variant:
    """A variant of ddpm_loss; ``how`` are the keywords of ``kernels.ddpm_loss.ddpm_loss_variant``.

    The partial sums, one for 32 groups of four, are left out of the bytes.
    """
    offline.load_triton()
    from fastddpm.kernels import ddpm_loss as kernel
    from fastddpm.kernels.tiles import launch_grid

    compiled = kernel.ddpm_loss_variant(n, channels, **how)
    tensors = _LOSS_TENSORS | ({"out_ptr": "grad_m"} if how.get("gradient") else {})
    constants = compiled.constexprs
    loops = constants["M_NHWC"] and constants["ALIGNED"]
    groups = -(-n // (4 * constants["CHANNELS"] if loops else 4))
    return Variant(
        kernel="ddpm_loss",
        name=name,
        function=compiled.fn,
        signature=compiled.signature,
        constants=constants,
        options=compiled.options,
        elements_per_program=batch * n / math.prod(launch_grid(batch, groups)),
        trips=(constants["CHANNELS"],) if loops else (),
        bytes_per_element=_traffic(compiled.signature, tensors, {}),
        tensors=tensors,
    )


def _flat_case(kernel: str, name: str, compiled: Any, n: int, batch: int, tensors: Mapping[str, str]) -> Variant:
    from fastddpm.kernels.tiles import launch_grid

    return Variant(
        kernel=kernel,
        name=name,
        function=compiled.fn,
        signature=compiled.signature,
        constants=compiled.constexprs,
        options=compiled.options,
        elements_per_program=batch * n / math.prod(launch_grid(batch, -(-n // 4))),
        trips=(),
        bytes_per_element=_traffic(compiled.signature, tensors, {}),
        tensors=tensors,
    )


def p_sample_variants() -> list[Variant]:
    """The reverse step: every flag alone on top of a clipped float32 step, the storage types, and the shapes."""
    import torch

    offline.load_triton()
    from fastddpm.kernels.launch import NOISE_GIVEN, NOISE_NONE
    from fastddpm.kernels.p_sample import PSampleFlags

    clip = PSampleFlags(clip=True)
    low = torch.bfloat16
    case = p_sample_case
    return [
        case("float32", flags=clip),
        case("float32, full row (c_m)", flags=clip._replace(use_m=True)),
        case("float32, large batch", flags=clip, batch=_LARGE_BATCH),
        case("no clip", flags=PSampleFlags()),
        case("learned variance", flags=clip._replace(learned=True)),
        case("guided", flags=clip._replace(guided=True)),
        case("x0_prev (2M)", flags=clip._replace(use_prev=True)),
        case("x0 stored", flags=clip, x0_out=torch.float32),
        case("bfloat16 copy out", flags=clip, low_out=low),
        case("bfloat16 m", flags=clip, m=low),
        case("bfloat16 m, bfloat16 copy out", flags=clip, m=low, low_out=low),
        case("bfloat16 throughout", flags=clip, x=low),
        case("float16 throughout", flags=clip, x=torch.float16),
        case("noise given", flags=clip, noise=NOISE_GIVEN),
        case("no noise (DDIM)", flags=clip, noise=NOISE_NONE),
        case("channels-last m", flags=clip._replace(m_nhwc=True)),
        case("channels-last bfloat16 m and copy", flags=clip._replace(m_nhwc=True, low_nhwc=True), m=low, low_out=low),
        case("3x8x8", n=192, flags=clip),
        case("2-D points", n=2, channels=1, batch=100_000, flags=clip),
        case("n not a multiple of 4", n=3 * 31 * 33, flags=clip),
        case("unaligned storage", flags=clip, aligned=False),
    ]


def q_sample_variants() -> list[Variant]:
    """The forward process."""
    import torch

    case = q_sample_case
    return [
        case("float32"),
        case("float32, eps returned", eps_out=torch.float32),
        case("bfloat16, eps returned", x=torch.bfloat16, eps_out=torch.bfloat16),
        case("noise given", noise=torch.float32),
        case("2-D points", n=2, batch=100_000),
        case("unaligned storage", aligned=False),
    ]


def ddpm_loss_variants() -> list[Variant]:
    """The training loss and its gradient."""
    import torch

    case, x = ddpm_loss_case, torch.float32
    return [
        case("epsilon"),
        case("epsilon, gradient", gradient=True),
        case("v", x=x),
        case("v, gradient", x=x, gradient=True),
        case("x_0", x=x, counter=False),
        case("epsilon, bfloat16 m", m=torch.bfloat16),
        case("epsilon, learned variance", learned=True),
        case("epsilon, channels-last m", m_nhwc=True),
        case("epsilon, channels-last m, gradient", m_nhwc=True, gradient=True),
        case("2-D points", n=2, channels=1, batch=100_000),
        case("n not a multiple of 4", n=3 * 31 * 33),
        case("unaligned storage", aligned=False),
    ]


def noise_variants() -> list[Variant]:
    """The noise alone."""
    import torch

    case = noise_case
    return [
        case("float32"),
        case("bfloat16", dtype=torch.bfloat16),
        case("2-D points", n=2, batch=100_000),
        case("unaligned storage", aligned=False),
    ]


def variants() -> list[Variant]:
    """All of them, kernel by kernel.

    Raises:
        BackendUnavailable: if Triton is missing or set to interpret.
    """
    return p_sample_variants() + q_sample_variants() + ddpm_loss_variants() + noise_variants()
