"""Row twins: q_sample, p_sample and the loss's residual as plain PyTorch, bit-equal to the kernels.

One table row a step (``table.COLUMNS``), float32 inside whatever the storage, every operation rounded on its own:

    x0     = a * x_t + b * m                                  m: the network's output
    x0     = min(max(x0, lo), hi)                             if clip; keeps NaN
    mean   = ((c_x0 * x0 + c_xt * x_t) + c_m * m) + c_1 * x0_1 + c_2 * x0_2 + c_3 * x0_3
    x_prev = mean + std * z                                   std = sigma, or sigma * exp(h0 + h1 * v)

A term that is switched off is not computed, and no noise is added where sigma is 0: 0 * Inf would be NaN.

A twin returns float32; `fill` rounds it once into tensors that a caller brings. It runs eagerly, or compiled by
Inductor with the same bits: about ten times faster on a CPU once the compilation (10-20 s) is paid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastddpm.machine import torch_compile
from fastddpm.machine.torch_compile import compile_call
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.v1 import Counter, horner

ONE_BITS = 0x3F800000


class Flags(NamedTuple):
    """What a step computes; each is a compile-time constant of the kernel. ``history``: how many older x0 enter."""

    clip: bool = False
    learned: bool = False
    guided: bool = False
    use_m: bool = False
    history: int = 0

    def to_int(self) -> int:
        """One bit a flag, the first lowest, then the history: how an operator takes them."""
        return sum(int(flag) << k for k, flag in enumerate(self))

    @classmethod
    def from_int(cls, bits: int) -> Flags:
        """Undo `to_int`."""
        clip, learned, guided, use_m = (bool(bits >> k & 1) for k in range(4))
        return cls(clip, learned, guided, use_m, bits >> 4)


def fill(
    twin: Callable[..., tuple[Tensor, ...]],
    targets: tuple[Tensor | None, ...],
    arguments: tuple[Any, ...],
    compiled: bool,
) -> None:
    """Write what a twin returns into the targets; None: not wanted."""
    run: Callable[..., None] = functools.partial(_fill, twin)
    if compiled and torch_compile.has_cpp_compiler():
        run = _compile(twin, tuple(map(_kind, (*targets, *arguments))))
    run(targets, *arguments)


def _fill(twin: Callable[..., tuple[Tensor, ...]], targets: tuple[Tensor | None, ...], *arguments: Any) -> None:
    for target, result in zip(targets, twin(*arguments), strict=True):
        if target is not None:
            target.copy_(result)


def _kind(value: Any) -> Any:
    """What decides between compiled functions: types of tensors, and switches."""
    if isinstance(value, Tensor):
        return value.dtype
    return value if isinstance(value, bool | Flags) else type(value)


@functools.cache
def _compile(twin: Callable[..., tuple[Tensor, ...]], kinds: tuple[Any, ...]) -> Callable[..., None]:
    """One compiled function per twin and kinds of arguments."""

    def run(targets: tuple[Tensor | None, ...], *arguments: Any) -> None:
        _fill(twin, targets, *arguments)

    return compile_call(run, strict=False, dynamic=True, name="the fused operation")


def exp(y: Tensor) -> Tensor:
    """e**y of float32 in the project's own polynomial, relative error 2e-7; y is held to [-87, 88], NaN stays.

    exp(y) = 2**n * P(r), n = round(y / ln 2), r = y - n * ln 2 in two parts of which n times the first is exact.
    """
    y = y.clamp(-87.0, 88.0)
    # Adding and subtracting 1.5 * 2**23 rounds to the nearest integer.
    shifted = y * 1.4426950216293335 + 12582912.0
    n = shifted - 12582912.0
    r = (y - n * 0.693359375) - n * -2.1219444170128554e-4
    power = ((shifted.view(torch.int32) << 23) + ONE_BITS).view(torch.float32)
    return _exp_poly(r) * power


def _exp_poly(r: Tensor) -> Tensor:
    """e**r for |r| <= ln 2 / 2: minimax in relative error, at most 3.2e-9."""
    return horner(
        (
            1.0,
            1.0,
            0.4999999403953552,
            0.1666652113199234,
            0.04166826605796814,
            0.008368677459657192,
            0.0013820732710883021,
        ),
        r,
    )


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] or [1] as [B, 1, ..., 1] against ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def columns(rows: Tensor, row: Tensor, like: Tensor) -> list[Tensor]:
    """The columns of each sample's row, each [B, 1, ...] or [1, 1, ...] against ``like``."""
    return [_per_sample(column, like) for column in rows.index_select(0, row).unbind(1)]


def slot(row: Tensor, age: int, history: int, batch: int) -> tuple[Tensor, Tensor]:
    """Where a ring [H, B, ...] holds the x0 of ``age`` rows before each sample's: in slot (row - age) mod H."""
    return (row - age) % history, torch.arange(batch, device=row.device)


def draw(noise: Counter | Tensor, shape: torch.Size) -> Tensor:
    """The noise of a step, float32 of ``shape``: drawn from a Counter, or the caller's own."""
    if isinstance(noise, Tensor):
        return noise.to(torch.float32)
    z = noise_v1.normals(noise.seed, noise.sample_id, noise.step, noise.stream, shape[1:].numel())
    return z.expand(shape[0], -1).reshape(shape)


def randn(counter: Counter, n: int) -> tuple[Tensor]:
    """The first n normals of noise-v1 of each sample, [B, n]."""
    return (noise_v1.normals(*counter, n),)


def randn_pairs(counter: Counter, n: int) -> tuple[Tensor]:
    """The same two by two, int64 [B, n / 2]: see ``noise.v1.pairs``."""
    return (noise_v1.pairs(*counter, n),)


def q_sample(
    x_0: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor,
    keep: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x_t, eps), float32: x_t = c_x * x_0 + sigma * eps (Ho et al. 2020, eq. 4; with the rows of q_step, eq. 2).

    Arguments as in ``ops.q_sample``; `kept` is what x_t is where `keep` is true.
    """
    c_x, sigma = columns(rows, row, x_0)
    eps = draw(noise, x_0.shape)
    x_t = c_x * x_0.to(torch.float32) + sigma * eps
    return x_t if keep is None or kept is None else torch.where(keep, kept.to(torch.float32), x_t), eps


def residual(
    m: Tensor, x_0: Tensor | None, rows: Tensor, row: Tensor, noise: Counter | None, learned: bool = False
) -> Tensor:
    """target - m, with target = c_eps * eps + c_x0 * x_0; a term whose tensor is not given is not computed.

    Arguments as in ``ops.ddpm_loss``; [B, ...] float32, or float64 where m is.
    """
    m = m.to(torch.promote_types(m.dtype, torch.float32))
    if learned:
        m = m.chunk(2, dim=1)[0]
    c_eps, c_x0, _ = columns(rows, row, m)
    terms = []
    if noise is not None:
        terms.append(c_eps * draw(noise, m.shape))
    if x_0 is not None:
        terms.append(c_x0 * x_0.to(m.dtype))
    return sum(terms[1:], terms[0]) - m


def squares(*arguments: Any) -> tuple[Tensor]:
    """Each sample's sum of squared residuals, float64 [B]; arguments as in `residual`."""
    r = residual(*arguments)
    return ((r * r).flatten(1).sum(dim=1, dtype=torch.float64),)


def scaled_residual(*arguments: Any) -> tuple[Tensor]:
    """The residuals times scale [B]; arguments as in `residual`, and scale."""
    *operands, scale = arguments
    r = residual(*operands)
    return (_per_sample(scale, r) * r,)


def network_output(m: Tensor, w: Tensor, flags: Flags) -> tuple[Tensor, Tensor | None]:
    """Split the network's output into the guided prediction and the variance half v, float32.

    Classifier-free guidance: m = m_u + w * (m_c - m_u), the conditional half first along the batch
    (Ho & Salimans 2022, eq. 6, with their w + 1 as w). v comes from the conditional output.
    """
    m = m.to(torch.float32)
    unconditional = None
    if flags.guided:
        m, unconditional = m.chunk(2)
    v = None
    if flags.learned:
        m, v = m.chunk(2, dim=1)
    if unconditional is not None:
        m_u = unconditional.chunk(2, dim=1)[0] if flags.learned else unconditional
        m = m_u + w * (m - m_u)
    return m, v


def p_sample(
    x_t: Tensor,
    m: Tensor,
    rows: Tensor,
    row: Tensor,
    noise: Counter | Tensor | None,
    flags: Flags,
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Execute one row of a table; arguments as in ``ops.p_sample``. x0 overwrites the oldest of the history.

    Returns:
        (x_prev, x0, x_prev), float32: for a state, an estimate and a copy; `fill` rounds each once.
    """
    a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, w, c_2, c_3 = columns(rows, row, x_t)
    m, v = network_output(m, w, flags)
    x = x_t.to(torch.float32)
    x0 = a * x + b * m
    if flags.clip:
        x0 = torch.minimum(torch.maximum(x0, lo), hi)
    x_prev = c_x0 * x0 + c_xt * x
    if flags.use_m:
        x_prev = x_prev + c_m * m
    if history is not None:
        for age, c in enumerate((c_1, c_2, c_3)[: flags.history], start=1):
            x_prev = x_prev + c * history[slot(row, age, flags.history, len(x))].to(torch.float32)
    if noise is not None:
        std = sigma if v is None else sigma * exp(h0 + h1 * v)
        x_prev = torch.where(sigma == 0, x_prev, x_prev + std * draw(noise, x_t.shape))
    if history is not None:
        history[slot(row, flags.history, flags.history, len(x))] = x0.to(history.dtype)
    return x_prev, x0, x_prev
