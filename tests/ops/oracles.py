"""Independent oracles for noise-v1 and the row arithmetic: Python integers and float64, no code of the library."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD = (1 << 32) - 1


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers, as in Random123's philox.h (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def box_muller64(
    r_radius: npt.NDArray[np.uint32], r_angle: npt.NDArray[np.uint32]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The normals of noise-v1 in float64, on the float32 u and angle that the contract defines."""
    u = (r_radius | np.uint32(1)).astype(np.float32).astype(np.float64) * 2.0**-32
    # The low 31 bits as a signed fraction of a quarter turn; the top bit reflects at the vertical axis.
    v = (r_angle << np.uint32(1)).view(np.int32).astype(np.float32).astype(np.float64) * 2.0**-31
    rho = np.sqrt(-2.0 * np.log(u))
    side = np.where(r_angle >> np.uint32(31), -1.0, 1.0)
    return rho * side * np.cos(0.5 * math.pi * v), rho * np.sin(0.5 * math.pi * v)


def normal64(seed: int, sample_id: int, step: int, stream: int, element: int) -> float:
    """One element of noise-v1 from first principles."""
    words = philox4x32_10((element // 4, step, sample_id, stream), (seed & WORD, seed >> 32))
    pair = element % 4 // 2
    r = np.array([words[2 * pair], words[2 * pair + 1]], dtype=np.uint32)
    return float(box_muller64(r[:1], r[1:])[element % 2][0])


def row_step(
    x: npt.NDArray[np.floating],
    m: npt.NDArray[np.floating],
    row: npt.NDArray[np.floating],
    z: npt.NDArray[np.floating] | None,
    older: Sequence[npt.NDArray[np.floating]],
    *,
    clip: bool,
    learned: bool,
    guided: bool,
    use_m: bool,
) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]]:
    """One row of a table in the arrays' own precision, each operation rounded: (x_prev, x0).

    Args:
        x, z: [B, C, ...].
        older: the x0 of one, two, ... steps before, likewise.
        m: [B, C, ...], channels doubled if learned, batch doubled if guided.
        row: [B, 14], a row per sample.
    """
    columns = row.reshape(len(row), 14, *(1,) * (x.ndim - 1)).swapaxes(0, 1)
    a, b, lo, hi, c_x0, c_xt, c_m, c_1, sigma, h0, h1, w, c_2, c_3 = columns
    conditional, unconditional = (m[: len(x)], m[len(x) :]) if guided else (m, m)
    C = x.shape[1]
    v = conditional[:, C:]
    m = conditional[:, :C]
    if guided:
        m = unconditional[:, :C] + w * (m - unconditional[:, :C])
    x0 = a * x + b * m
    if clip:
        x0 = np.minimum(np.maximum(x0, lo), hi)
    mean = c_x0 * x0 + c_xt * x
    if use_m:
        mean = mean + c_m * m
    for c, x0_k in zip((c_1, c_2, c_3), older, strict=False):
        mean = mean + c * x0_k
    if z is None:
        return mean, x0
    std = sigma * np.exp(h0 + h1 * v) if learned else sigma
    return np.where(sigma == 0, mean, mean + std * z), x0
