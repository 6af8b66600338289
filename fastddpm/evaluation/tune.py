"""Fit a table to a model: its result is to meet that of many steps from the same x_T.

A table of few steps has some dozens of numbers: the noise levels that it passes, the timesteps that the network is told
there, and each row's coefficients. Least squares finds them (cf. S4S, arXiv:2502.17423, which follows gradients): the
residuals are the pixels of the difference to the converged result, their derivatives come from finite differences, for
which only the rows behind the changed number run again, and steps are Levenberg's and Marquardt's. Samples that are
held out of the fit say when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.checks import integer
from fastddpm.evaluation.steps import relative_distance
from fastddpm.noise.v1 import STREAM_X_T
from fastddpm.ops.draw import randn
from fastddpm.sampling.network import device_of, dtype_of, null_class_of, unwrap
from fastddpm.sampling.sample import diffusion_of, labels_for, shape_of
from fastddpm.sampling.tuned import Tuned, columns
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.tables.table import COLUMN, HISTORY, Table

# The solver's error after so many steps is far below that of the few that are fitted.
MANY = 40
BATCH = 16
# Far from those that are drawn to look at, or to measure.
FIRST_SEED = 2_000_000_000
# How far a derivative reaches: in the logit of a level's share, in log(1 + t), and in a coefficient.
_LEVEL_STEP, _TIMESTEP_STEP, _COEFFICIENT_STEP = 0.1, 0.02, 0.01
# What a parameter's squared deviation from the solver's costs, levels apart, where the samples' variance is 1.
_RIDGE = 1e-3
_DAMPING, _ATTEMPTS = 1e-2, 10
# The fit ends when the held-out error has not fallen to that share for so many iterations.
_GAIN, _PATIENCE = 0.99, 3


@dataclass
class Path:
    """A run of a table: states and older x_0 before each row and after the last, and the network's outputs."""

    x: list[Tensor]
    history: list[Tensor | None]
    m: list[Tensor]


class Batch:
    """Samples with a result that is to be met."""

    def __init__(
        self, model: Any, seeds: Sequence[int], guidance: float, many: Table, progress: Callable[[], object] = int
    ) -> None:
        self.model, self.guidance, self.device, self.progress = model, guidance, device_of(model), progress
        self.x_T = randn((len(seeds), *shape_of(model)), seeds=seeds, stream=STREAM_X_T, device=self.device)
        labels = labels_for(model, seeds, None)
        if guidance != 1.0 and labels is not None:
            labels = labels + [null_class_of(model)] * len(seeds)  # type: ignore[list-item]
        self.kwargs = {} if labels is None else {"class_labels": torch.tensor(labels, device=self.device)}
        self.target = self.run(many).x[-1]

    def run(self, table: Table, path: Path | None = None, row: int = 0, *, known: bool = False) -> Path:
        """Run a table, from `row` of another run on, whose output of the network there may be known to be the same."""
        rows = table.with_guidance(self.guidance).rows.to(self.device)
        if path is None:
            older = self.x_T.new_zeros(table.history, *self.x_T.shape) if table.history else None
            path = Path([self.x_T], [older], [])
        new = Path(path.x[: row + 1], path.history[: row + 1], path.m[: row + known])
        for i in range(row, len(table)):
            x, history = new.x[i], new.history[i]
            if i == len(new.m):
                new.m.append(self._predict(x, float(table.timesteps[i])))
            history = None if history is None else history.clone()
            x = ops.p_sample(
                x,
                new.m[i],
                rows,
                torch.tensor([i], device=self.device),
                None,
                clip=table.clip,
                learned=table.learned,
                guided=self.guidance != 1.0,
                history=history,
                out=torch.empty_like(x),
            )
            new.x.append(x)
            new.history.append(history)
        return new

    def _predict(self, x: Tensor, t: float) -> Tensor:
        x = torch.cat([x, x]) if self.guidance != 1.0 else x
        told = torch.full((len(x),), t, device=self.device)
        m = unwrap(self.model(x.to(dtype_of(self.model)), told, **self.kwargs))
        self.progress()
        return m


class Family:
    """The tables among which one is sought: parameters, float64, and the table that they mean.

    The parameters are the levels, each as a share of the one before it; what is added to log(1 + t) for the timestep
    told there; and what is added to the solver's coefficients. The latter two are 0 in the solver's own table.
    """

    def __init__(self, config: DiffusionConfig, steps: int, guidance: float) -> None:
        self.config, self.guidance = config, guidance
        self.n = integer("steps", steps, 2, config.num_timesteps)
        self.columns = [COLUMN[name] for name in columns(min(len(HISTORY), steps - 1))]
        levels = make_table("fast", config, steps=steps, guided=guidance != 1.0).timesteps.double()
        extra = torch.zeros(self.n - 1 + self.n * len(self.columns), dtype=torch.float64, device="cpu")
        self.first, self.start = levels[:1], torch.cat([self._shares(levels), extra])

    def _shares(self, levels: Tensor) -> Tensor:
        """Return the levels' parameters: no two levels come nearer than half as near as evenly spaced ones are."""
        return ((levels[1:] + 1) / (levels[:-1] + 1) / (1 - 0.5 / self.n)).logit()

    def _levels(self, shares: Tensor) -> Tensor:
        following = (shares.sigmoid() * (1 - 0.5 / self.n)).cumprod(dim=0) * (self.first + 1) - 1
        return torch.cat([self.first, following])

    def restarts(self) -> list[tuple[int, int, bool, float]]:
        """Return of each free parameter: its index, the row from where a change counts, whether m is known there, step.

        A level ends the step before it. A row in the beginning has no older x_0.
        """
        times, width = self.n - 1, len(self.columns)
        free = [(i, i, True, _LEVEL_STEP) for i in range(times)]
        free += [(times + i, i + 1, False, _TIMESTEP_STEP) for i in range(times)]
        at = 2 * times
        return free + [
            (at + width * i + k, i, True, _COEFFICIENT_STEP) for i in range(self.n) for k in range(width) if k < 2 + i
        ]

    def tuned(self, theta: Tensor, errors: tuple[float, float], samples: int) -> Tuned:
        """Return what the parameters mean.

        Raises:
            ValueError: a level lies below t = 0.
        """
        times = self.n - 1
        levels = self._levels(theta[:times])
        told = torch.cat([self.first, (levels[1:].log1p() + theta[times : 2 * times]).expm1()])
        coefficients = self._solver(levels) + theta[2 * times :].view(self.n, -1)
        last = self.config.num_timesteps - 1
        return Tuned(
            self.guidance,
            levels.tolist(),
            told.clamp(0, last).tolist(),
            coefficients.tolist(),
            *errors,
            samples,
        )

    def table(self, theta: Tensor) -> Table:
        """Return the table that the parameters mean."""
        return self.tuned(theta, (0.0, 0.0), 0).table(self.config)

    def parameters(self, tuned: Tuned) -> Tensor:
        """Return the parameters of a table, the inverse of `tuned`."""
        levels, told = (
            torch.tensor(values, dtype=torch.float64, device="cpu") for values in (tuned.levels, tuned.timesteps)
        )
        deltas = torch.tensor(tuned.coefficients, dtype=torch.float64, device="cpu") - self._solver(levels)
        return torch.cat([self._shares(levels), told[1:].log1p() - levels[1:].log1p(), deltas.flatten()])

    def _solver(self, levels: Tensor) -> Tensor:
        return make_table("fast", self.config, timesteps=levels, guided=self.guidance != 1.0).rows64[:, self.columns]


@torch.no_grad()
def tune(
    model: Any,
    steps: int,
    *,
    guidance: float = 1.0,
    samples: int = 128,
    minutes: float = 5.0,
    start: Tuned | None = None,
    found: Callable[[Tuned], None] = lambda tuned: None,
    progress: Callable[[], object] = int,
) -> Tuned:
    """Fit a table of few steps to a model.

    Args:
        model: the network, with its `diffusion`.
        steps: rows of the table, at least 2.
        guidance: weight of classifier-free guidance.
        samples: how many to fit to; half as many more are held out.
        minutes: no further iteration is begun that would end later.
        start: a table to go on from.
        found: called with each table that is better on the held-out samples than all before.
        progress: called after each call of the network.

    Returns:
        The table that is best on the held-out samples.
    """
    began, config = time.monotonic(), diffusion_of(model)
    family = Family(config, steps, guidance)
    many = make_table("fast", config, steps=min(MANY, config.num_timesteps), guided=guidance != 1.0)

    def batches(first: int, count: int) -> list[Batch]:
        seeds = range(first, first + count)
        return [Batch(model, seeds[i : i + BATCH], guidance, many, progress) for i in range(0, count, BATCH)]

    held_out = integer("samples", samples, 4) // 2
    fitted, others = batches(FIRST_SEED, samples), batches(FIRST_SEED + samples, held_out)

    def error(batches: list[Batch], theta: Tensor) -> float:
        table = family.table(theta)
        results = torch.cat([batch.run(table).x[-1] for batch in batches])
        return relative_distance(results, torch.cat([batch.target for batch in batches]))

    before = error(others, family.start)
    theta = family.start if start is None else family.parameters(start)
    after = error(others, theta)
    best = family.tuned(theta, (before, after), held_out)
    damping, worse, took = _DAMPING, 0, 0.0
    while worse < _PATIENCE and time.monotonic() + took < began + 60 * minutes:
        iteration = time.monotonic()
        A, g, cost = _normal_equations(family, theta, fitted)
        for _ in range(_ATTEMPTS):
            step = torch.zeros_like(theta)
            step[[i for i, *_ in family.restarts()]] = -torch.linalg.lstsq(
                A + damping * A.diagonal().diag(), g[:, None]
            ).solution[:, 0]
            try:
                accepted = _cost(family, theta + step, error(fitted, theta + step)) < cost
            except ValueError:  # a level below t = 0
                accepted = False
            if accepted:
                break
            damping *= 6.0
        else:
            break
        theta, damping = theta + step, damping / 5.0
        now = error(others, theta)
        worse = 0 if now < _GAIN * after else worse + 1
        if now < after:
            after = now
            best = family.tuned(theta, (before, after), held_out)
            found(best)
        took = time.monotonic() - iteration
    return best


def _normal_equations(family: Family, theta: Tensor, batches: list[Batch]) -> tuple[Tensor, Tensor, float]:
    """Return J^T J and J^T r of the relative error with its penalty, and their cost."""
    table, free = family.table(theta), family.restarts()
    moved = []
    for i, _, _, size in free:
        moved.append(theta.clone())
        moved[-1][i] += size
    tables = [family.table(moving) for moving in moved]
    A = torch.zeros(len(free), len(free), dtype=torch.float64, device="cpu")
    g, squares = torch.zeros(len(free), dtype=torch.float64, device="cpu"), 0.0
    energy = _energy([batch.target for batch in batches])
    for batch in batches:
        path = batch.run(table)
        residual = (path.x[-1] - batch.target).flatten()
        J = []
        for other, (_, row, known, size) in zip(tables, free, strict=True):
            J.append((batch.run(other, path, row, known=known).x[-1] - path.x[-1]).flatten() / size)
        columns = torch.stack(J)
        A += (columns @ columns.T).double().cpu() / energy
        g += (columns @ residual).double().cpu() / energy
        squares += float(residual.double().square().sum())
    index = [i for i, *_ in free]
    ridge = torch.tensor([_RIDGE if i >= family.n - 1 else 0.0 for i in index], dtype=torch.float64, device="cpu")
    cost = _cost(family, theta, (squares / energy) ** 0.5)
    return A + ridge.diag(), g + ridge * theta[index], cost


def _cost(family: Family, theta: Tensor, error: float) -> float:
    return error**2 + _RIDGE * float(theta[family.n - 1 :].square().sum())


def _energy(targets: list[Tensor]) -> float:
    x = torch.cat(targets).double()
    return float((x - x.mean(dim=0)).square().sum())
