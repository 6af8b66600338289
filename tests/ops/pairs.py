"""All pairs of settings in few cases."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any


def all_pairs(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Choose combinations such that every pair of values of two factors occurs in one of them (greedily)."""
    rng = random.Random(seed)
    names = list(factors)

    def pairs(case: dict[str, int]) -> set[tuple[str, int, str, int]]:
        return {(p, case[p], q, case[q]) for p, q in itertools.combinations(names, 2)}

    missing = {
        (p, i, q, j)
        for p, q in itertools.combinations(names, 2)
        for i in range(len(factors[p]))
        for j in range(len(factors[q]))
    }
    cases = []
    while missing:
        p, i, q, j = min(missing)
        candidates = [{name: rng.randrange(len(factors[name])) for name in names} | {p: i, q: j} for _ in range(30)]
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append({name: factors[name][best[name]] for name in names})
    return cases


def case_id(case: Mapping[str, Any]) -> str:
    """Name a case by its values."""
    return "-".join(str(value).replace("torch.", "").replace(" ", "") for value in case.values())
