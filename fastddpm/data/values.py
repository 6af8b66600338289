"""From the numbers in a file to x_0 in [-1, 1]: by their type where it says their range, by a given one otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastddpm.checks import number, shown

_ASK = "give value_range=(lo, hi) to load_data, or --value-range=LO,HI to train and eval: the values of black and white"


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Read "LO,HI", or None where there is none.

    Raises:
        ValueError: it is no pair of numbers, the first below the second.
    """
    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 2:
        raise ValueError(f"value_range must be two numbers LO,HI, got {shown(text)}")
    return check_range(values)


def check_range(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    """Return a range as two numbers, the first below the second.

    Raises:
        ValueError: it is no such range.
    """
    if value_range is None:
        return None
    if len(value_range) != 2:
        raise ValueError(f"value_range must be two numbers (lo, hi), got {len(value_range)}")
    low = number("value_range's first number", value_range[0])
    return low, number("value_range's second number", value_range[1], gt=low)


def range_of(dtype: np.dtype[Any], low: float, high: float, given: tuple[float, float] | None) -> tuple[float, float]:
    """Return the range that the values of a data set are mapped to [-1, 1] from.

    Args:
        dtype: their type.
        low: the least of them.
        high: the greatest of them.
        given: the range that the caller gave.

    Raises:
        ValueError: the values do not lie in it, or nothing says what they mean: floating point that may lie in [0, 1]
            or [-1, 1], integers of 32 bits or with a sign, 16 bits of which half or less are used.
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{dtype} values from {low:g} to {high:g}: NaN or infinity is no brightness")
    if given is not None:
        if not given[0] <= low <= high <= given[1]:
            raise ValueError(f"values from {low:g} to {high:g} do not lie in value_range={given}")
        return given
    if dtype == np.uint8:
        return 0.0, 255.0
    if dtype == np.uint16 and high > 0x7FFF:
        return 0.0, 65535.0
    if dtype.kind == "f" and -1.0 <= low < 0.0 and high <= 1.0:
        return -1.0, 1.0
    raise ValueError(f"{dtype} values from {low:g} to {high:g} do not say what is black and what is white; {_ASK}")


def to_x_0(values: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Map values from a range to float32 in [-1, 1]."""
    low, high = value_range
    return ((values.astype(np.float64) - low) * (2.0 / (high - low)) - 1.0).astype(np.float32)
