"""Yardsticks that tell solvers apart: networks in closed form, and the error of every sampler against its calls.

`python -m tests.tables.yardsticks FILE.png` prints the tables of docs/samplers.md, and draws its plot.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastddpm import sample
from fastddpm.data.points import sliced_wasserstein
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.schedules.levels import alpha_bar_at
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.by_name import SAMPLERS, make_table
from fastddpm.tables.multistep import weights
from fastddpm.tables.table import Table
from tests.tables.float64 import execute_table64, states64

SCHEDULE = Schedule.linear()
CONFIG = DiffusionConfig(clip_range=None)
CALLS = (3, 5, 8, 10, 20, 50)


class Mixture:
    """The eps that a network would learn exactly from data x_0 ~ mean of N(mu_k, s^2 I).

    E[x_0 | x_t] weighs the components by their probability given x_t, and within each conditions a Gaussian.
    """

    def __init__(self, means: Tensor, s: float) -> None:
        self.means, self.s = means.double().flatten(1), s

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = alpha_bar_at(SCHEDULE, t[:1].double())
        alpha, variance = alpha_bar.sqrt(), 1 - alpha_bar
        total = alpha_bar * self.s**2 + variance
        distance = torch.cdist(x, alpha * self.means).square()
        share = torch.softmax(-0.5 * distance / total, dim=1)
        mean = share @ self.means
        x_0 = mean + alpha * self.s**2 / total * (x - alpha * mean)
        return (x - alpha * x_0) / variance.sqrt()

    def draw(self, n: int, seed: int) -> Tensor:
        """Draw n points of the data, float64 [n, D]."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[k] + self.s * noise


@functools.cache
def ring() -> Mixture:
    """Eight Gaussians of width 0.1 on a circle, as wide as standardised data."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return Mixture(math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], dim=1), 0.1)


@functools.cache
def photographs() -> Mixture:
    """400 patches of 12 x 12 pixels in colour from scikit-learn's two photographs, each a Gaussian of width 0.05."""
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0)
    patches = []
    for image in load_sample_images().images:
        small = image[: image.shape[0] // 4 * 4, : image.shape[1] // 4 * 4].astype(np.float64)
        small = small.reshape(small.shape[0] // 4, 4, small.shape[1] // 4, 4, 3).mean(axis=(1, 3)) / 127.5 - 1
        for _ in range(200):
            top, left = (generator.integers(0, small.shape[axis] - 12) for axis in (0, 1))
            patches.append(small[top : top + 12, left : left + 12].reshape(-1))
    return Mixture(torch.tensor(np.array(patches)), 0.05)


def start(network: Mixture, n: int, seed: int = 0) -> Tensor:
    """Draw x_T, float64 [n, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, network.means.shape[1], dtype=torch.float64, generator=generator)


@functools.cache
def converged(network: Mixture, n: int) -> Tensor:
    """The solution of the ODE from x_T to t = 0, in a thousand steps of third order."""
    return execute_table64(make_table("unipc3", CONFIG), network, start(network, n))


def ode_error(table: Table, network: Mixture, n: int = 128) -> float:
    """The median over samples of the root mean square distance to the converged solution.

    The median, since a sample near the border between two points may go to either, whatever the solver.
    """
    x = execute_table64(table, network, start(network, n))
    return float((x - converged(network, n)).square().mean(dim=1).sqrt().median())


def distribution_error(table: Table, network: Mixture, n: int = 20_000) -> float:
    """Sliced Wasserstein distance of samples to draws of the data."""
    noise = torch.Generator().manual_seed(1)
    z = [torch.randn(n, network.means.shape[1], dtype=torch.float64, generator=noise) for _ in range(len(table))]
    return sliced_wasserstein(execute_table64(table, network, start(network, n), z).float(), network.draw(n, 2).float())


def with_calls(name: str, calls: int, **options: object) -> Table:
    """The table of a sampler with about that many calls of the network."""
    return make_table(name, CONFIG, steps=(calls + 1) // 2 if name == "heun" else calls, **options)


def extrapolation_errors(calls: int, network: Mixture, n: int = 64, between: int = 20) -> list[float]:
    """How far polynomials through the last one, two and three x_0 of the exact solution miss the next one, RMS.

    That is what a step replaces x_0 by along its way; the levels are those of that many calls, evenly in log-SNR.
    """
    levels = with_calls("unipc3", calls, spacing="logsnr").timesteps.double()
    fine = [a + (b - a) * k / between for a, b in itertools.pairwise(levels.tolist()) for k in range(between)]
    exact = [
        start(network, n),
        *states64(make_table("unipc2", CONFIG, timesteps=[*fine, 0.0]), network, start(network, n)),
    ]
    alpha_bar = alpha_bar_at(SCHEDULE, levels)
    x_0 = [
        (x - (1 - a).sqrt() * network(x, t.expand(n))) / a.sqrt()
        for x, t, a in zip(exact[::between], levels, alpha_bar, strict=False)
    ]
    lam = (alpha_bar / (1 - alpha_bar)).log()
    missed = []
    for count in (1, 2, 3):
        squares = []
        for i in range(2, calls - 1):
            nodes = ((lam[i - count + 1 : i + 1] - lam[i]) / (lam[i + 1] - lam[i])).tolist()
            past = torch.stack(x_0[i - count + 1 : i + 1])
            squares.append((torch.tensordot(weights(nodes, [1.0] * count), past, 1) - x_0[i + 1]).square())
        missed.append(float(torch.stack(squares).mean().sqrt()))
    return missed


def stochastic(name: str) -> bool:
    """Whether a sampler adds noise on the way."""
    return bool((with_calls(name, 10).column("sigma") > 0).any())


def on_photographs(name: str, calls: int) -> float | None:
    """The error of a deterministic sampler with levels evenly in log-SNR."""
    if stochastic(name):
        return None
    # ddim takes timesteps of the training alone; in between it is euler.
    return ode_error(with_calls("euler" if name == "ddim" else name, calls, spacing="logsnr"), photographs())


def on_digits(name: str, calls: int) -> float | None:
    """The error of a deterministic sampler over the samples' standard deviation, the median of sixteen samples."""
    if stochastic(name):
        return None
    x, solution = digits(name, calls), digits("dpm++2m", 200)
    spread = (solution - solution.mean(dim=0)).square().mean().sqrt()
    return float((x - solution).square().mean(dim=(1, 2, 3)).sqrt().median() / spread)


@functools.cache
def digits(name: str, calls: int) -> Tensor:
    """Sixteen digits of the shipped model, on trailing timesteps."""
    steps = (calls + 1) // 2 if name == "heun" else calls
    options = {} if name in ("ddpm", "heun") else {"spacing": "trailing"}
    return sample("digits", seeds=range(16), steps=steps, sampler=name, sampler_options=options)


def on_ring(name: str, calls: int) -> float:
    """Sliced Wasserstein distance to the data."""
    return distribution_error(with_calls(name, calls, spacing="trailing"), ring())


YARDSTICKS: dict[str, Callable[[str, int], float | None]] = {
    "photographs, logsnr": on_photographs,
    "digits, trailing": on_digits,
    "ring, trailing": on_ring,
}


@functools.cache
def errors(yardstick: str, name: str) -> list[float | None]:
    """The error of a sampler at each of `CALLS`."""
    return [YARDSTICKS[yardstick](name, calls) for calls in CALLS]


def lines() -> Iterator[str]:
    """Yield docs/samplers.md's tables: one a yardstick, a line a sampler."""
    for yardstick in YARDSTICKS:
        yield from ("", f"| {yardstick} | {' | '.join(map(str, CALLS))} |", "|---" * (len(CALLS) + 1) + "|")
        for name in SAMPLERS:
            found = errors(yardstick, name)
            if None not in found:
                yield f"| `{name}` | {' | '.join(f'{error:.2g}' for error in found)} |"
    for calls in (8, 20, 50):
        missed = ", ".join(f"{error:.2g}" for error in extrapolation_errors(calls, photographs()))
        yield f"photographs, {calls} calls: the next x_0 missed by a constant, a line and a parabola by {missed}"
    many = distribution_error(make_table("ddpm", CONFIG), ring())
    draws = sliced_wasserstein(ring().draw(20_000, 3).float(), ring().draw(20_000, 2).float())
    yield from ("", f"ring: ddpm with 1000 calls {many:.3f}, other draws of the data {draws:.3f}")


def draw_plot(path: str) -> None:
    """Draw error against calls, a panel for each yardstick, all axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(10.0, 4.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    how: dict[str, dict[str, str]] = {}
    for noisy, line in ((False, "-"), (True, "--")):
        names = (name for name in SAMPLERS if stochastic(name) == noisy)
        how |= {name: {"color": f"C{i}", "linestyle": line} for i, name in enumerate(names)}
    for axes, yardstick in zip(figure.subplots(1, 3), YARDSTICKS, strict=True):
        for name in SAMPLERS:
            found = errors(yardstick, name)
            if None not in found:
                axes.loglog(CALLS, found, marker=".", label=name, **how[name])
        axes.set(title=yardstick, xlabel="network calls", ylim=(None, min(3.0, axes.get_ylim()[1])))
        axes.set_xticks(CALLS, [str(calls) for calls in CALLS])
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high < 100 * low else ()))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axes.grid(which="both", alpha=0.3)
    figure.axes[0].set_ylabel("error")
    figure.legend(*figure.axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n".join(lines()), flush=True)
    for file in sys.argv[1:]:
        draw_plot(file)
