"""Fit a table to a model: its result is to meet that of many steps from the same x_T.

A table of few steps has some dozens of numbers: the noise levels that it passes, the timesteps that the network is told
there, and each row's coefficients. Least squares finds them (cf. S4S, arXiv:2502.17423, which follows gradients): the
residuals are the pixels of the difference to the converged result, their derivatives come from finite differences, for
which only the rows behind the changed number run again, and steps are Levenberg's and Marquardt's. The levels are
sought first, since most depends on them and their derivatives cost least; then everything, on more and more samples.
Samples that are held out of the fit say when to stop.
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
from fastddpm.noise.v1 import STREAM_X_T
from fastddpm.ops.draw import randn
from fastddpm.sampling.conditions import labels_for
from fastddpm.sampling.network import device_of, diffusion_of, dtype_of, null_class_of, shape_of, unwrap
from fastddpm.sampling.tuned import Tuned, columns
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.tables.table import COLUMN, HISTORY, Table

# The solver's error after so many steps is far below that of the few that are fitted.
MANY = 40
BATCH = 32
# Far from those that are drawn to look at, or to measure.
FIRST_SEED = 2_000_000_000
# How far a derivative reaches: in the logit of a level's share, in log(1 + t), and in a coefficient.
_LEVEL_STEP, _TIMESTEP_STEP, _COEFFICIENT_STEP = 0.1, 0.02, 0.01
# What a parameter's squared deviation from the solver's costs, levels apart, where the samples' variance is 1.
_RIDGE = 1e-3
_DAMPING, _ATTEMPTS = 1e-2, 6
# Derivatives serve for another step while the last one brought the cost below that share.
_SERVES = 0.96
# A stage ends when an iteration brings the held-out error to no less than that share, the last after several of them.
_GAIN, _PATIENCE = 0.99, 3


@dataclass
class Path:
    """A run of a table: states and older x_0 before each row and after the last, and the network's outputs."""

    table: Table
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

    def run(self, table: Table, path: Path | None = None) -> Path:
        """Run a table; with another's path only from the row on where they differ."""
        rows = table.with_guidance(self.guidance).rows.to(self.device)
        flags: Any = {"clip": table.clip, "learned": table.learned, "guided": self.guidance != 1.0}
        if path is None:
            older = self.x_T.new_zeros(table.history, *self.x_T.shape) if table.history else None
            new = Path(table, [self.x_T], [older], [])
        else:
            told = table.timesteps != path.table.timesteps
            changed = told | (table.rows64 != path.table.rows64).any(dim=1)
            if not changed.any():
                return path
            first = int(changed.nonzero()[0])
            # Where the timestep is the same, so is the network's output.
            new = Path(table, path.x[: first + 1], path.history[: first + 1], path.m[: first + 1 - int(told[first])])
        for i in range(len(new.x) - 1, len(table)):
            x, history = new.x[i], new.history[i]
            if i == len(new.m):
                new.m.append(self._predict(x, float(table.timesteps[i])))
            history = None if history is None else history.clone()
            row = torch.tensor([i], device=self.device)
            x = ops.p_sample(x, new.m[i], rows, row, None, **flags, history=history, out=torch.empty_like(x))
            new.x.append(x)
            new.history.append(history)
        return new

    def _predict(self, x: Tensor, t: float) -> Tensor:
        x = torch.cat([x, x]) if self.guidance != 1.0 else x
        told = torch.full((len(x),), t, device=self.device)
        m = unwrap(self.model(x.to(dtype_of(self.model)), told, **self.kwargs))
        self.progress()
        return m


class Targets:
    """The samples that tables are fitted to, with the results of many steps, and as many that are held out.

    Args:
        model: the network, with its `diffusion`.
        guidance: weight of classifier-free guidance.
        samples: how many to fit to.
        progress: called after each call of the network.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, *, guidance: float = 1.0, samples: int = 128, progress: Callable[[], object] = int
    ) -> None:
        self.config, self.guidance = diffusion_of(model), guidance
        many = make_table("fast", self.config, steps=min(MANY, self.config.num_timesteps), guided=guidance != 1.0)
        self.count = integer("samples", samples, 2)

        def batches(first: int) -> list[Batch]:
            seeds = range(first, first + self.count)
            return [Batch(model, seeds[i : i + BATCH], guidance, many, progress) for i in range(0, self.count, BATCH)]

        self.fitted, self.held_out = batches(FIRST_SEED), batches(FIRST_SEED + self.count)
        x = torch.cat([batch.target for batch in self.fitted]).double()
        self.variance = float((x - x.mean(dim=0)).square().mean())

    def residuals(self, batches: Sequence[Batch], tables: Sequence[Table]) -> Tensor:
        """How far the tables' results are from those that are to be met, [len(tables), n], over the deviation of all.

        The squares of a table's sum to that of its error. The first runs whole, others from where they differ from it.
        """
        found = []
        for batch in batches:
            path = batch.run(tables[0])
            found.append(torch.stack([(batch.run(table, path).x[-1] - batch.target).flatten() for table in tables]))
        missed = torch.cat(found, dim=1)
        return missed / (self.variance * missed.shape[1]) ** 0.5

    def error(self, table: Table) -> float:
        """Root mean square distance of the samples that are held out, over the samples' standard deviation."""
        return float(self.residuals(self.held_out, [table]).double().norm())


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
        # How far a derivative reaches, and what a squared deviation from the solver's numbers costs. A row in the
        # beginning has no older x_0.
        times = torch.ones(self.n - 1, dtype=torch.float64, device="cpu")
        used = torch.ones(self.n, len(self.columns), dtype=torch.float64, device="cpu").tril(1).flatten()
        self.reach = torch.cat([_LEVEL_STEP * times, _TIMESTEP_STEP * times, _COEFFICIENT_STEP * used])
        self.ridge = torch.cat([0.0 * times, _RIDGE * (1.0 + extra)])

    def cost(self, theta: Tensor, residuals: Tensor) -> float:
        """Return what is minimised."""
        return float(residuals.double().square().sum()) + float((self.ridge * theta.square()).sum())

    def _shares(self, levels: Tensor) -> Tensor:
        """Return the levels' parameters: no two levels come nearer than half as near as evenly spaced ones are."""
        return (levels[1:] / levels[:-1] / (1 - 0.5 / self.n)).logit(1e-9)

    def tuned(self, theta: Tensor, before: float = 0.0, after: float = 0.0, samples: int = 0) -> Tuned:
        """Return what the parameters mean."""
        shares, times, deltas = theta.split([self.n - 1, self.n - 1, self.n * len(self.columns)])
        levels = torch.cat([self.first, self.first * (shares.sigmoid() * (1 - 0.5 / self.n)).cumprod(dim=0)])
        told = torch.cat([self.first, (levels[1:].log1p() + times).expm1().clamp(0, self.config.num_timesteps - 1)])
        coefficients = self._solver(levels) + deltas.view(self.n, -1)
        return Tuned(self.guidance, levels.tolist(), told.tolist(), coefficients.tolist(), before, after, samples)

    def table(self, theta: Tensor) -> Table:
        """Return the table that the parameters mean."""
        return self.tuned(theta).table(self.config)

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
    targets: Targets,
    steps: int,
    *,
    minutes: float = 5.0,
    start: Tuned | None = None,
    found: Callable[[Tuned], None] = lambda tuned: None,
) -> Tuned:
    """Fit a table of few steps to a model.

    Args:
        targets: the model's results that are to be met.
        steps: rows of the table, at least 2.
        minutes: no further iteration is begun that would end later.
        start: a table to go on from.
        found: called with each table that is better on the held-out samples than all before.

    Returns:
        The table that is best on the held-out samples.
    """
    began, family = time.monotonic(), Family(targets.config, steps, targets.guidance)
    best = family.start if start is None else family.parameters(start)
    before, after = (targets.error(family.table(theta)) for theta in (family.start, best))
    free, seconds, many = family.reach.nonzero()[:, 0], 0.0, len(targets.fitted)
    stages = [(free[: steps - 1], 1, 1), (free, 2, 1), (free, many, _PATIENCE)]
    for free, count, patience in stages if start is None else stages[-1:]:
        theta, batches, damping = best, targets.fitted[:count], _DAMPING
        while patience and time.monotonic() + seconds * count < began + 60 * minutes:
            iteration = time.monotonic()
            theta, damping = _improved(targets, batches, family, theta, free, damping)
            error = targets.error(family.table(theta))
            patience -= error > _GAIN * after
            if error < after:
                best, after = theta, error
                found(family.tuned(best, before, after, targets.count))
            seconds = (time.monotonic() - iteration) / count
    return family.tuned(best, before, after, targets.count)


def _improved(
    targets: Targets, batches: Sequence[Batch], family: Family, theta: Tensor, free: Tensor, damping: float
) -> tuple[Tensor, float]:
    """Take Levenberg's and Marquardt's steps with the derivatives at theta, while these serve; return damping too."""
    tables = [family.table(theta), *(family.table(theta + step) for step in family.reach.diag()[free])]
    r, *moved = targets.residuals(batches, tables)
    J = (torch.stack(moved) - r) / family.reach[free, None].to(r)
    A, cost = (J @ J.T).double().cpu() + family.ridge[free].diag(), family.cost(theta, r)
    for _ in range(_ATTEMPTS):
        g = (J @ r).double().cpu() + (family.ridge * theta)[free]
        trial = theta.index_add(0, free, -torch.linalg.solve(A + damping * A.diagonal().diag(), g))
        (missed,) = targets.residuals(batches, [family.table(trial)])
        before, now = cost, family.cost(trial, missed)
        if now >= before:
            damping *= 6.0
            continue
        theta, r, cost, damping = trial, missed, now, damping / 5.0
        if now > _SERVES * before:
            break
    return theta, damping
