"""The noise levels that a solver passes, and the timesteps at which it asks the network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastddpm.checks import integer, number, one_of, shown
from fastddpm.schedules.schedule import Schedule
from fastddpm.schedules.spacing import INTEGER_SPACINGS, spaced_timesteps

# Align Your Steps (Sabour et al. 2024, arXiv:2404.14507): the published timesteps of ten calls, and the end of each.
AYS = {
    "ays-sd15": (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0),
    "ays-sdxl": (999, 845, 730, 587, 443, 310, 193, 116, 53, 13, 0),
}
SPACINGS = (*INTEGER_SPACINGS, "logsnr", "karras", *AYS)
FINALS = ("zero", "sigma_min")
# A step in lambda that float64 still resolves to a few digits; those of a million steps are a thousand times longer.
_LEAST_STEP = 1e-9
# Karras et al. 2022, table 1.
KARRAS_RHO = 7.0


@dataclass(frozen=True, eq=False)
class Levels:
    """What a solver passes in n steps.

    Args:
        timesteps: [n], int64, or float32 where they lie between those of the training.
        alphas_cumprod: float64 [n + 1], rising: the level before each step, and the one after the last.
    """

    timesteps: Tensor
    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        close = ~(self.lambda_.diff() > _LEAST_STEP)
        if close.any():
            i = int(close.nonzero()[0])
            raise ValueError(
                f"step {i}, from timestep {self.timesteps[i]:g}, leads from alpha_bar = "
                f"{self.alphas_cumprod[i]:.17g} to {self.alphas_cumprod[i + 1]:.17g}, which are too close for a step; "
                "take fewer steps"
            )

    @property
    def alpha(self) -> Tensor:
        """sqrt(alpha_bar), float64 [n + 1]."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigma(self) -> Tensor:
        """sqrt(1 - alpha_bar), float64 [n + 1]."""
        return (1.0 - self.alphas_cumprod).sqrt()

    @property
    def lambda_(self) -> Tensor:
        """log(alpha / sigma), half the log-SNR, float64 [n + 1]; inf without noise, -inf without signal."""
        return self.alpha.log() - self.sigma.log()


def noise_levels(
    schedule: Schedule,
    *,
    steps: int | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
    spacing: str = "trailing",
    steps_offset: int = 0,
    final: Literal["zero", "sigma_min"] = "zero",
) -> Levels:
    """Choose the levels by a number of steps and a spacing, or take a list of timesteps or of levels.

    Args:
        schedule: the schedule the network was trained with.
        steps: how many steps to take; all T by default.
        timesteps: strictly descending in [0, T - 1], instead of `steps`; between two of the training's, lambda is
            interpolated.
        sigmas: sigma / alpha of every level, steps + 1 strictly descending numbers, the last of which may be 0; instead
            of `steps`, or with the timesteps that belong to all but the last.
        spacing: where the timesteps lie.
            "trailing", "leading", "linspace": Lin et al. 2023, table 2; the latter two drop the last of steps + 1,
            which the level after the last step stands for, as diffusers' multistep solvers do;
            "quadratic": Song et al. 2021, appendix D.2;
            "logsnr": evenly in lambda (Lu et al. 2022);
            "karras": evenly in sigma^(1/7) (Karras et al. 2022);
            "ays-sd15", "ays-sdxl": Align Your Steps' lists, for T = 1000; other counts interpolate them in lambda.
        steps_offset: added to "leading" timesteps, as in diffusers.
        final: "zero" ends without noise, "sigma_min" at the level of t = 0.

    Raises:
        ValueError: an argument is unknown or out of range, or two of them contradict each other.
    """
    one_of("final", final, FINALS)
    one_of("spacing", spacing, SPACINGS)
    if steps is not None and not (timesteps is None and sigmas is None):
        raise ValueError(f"give steps or a list of timesteps or sigmas, not both; got steps = {steps} and a list")
    if sigmas is not None:
        return _from_sigmas(schedule, sigmas, timesteps)
    if timesteps is not None:
        visited = _checked_list("timesteps", timesteps, low=0.0, high=schedule.num_timesteps - 1.0)
    else:
        n = schedule.num_timesteps if steps is None else steps
        integer("steps", n, 1, schedule.num_timesteps)
        visited = _spaced(schedule, n, spacing, steps_offset, final)
    end = 1.0 if final == "zero" else float(schedule.alphas_cumprod[0])
    alphas_cumprod = torch.cat([alpha_bar_at(schedule, visited), visited.new_tensor([end])])
    if not alphas_cumprod[-2] < end:
        raise ValueError(
            f"the last timestep is {float(visited[-1]):g} and final={final!r} ends at the level of t = 0, so the last "
            'step has nothing to do; use final="zero", or fewer timesteps'
        )
    return Levels(_whole(visited), alphas_cumprod)


def alpha_bar_at(schedule: Schedule, timesteps: Tensor) -> Tensor:
    """Return alpha_bar at float64 timesteps in [0, T - 1]; between two of the training's, lambda is interpolated."""
    low = timesteps.floor().long().clamp(0, schedule.num_timesteps - 1)
    high = (low + 1).clamp(max=schedule.num_timesteps - 1)
    part = timesteps - low
    log_snr = schedule.alphas_cumprod.logit()
    between = torch.lerp(log_snr[low], log_snr[high], part).sigmoid()
    return torch.where(part == 0, schedule.alphas_cumprod[low], between)


def timesteps_at(schedule: Schedule, sigmas: Tensor) -> Tensor:
    """Return the float64 timesteps whose sigma / alpha are these: the inverse of `alpha_bar_at`, held to [0, T - 1]."""
    log_sigma = -0.5 * schedule.alphas_cumprod.logit()
    x = sigmas.log()
    high = torch.searchsorted(log_sigma, x).clamp(1, max(schedule.num_timesteps - 1, 1))
    if schedule.num_timesteps == 1:
        return torch.zeros_like(x)
    start, end = log_sigma[high - 1], log_sigma[high]
    # From a level without signal no share of the way is finite; only that level itself is at its timestep.
    part = torch.where(end.isinf(), (x == end).double(), ((x - start) / (end - start)).clamp(0.0, 1.0))
    return high - 1 + part


def _from_sigmas(
    schedule: Schedule, sigmas: Sequence[float] | Tensor, timesteps: Sequence[float] | Tensor | None
) -> Levels:
    levels = _checked_list("sigmas", sigmas, low=0.0)
    if len(levels) < 2:
        raise ValueError(f"sigmas must hold one level more than there are steps, got {len(levels)} of them")
    if timesteps is None:
        ends = ((1.0 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()[[0, -1]].tolist()
        # A thousandth, since published lists are rounded.
        if not (ends[0] * 0.999 <= levels[-2] and levels[0] <= ends[1] * 1.001):
            raise ValueError(
                f"sigmas of steps must lie in [{ends[0]:.6g}, {ends[1]:.6g}], the schedule's sigma / alpha; got "
                f"{float(levels[0]):.6g} to {float(levels[-2]):.6g}"
            )
        visited = timesteps_at(schedule, levels[:-1])
    else:
        visited = _checked_list("timesteps", timesteps, low=0.0, high=schedule.num_timesteps - 1.0, strict=False)
        if len(visited) != len(levels) - 1:
            raise ValueError(f"sigmas needs {len(visited) + 1} levels for {len(visited)} timesteps, got {len(levels)}")
    return Levels(_whole(visited), 1.0 / (1.0 + levels**2))


def _spaced(schedule: Schedule, n: int, spacing: str, steps_offset: int, final: str) -> Tensor:
    T = schedule.num_timesteps
    if spacing in INTEGER_SPACINGS:
        dropped = n < T and (spacing in ("linspace", "leading") or (spacing == "quadratic" and final == "sigma_min"))
        return spaced_timesteps(T, n + dropped, spacing, steps_offset)[:n].double()
    if n == T:
        return torch.arange(T - 1, -1, -1, dtype=torch.float64, device="cpu")
    if spacing in AYS and AYS[spacing][0] + 1 != T:
        raise ValueError(f"spacing {spacing!r} lists timesteps of T = 1000, and this schedule has T = {T}; use logsnr")
    anchors = torch.tensor(AYS.get(spacing, (T - 1, 0)), dtype=torch.float64, device="cpu")
    alpha_bar = alpha_bar_at(schedule, anchors)
    if alpha_bar[0] == 0.0:
        raise ValueError(f"spacing {spacing!r} needs signal at every level, and alpha_bar is 0 at T; use trailing")
    # The level after the last step is one of those spaced, unless it has no noise; the published lists count it always.
    points = n + (final == "sigma_min" or spacing in AYS)
    position = torch.linspace(0, 1, points, dtype=torch.float64, device="cpu")
    log_sigma = -0.5 * alpha_bar.logit()
    if spacing == "karras":
        first, last = (log_sigma / KARRAS_RHO).exp().tolist()
        spaced = KARRAS_RHO * (first + position * (last - first)).log()
    else:
        place = position * (len(anchors) - 1)
        low = place.floor().long().clamp(max=len(anchors) - 2)
        spaced = torch.lerp(log_sigma[low], log_sigma[low + 1], place - low)
    return timesteps_at(schedule, spaced[:n].exp())


def _whole(timesteps: Tensor) -> Tensor:
    """Return int64 timesteps where all are whole but for the rounding of float64, else float32."""
    rounded = timesteps.round()
    whole = bool(((timesteps - rounded).abs() < 1e-9 * (1.0 + timesteps)).all())
    return rounded.long() if whole else timesteps.float()


def _checked_list(
    name: str, values: Sequence[float] | Tensor, *, low: float, high: float | None = None, strict: bool = True
) -> Tensor:
    """Return finite numbers in order, descending, as float64 [n]."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(listed, str) or not isinstance(listed, Iterable) or not (listed := list(listed)):
        raise ValueError(f"{name} must be a list of numbers, got {shown(values)}")
    checked = [number(f"{name}[{i}]", value, ge=low, le=high) for i, value in enumerate(listed)]
    for i in range(1, len(checked)):
        if checked[i] > checked[i - 1] or (strict and checked[i] == checked[i - 1]):
            raise ValueError(f"{name} must descend, got {name}[{i}] = {checked[i]} after {checked[i - 1]}")
    return torch.tensor(checked, dtype=torch.float64, device="cpu")
