"""Inputs for p_sample: each flag alone, all pairs of flags, and shapes that are odd for a reason."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter

FLAGS = ("clip", "learned", "guided", "use_m", "use_prev", "x0_out", "low_out", "m_nhwc", "low_nhwc")
NOISE = ("counter", "given", "none")

SHAPES = {
    "numel1": (1, 1),
    "two": (2, 2),
    "three": (2, 3),
    "four": (3, 4),
    "five": (2, 5),
    "odd-1023": (2, 1023),
    "odd-1025": (1, 1025),
    "points": (300, 2),
    "8x8": (3, 1, 8, 8),
    "multiple-of-4-not-16": (2, 3, 2, 6),
    "odd-plane": (2, 3, 5, 5),
    "32x32": (1, 3, 32, 32),
}


@dataclass(frozen=True)
class Case:
    """One call of p_sample."""

    shape: tuple[int, ...] = (2, 3, 4, 4)
    noise: str = "counter"
    x: torch.dtype = torch.float32
    m: torch.dtype = torch.float32
    low: torch.dtype = torch.float16
    per_sample: bool = True
    flags: frozenset[str] = frozenset({"clip"})

    def __str__(self) -> str:
        return "-".join(["x".join(map(str, self.shape)), self.noise, *sorted(self.flags)])


def flag_cases() -> list[Case]:
    """No flag, each flag alone and all pairs, with in-kernel noise; channels-last copies imply a copy."""
    chosen = [(), *((f,) for f in FLAGS), *itertools.combinations(FLAGS, 2)]
    sets = {frozenset(c) | ({"low_out"} if "low_nhwc" in c else set()) for c in chosen}
    cases = [Case(flags=flags) for flags in sorted(sets, key=sorted)]
    cases += [Case(noise=kind, flags=frozenset({"clip", f})) for kind in ("given", "none") for f in ("clip", "learned")]
    return cases


def shape_cases() -> list[Case]:
    """Every shape, with one row for all samples and with one each."""
    base = Case()
    return [replace(base, shape=s, per_sample=p) for s in SHAPES.values() for p in (False, True)]


def random_rows(n: int, generator: torch.Generator) -> Tensor:
    """Rows with every column in use; the last adds no noise."""
    rows = torch.randn(n, 14, generator=generator)
    rows[:, 2], rows[:, 3] = -1.0, 1.0
    rows[:, 8] = rows[:, 8].abs()
    rows[-1, 8] = 0.0
    return rows


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of ``ops.p_sample`` (outputs poisoned with NaN)."""
    g = torch.Generator().manual_seed(seed)
    B, shape, flags = case.shape[0], case.shape, case.flags
    doubled = (B * (2 if "guided" in flags else 1), shape[1] * (2 if "learned" in flags else 1), *shape[2:])
    m = torch.randn(doubled, generator=g).to(case.m)
    keys, ids = resolve_seeds(seeds=range(B))
    noise: Counter | Tensor | None = Counter(keys, ids, torch.arange(B) if case.per_sample else torch.tensor([7]), 1)
    if case.noise != "counter":
        noise = torch.randn(shape, generator=g) if case.noise == "given" else None

    def poisoned(dtype: torch.dtype, channels_last: bool = False) -> Tensor:
        empty = torch.empty(shape, dtype=dtype)
        return (to_channels_last(empty) if channels_last else empty).fill_(float("nan"))

    return {
        "x_t": torch.randn(shape, generator=g).to(case.x),
        "m": to_channels_last(m) if "m_nhwc" in flags else m,
        "rows": random_rows(5, g),
        "row": torch.arange(B) % 5 if case.per_sample else torch.tensor([1]),
        "noise": noise,
        "x0_prev": torch.randn(shape, generator=g).to(case.x) if "use_prev" in flags else None,
        "out": poisoned(case.x),
        "x0_out": poisoned(case.x) if "x0_out" in flags else None,
        "low_out": poisoned(case.low, "low_nhwc" in flags) if "low_out" in flags else None,
        **{name: name in flags for name in FLAGS[:5]},
    }


def to_channels_last(x: Tensor) -> Tensor:
    """The same values with channels innermost in memory, for any number of dimensions."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
