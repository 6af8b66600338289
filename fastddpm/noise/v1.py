"""noise-v1: Gaussian noise as a pure function of (seed, sample, step, stream, element), in plain PyTorch.

This is the twin of ``kernels/noise.py``: the same bits in eager PyTorch, in torch.compile on the CPU, in Triton's
interpreter and in the compiled GPU code. The contract below is frozen; its digests are known answers in the tests.

Counter and key (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3):
    key      (k0, k1)         low and high 32 bits of the 64-bit seed; seeds from 2**63 on as two's complement
    counter  (c0, c1, c2, c3) = (g, step, sample, stream), 32 bits each
    g        i // 4, with i the element's index in the sample's logical C order, whatever the memory format
    step     index of the table row in the order of execution, 0 first
    sample   sample id: 0 for ``seeds=[s, ...]``, k for ``seed=s, sample_ids=[k, ...]``
    stream   0 x_T, 1 reverse noise, 2 training noise, 3 training timesteps, 4 forward noise inside a sampling run

The four words (r0, r1, r2, r3) of a counter make the normals 4g .. 4g + 3 (Box & Muller 1958):
    r0, r1 -> rho(r0) cos(theta(r1)), rho(r0) sin(theta(r1));   r2, r3 likewise
    u     = float32(r | 1) * 2**-32                        in (0, 1], rounded to nearest even
    rho   = sqrt(-2 ln u)                                   at most 6.66
    theta = (pi / 2) * v, v = float32(the low 31 bits of r, signed) * 2**-30 in [-1, 1];
            the top bit of r reflects it, which negates the cosine

Only integer operations, integer-to-float casts, float32 add, sub and mul, selects and bit casts are used, each
rounded on its own: no square root, no library function and no fused multiply-add, since those differ between machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastddpm.noise.seeds import as_word, resolve_seeds

NOISE_VERSION = "noise-v1"

STREAM_X_T = 0
STREAM_REVERSE = 1
STREAM_TRAIN = 2
STREAM_TIMESTEPS = 3
STREAM_FORWARD = 4

_WORD = 0xFFFFFFFF
# Multipliers and Weyl increments of Philox4x32 (Random123, philox.h).
PHILOX_M = (0xD2511F53, 0xCD9E8D57)
PHILOX_W = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10

# rho(r) = s * sqrt(h), h = -log2(u) * 2**23, s = 4831.947342065594. In these units the exponent of u enters h without
# rounding. s belongs to the Newton steps below and is divided out of the coefficients of sin and cos.
# Minimax fits (Lawson's iteration in float64, coefficients rounded to float32 one by one, the rest refitted).
SQRT_HALF_BITS = 0x3F3504F3
EXPONENT_BITS = -0x800000
# u = float32(r | 1) * 2**-32: the factor is taken off the exponent.
_TWO_TO_32 = 32 << 23
# Reciprocal square root: a guess from the exponent (relative error 4.1 %, as in the classic 0x5f3759df), then Newton
# steps y * (a_k - h * y * y) towards c_k / sqrt(h), with c_k**2 = a_k / 3 and c_(k+1) = 2/3 * a_k * c_k. Ending at
# a_2 near 3 instead of 3/2 keeps the last factor just under a power of two, where float32 is twice as fine.
RSQRT_MAGIC = 0x5EFEE100

# Groups that the eager twin works on at a time: its int64 temporaries stay in a core's cache, and below PyTorch's grain
# size no operation waits for other threads.
_BLOCK_GROUPS = 1 << 14
MAX_ELEMENTS = 1 << 34


class Counter(NamedTuple):
    """Where a draw of noise-v1 stands: everything but the element.

    Attributes:
        seed: int64 [B] or [1], the 64-bit key as two's complement.
        sample_id: int64 [B] or [1] in [0, 2**32).
        step: int64 [B] or [1] in [0, 2**32).
        stream: one of the ``STREAM_*`` constants.
    """

    seed: Tensor
    sample_id: Tensor
    step: Tensor
    stream: int


def philox(seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, g: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-10 of the counter (g, step, sample_id, stream) under the key ``seed``.

    Args:
        seed, sample_id, step: int64, broadcastable with ``g``.
        stream: int in [0, 2**32).
        g: int64 in [0, 2**32), the index of the group of four elements.

    Returns:
        Four int64 tensors of 32-bit words in [0, 2**32), in the broadcast shape.
    """
    k0, k1 = seed & _WORD, seed >> 32
    c0, c1, c2, c3 = g, step, sample_id, torch.full_like(g, stream)
    for _ in range(PHILOX_ROUNDS):
        # Only the low words of c1 and c3 count, so that the mask after the xor serves them too.
        p0, p1 = c0 * PHILOX_M[0], c2 * PHILOX_M[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & _WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & _WORD, p0
        k0, k1 = k0 + PHILOX_W[0], k1 + PHILOX_W[1]
    return c0, c1 & _WORD, c2, c3 & _WORD


def horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Evaluate a polynomial, lowest coefficient first, each product and sum rounded on its own."""
    p = x * coefficients[-1] + coefficients[-2]
    for c in reversed(coefficients[:-2]):
        p = p.mul_(x).add_(c)
    return p


# Float constants are literals of the functions that use them: torch.compile takes those of a module for inputs that may
# change, and makes a tensor of each at every call.


def _log2_quotient(f: Tensor) -> Tensor:
    """-log2(1 + f) / f * 2**23, 1 + f in [sqrt(1/2), sqrt(2)]; error of the product with f at most 5.4e-8 * 2**23."""
    return horner(
        (-12102201.0, 6051177.5, -4034407.0, 3020791.75, -2405217.0, 2096296.75, -1986009.625, 1225211.125), f
    )


def _sin_quotient(w: Tensor) -> Tensor:
    """sin(pi/2 * v) / (v * s) in w = 1 - v * v: error at most 4e-9 / s."""
    return horner(
        (
            0.00020695589773822576,
            0.00010347791976528242,
            1.377839180349838e-05,
            8.421743018516281e-07,
            3.117197522328752e-08,
        ),
        w,
    )


def _cos(t: Tensor) -> Tensor:
    """cos(pi/2 * v) / s in t = v * v: error at most 3e-9 / s."""
    return horner(
        (
            0.00020695589773822576,
            -0.00025532158906571567,
            5.24982315255329e-05,
            -4.3172467485419475e-06,
            1.8942954227441078e-07,
            -4.722506830034945e-09,
        ),
        t,
    )


def _scaled_radius(r: Tensor) -> Tensor:
    """sqrt(-2 ln u) * s of 32-bit words r, u = float32(r | 1) * 2**-32."""
    bits = (r | 1).to(torch.float32).view(torch.int32) - (SQRT_HALF_BITS + _TWO_TO_32)
    exponent = bits & EXPONENT_BITS
    f = (bits - exponent + SQRT_HALF_BITS).view(torch.float32) - 1.0
    h = f * _log2_quotient(f) - exponent.to(torch.float32)
    y = (RSQRT_MAGIC - (h.view(torch.int32) >> 1)).view(torch.float32)
    for a in (1.6179287433624268, 1.8823297023773193):
        y = y * (a - (h * y) * y)
    q = h * y
    return q * (2.9641799926757812 - q * y)


def _scaled_cos_sin(r: Tensor) -> tuple[Tensor, Tensor]:
    """cos(theta) / s and sin(theta) / s of 32-bit words r."""
    v = ((r << 33) >> 33).to(torch.float32) * 2.0**-30
    t = v * v
    cos = _cos(t)
    sin = _sin_quotient(1.0 - t).mul_(v)
    return torch.where(r > 0x7FFFFFFF, -cos, cos), sin


def box_muller(r_radius: Tensor, r_angle: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of 32-bit words (int64 tensors in [0, 2**32)) into pairs of normals, float32."""
    rho = _scaled_radius(r_radius)
    cos, sin = _scaled_cos_sin(r_angle)
    return rho * cos, rho * sin


def _normals_block(seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, g: Tensor) -> Tensor:
    """float32 [B, 4 * len(g)] from key and counter words [B, 1] or [1, 1] and groups g [1, G]."""
    r0, r1, r2, r3 = philox(seed, sample_id, step, stream, g)
    pairs = box_muller(torch.stack((r0, r2), dim=-1), torch.stack((r1, r3), dim=-1))
    return torch.stack(pairs, dim=-1).flatten(1)


def normals(seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, n: int) -> Tensor:
    """Draw the first n normals of noise-v1 for each sample.

    Args:
        seed, sample_id, step: int64 [B] or [1] on one device.
        stream: one of the ``STREAM_*`` constants.
        n: elements per sample, at most 2**34.

    Returns:
        float32 [B, n], B the broadcast length of the three.

    Raises:
        ValueError: if n is negative or above 2**34.
    """
    if not 0 <= n <= MAX_ELEMENTS:
        raise ValueError(f"noise-v1 covers 0 to 2**34 elements per sample, got {n}; split the sample")
    seed, sample_id, step = (v.reshape(-1, 1) for v in torch.broadcast_tensors(seed, sample_id, step))
    batch, groups = seed.shape[0], -(-n // 4)
    if torch.compiler.is_compiling() or batch * groups <= _BLOCK_GROUPS:
        g = torch.arange(groups, dtype=torch.int64, device=seed.device)[None]
        return _normals_block(seed, sample_id, step, stream, g)[:, :n]
    out = torch.empty((batch, n), dtype=torch.float32, device=seed.device)
    rows = max(1, _BLOCK_GROUPS // max(groups, 1))
    for b in range(0, batch, rows):
        key = [v[b : b + rows] for v in (seed, sample_id, step)]
        for start in range(0, groups, _BLOCK_GROUPS):
            stop = min(start + _BLOCK_GROUPS, groups)
            g = torch.arange(start, stop, dtype=torch.int64, device=seed.device)[None]
            target = out[b : b + rows, 4 * start : 4 * stop]
            target.copy_(_normals_block(key[0], key[1], key[2], stream, g)[:, : target.shape[1]])
    return out


def pairs(seed: Tensor, sample_id: Tensor, step: Tensor, stream: int, n: int) -> Tensor:
    """What `normals` returns, for torch.compile: a loop that needs no memory of its own.

    Args:
        seed, sample_id, step, stream: as in `normals`.
        n: pairs per sample.

    Returns:
        int64 [B, n], the memory of the normals two by two, on a little-endian machine.
    """
    seed, sample_id, step = (v.reshape(-1, 1) for v in (seed, sample_id, step))
    pair = torch.arange(n, dtype=torch.int64, device=seed.device)[None]
    r0, r1, r2, r3 = philox(seed, sample_id, step, stream, pair >> 1)
    second = (pair & 1) == 1
    # Inductor merges the loops over samples and pairs of what reads nothing per sample, cannot fuse that with the
    # rest, and stores what lies between.
    nothing = seed & 0
    cos, sin = box_muller(torch.where(second, r2, r0) | nothing, torch.where(second, r3, r1) | nothing)
    low = cos.view(torch.int32).to(torch.int64) & _WORD
    return (sin.view(torch.int32).to(torch.int64) << 32) | low


def counter(
    seeds: tuple[Tensor, Tensor],
    step: int | Tensor = 0,
    stream: int = STREAM_REVERSE,
    device: torch.device | str = "cpu",
) -> Counter:
    """Make a Counter from the result of :func:`resolve_seeds` and one step for all samples (or int64 [B])."""
    steps = step if isinstance(step, Tensor) else torch.tensor([step], dtype=torch.int64, device="cpu")
    return Counter(seeds[0].to(device), seeds[1].to(device), steps.to(device), stream)


def timesteps(
    batch: int, T: int, seed: int, step: int | Tensor, sample_ids: Iterable[int] | Tensor | None = None
) -> Tensor:
    """Draw training timesteps, uniform on 0 .. T-1, from the first word of stream 3.

    Args:
        batch: B.
        T: number of timesteps, 1 to 2**31.
        seed: the key.
        step: training step, an int or int64 [1].
        sample_ids: position of each sample in the global batch; 0 .. B-1 if not given.

    Returns:
        int64 [B] on the CPU. A value's probability is within 2**-32 of 1 / T.

    Raises:
        ValueError: if T or a seed or id is out of range.
    """
    if not 1 <= T <= 1 << 31:
        raise ValueError(f"T must be in 1 .. 2**31, got {T}")
    key, ids = resolve_seeds(None, seed, sample_ids, batch)
    where = counter((key, ids), step if isinstance(step, Tensor) else as_word(step, "step"), STREAM_TIMESTEPS)
    g = torch.zeros(1, dtype=torch.int64, device="cpu")
    word = philox(where.seed, where.sample_id, where.step, where.stream, g)[0]
    return (word * T) >> 32
