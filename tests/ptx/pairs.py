"""A small set of cases in which every two settings of every two factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0, candidates: int = 30) -> list[dict[str, Any]]:
    """Cover all pairs of settings greedily: each case is the best of some random ones built around an uncovered pair.

    Args:
        factors: the settings of each factor.
        seed: of the random choices.
        candidates: cases tried for each one kept.
    """
    rng = random.Random(seed)
    names = list(factors)
    uncovered = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    while uncovered:
        start = min(uncovered)
        tried = [_build(factors, names, start, uncovered, rng) for _ in range(candidates)]
        best = max(tried, key=lambda case: len(_pairs(case, names) & uncovered))
        uncovered -= _pairs(best, names)
        cases.append({name: factors[name][best[name]] for name in names})
    return cases


def _pairs(case: Mapping[str, int], names: Sequence[str]) -> set[Pair]:
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)}


def _build(
    factors: Mapping[str, Sequence[Any]], names: Sequence[str], start: Pair, uncovered: set[Pair], rng: random.Random
) -> dict[str, int]:
    """Start from one pair, and set the other factors one by one to what covers most."""
    case = dict(start)
    for name in rng.sample(names, len(names)):
        if name in case:
            continue
        choices = list(range(len(factors[name])))
        rng.shuffle(choices)
        case[name] = max(choices, key=lambda c: len(_partial({**case, name: c}, name, names) & uncovered))
    return case


def _partial(case: Mapping[str, int], new: str, names: Sequence[str]) -> set[Pair]:
    """The pairs that ``new`` makes with the factors that are set."""
    order = {name: n for n, name in enumerate(names)}
    pairs = ((new, other) if order[new] < order[other] else (other, new) for other in case if other != new)
    return {((a, case[a]), (b, case[b])) for a, b in pairs}
