"""Checks of arguments: each returns the value, or raises an error with the argument's name, the value and what to give.

Integers and numbers may be Python's or NumPy's; a bool is neither, and nothing is rounded or parsed.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

# The floating-point types of states, networks and files, by name.
DTYPES = ("float32", "bfloat16", "float16")


def shown(value: object, limit: int = 80) -> str:
    """Write a value into a message: its repr, which holds no control characters, cut to ``limit`` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        text = f"<{type(value).__name__} too large to write>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: object, limit: int = 2000) -> str:
    """Write a message on one line: no control characters, which a hostile file's name or content may hold, and cut."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def one_of(name: str, value: object, choices: Iterable[T], error: Callable[[str], Exception] = ValueError) -> T:
    """Return the choice that equals a value.

    Raises:
        ValueError: none does (or another ``error``); the message names the nearest and all of them.
    """
    choices = tuple(choices)
    for choice in choices:
        if isinstance(value, type(choice)) and value == choice:
            return choice
    near = nearest(value, choices)
    hint = "" if near is None else f" (did you mean {near!r}?)"
    listed = ", ".join(repr(choice) if "," in str(choice) else str(choice) for choice in choices)
    raise error(f"unknown {name} {shown(value)}{hint}; choose one of {listed}")


def nearest(value: object, choices: Iterable[object]) -> str | None:
    """Return the name among the choices that a value was probably meant to be, or None."""
    names = {choice.lower(): choice for choice in choices if isinstance(choice, str)}
    found = difflib.get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
    return names[found[0]] if found else None


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return an integer that is at least ``low`` and at most ``high``.

    Raises:
        ValueError: the value is no integer, or outside.
    """
    try:
        n = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        n = None
    if n is None or (low is not None and n < low) or (high is not None and n > high):
        raise ValueError(f"{name} must be an integer{_bounds(ge=low, le=high)}, got {shown(value)}")
    return n


def number(
    name: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> float:
    """Return a finite number as a float; it is at least ``ge``, above ``gt``, at most ``le`` and below ``lt``.

    Raises:
        ValueError: the value is no number, not finite, or outside.
    """
    x = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:
            x = math.inf
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    inside = all(getattr(operator, name)(x, bound) for name, bound in bounds.items() if bound is not None)
    if not (math.isfinite(x) and inside):
        raise ValueError(f"{name} must be a finite number{_bounds(**bounds)}, got {shown(value)}")
    return x


def _bounds(**bounds: float | None) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    written = [f"{signs[name]} {_written(bound)}" for name, bound in bounds.items() if bound is not None]
    return f" {' and '.join(written)}" if written else ""


def _written(bound: float) -> str:
    word = isinstance(bound, int) and bound >= 1 << 31 and bound & (bound + 1) == 0
    return f"2**{int(bound).bit_length()} - 1" if word else str(bound)
