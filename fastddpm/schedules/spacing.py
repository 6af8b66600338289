"""Which of the T training timesteps a sampling run visits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastddpm.checks import integer, one_of, shown
from fastddpm.schedules.betas import check_num_timesteps

# Rules that need nothing but T; `fastddpm.schedules.levels` has those that look at the noise.
INTEGER_SPACINGS = ("linspace", "leading", "trailing", "quadratic")


def spaced_timesteps(T: int, steps: int, spacing: str = "linspace", steps_offset: int = 0) -> Tensor:
    """Choose `steps` of the timesteps 0..T-1 by one of the rules of Lin et al. 2023, table 2, as diffusers rounds them.

    Args:
        T: number of training timesteps.
        steps: number of timesteps to keep, 1..T.
        spacing: "linspace" (both ends), "leading" (multiples of T // steps from 0), "trailing" (T - 1 downwards),
            or "quadratic" (evenly in sqrt(t) up to 0.8 T: Song et al. 2021, appendix D.2).
        steps_offset: added to "leading" timesteps, as in diffusers.

    Returns:
        int64 [steps], strictly descending.

    Raises:
        ValueError: steps is outside 1..T, the spacing is unknown, or the offset leaves 0..T-1.
    """
    check_num_timesteps(T)
    integer("steps", steps, 1, T)
    one_of("spacing", spacing, INTEGER_SPACINGS)
    integer("steps_offset", steps_offset)
    timesteps: np.ndarray
    if spacing == "linspace":
        timesteps = np.linspace(0, T - 1, steps).round()[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(steps) * (T // steps))[::-1] + steps_offset
    elif spacing == "trailing":
        timesteps = np.round(np.arange(T, 0, -T / steps))[:steps] - 1
    else:
        # Where the squares are closer than the timesteps, every timestep is taken.
        timesteps = np.maximum((np.linspace(0, np.sqrt(0.8 * (T - 1)), steps) ** 2).round(), np.arange(steps))[::-1]
    if steps == 1 and T > 1 and spacing != "trailing":
        warnings.warn(
            f"one step with {spacing} spacing visits only t = {int(timesteps[0])}, which expects almost clean data; "
            'use spacing="trailing"',
            UserWarning,
            stacklevel=2,
        )
    return validate_timesteps(timesteps.astype(np.int64).tolist(), T)


def space_timesteps(T: int, section_counts: str | Sequence[int]) -> Tensor:
    """Keep evenly strided timesteps from equal sections of 0..T-1, by improved-diffusion's rule.

    The position inside a section is accumulated and rounded to even, which differs from rounding i * stride for
    about a quarter of the counts.

    Args:
        T: number of training timesteps.
        section_counts: how many timesteps each section keeps, first section first: a list, "10,15,20", or "ddimN" for
            N timesteps at a fixed integer stride from 0 (Song et al. 2021).

    Returns:
        int64, strictly descending.

    Raises:
        ValueError: a section is smaller than its count, or no integer stride gives N timesteps.
    """
    check_num_timesteps(T)
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _integer_stride(T, _parse_count(section_counts.removeprefix("ddim"), section_counts))
        section_counts = [_parse_count(part, section_counts) for part in section_counts.split(",")]
    if len(section_counts) == 0:
        raise ValueError("section_counts must name at least one section, got none")
    size, longer = divmod(T, len(section_counts))
    start = 0
    kept: list[int] = []
    for i, count in enumerate(section_counts):
        section = size + (i < longer)
        if not 1 <= count <= section:
            raise ValueError(f"section_counts[{i}] must lie in 1..{section}, the length of that section; got {count}")
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += section
    return validate_timesteps(kept[::-1], T)


def validate_timesteps(timesteps: Sequence[int] | Tensor, T: int) -> Tensor:
    """Check a custom list of timesteps and return it as int64 [steps].

    Raises:
        ValueError: the list is empty, holds something that is no integer, leaves 0..T-1, or does not descend strictly.
    """
    values = timesteps.tolist() if isinstance(timesteps, Tensor) else timesteps
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"timesteps must be a list of integers, got {shown(values)}")
    values = list(values)
    if not values:
        raise ValueError("timesteps must name at least one timestep, got none")
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ValueError(f"timesteps must be integers, got timesteps[{i}] = {shown(value)}")
        if not 0 <= value < T:
            raise ValueError(f"timesteps must lie in 0..{T - 1}, got timesteps[{i}] = {value}")
        if i and value >= values[i - 1]:
            raise ValueError(
                f"timesteps must descend strictly, got timesteps[{i}] = {value} after {values[i - 1]}; sort the list "
                "in descending order and drop duplicates"
            )
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def resolve_timesteps(
    T: int,
    *,
    steps: int | None = None,
    timesteps: Sequence[int] | Tensor | None = None,
    spacing: str = "linspace",
    steps_offset: int = 0,
) -> Tensor:
    """Turn a step count, a custom list or neither (all T) into int64 timesteps in descending order.

    Args:
        T: number of training timesteps.
        steps: how many timesteps to visit, chosen by `spacing`; all T by default.
        timesteps: the timesteps themselves, strictly descending, instead of `steps`.
        spacing, steps_offset: see `spaced_timesteps`.

    Raises:
        ValueError: both are given, or either is out of range.
    """
    if timesteps is not None:
        if steps is not None:
            raise ValueError(f"give steps or timesteps, not both; got steps = {steps} and a list of timesteps")
        return validate_timesteps(timesteps, T)
    return spaced_timesteps(T, T if steps is None else steps, spacing, steps_offset)


def _integer_stride(T: int, count: int) -> Tensor:
    for stride in range(1, T + 1):
        if len(range(0, T, stride)) == count:
            return validate_timesteps(list(range(0, T, stride))[::-1], T)
    raise ValueError(f"no integer stride over {T} timesteps keeps exactly {count}; choose another count for ddim")


def _parse_count(text: str, whole: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f'section_counts must look like "10,15,20" or "ddim50", got {whole!r}')
    return int(text)
