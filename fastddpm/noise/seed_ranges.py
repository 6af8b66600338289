"""Lists of seeds as text: "0-15,20"."""

from __future__ import annotations

from collections.abc import Iterable

# No run writes more files than this; "0-99999999999" is a slip of the pen, and would fill the memory.
MAX_SEEDS = 10_000_000


def parse_seeds(text: str) -> list[int]:
    """Read a list of seeds such as "0-15,20".

    Raises:
        ValueError: the text is no such list, a seed is 2^64 or more, or there are more than `MAX_SEEDS`.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_seed(first) or (dash and not _is_seed(last)):
            raise ValueError(f"{part.strip()!r} is no seed and no range of seeds; write for example 0-15,20")
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise ValueError(f"the range {part.strip()!r} runs backwards")
        if high >= 2**64:
            raise ValueError(f"seed {high} is out of range; seeds are 0 to 2^64 - 1")
        if len(seeds) + high - low + 1 > MAX_SEEDS:
            raise ValueError(f"{text!r} asks for more than {MAX_SEEDS} seeds")
        seeds.extend(range(low, high + 1))
    return seeds


def _is_seed(text: str) -> bool:
    return text.isascii() and text.isdigit()


def format_seeds(seeds: Iterable[int]) -> str:
    """Write seeds as `parse_seeds` reads them, neighbours joined to ranges, order kept."""
    ranges: list[list[int]] = []
    for seed in seeds:
        if ranges and seed == ranges[-1][1] + 1:
            ranges[-1][1] = seed
        else:
            ranges.append([seed, seed])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
