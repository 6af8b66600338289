"""A small network, and the process in float64 from the papers, for the tests against it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastddpm.integrations.openai import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)

T, B, C, SIZE = 10, 4, 3, 4
SHAPE = (B, C, SIZE, SIZE)
FIXED = (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE)
BOTH = list(itertools.product(ModelMeanType, ModelVarType))


class Net(nn.Module):
    """A small network in any dtype whose output depends on x, its neighbours, t and y."""

    def __init__(self, var_type: ModelVarType = ModelVarType.FIXED_SMALL, dropout: float = 0.0) -> None:
        super().__init__()
        out = C if var_type in FIXED else 2 * C
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(0.3 * torch.randn(out, C, 3, 3, generator=generator))
        self.dropout = nn.Dropout(dropout)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.seen.append(t.clone())
        shift = 0.02 * t.to(x.dtype).view(-1, 1, 1, 1) + (0.0 if y is None else 0.1 * y.view(-1, 1, 1, 1))
        return torch.tanh(nn.functional.conv2d(self.dropout(x), self.weight.to(x.dtype), padding=1) + shift)


class Hand:
    """The process in float64 from the papers: posteriors by Bayes' rule, no table of the implementation."""

    def __init__(self, betas: np.ndarray[Any, Any], mean_type: ModelMeanType, var_type: ModelVarType) -> None:
        self.mean_type, self.var_type = mean_type, var_type
        self.beta = [float(beta) for beta in betas]
        self.bar = [1.0]
        for beta in self.beta:
            self.bar.append(self.bar[-1] * (1.0 - beta))

    def precision(self, i: int) -> float:
        """1 / beta_tilde: the precision of x_t given x_{t-1}, brought to x_{t-1}, plus that of x_{t-1} given x_0."""
        return (1 - self.beta[i]) / self.beta[i] + 1 / (1 - self.bar[i])

    def posterior(self, x_0: Tensor, x_t: Tensor, i: int) -> Tensor:
        if i == 0:
            return x_0
        from_data = math.sqrt(self.bar[i]) / (1 - self.bar[i]) * x_0
        return (math.sqrt(1 - self.beta[i]) / self.beta[i] * x_t + from_data) / self.precision(i)

    def log_variance(self, i: int, values: Tensor | None) -> Any:
        small = -math.log(self.precision(max(i, 1)))
        if self.var_type is ModelVarType.FIXED_SMALL:
            return small
        if self.var_type is ModelVarType.FIXED_LARGE:
            return small if i == 0 else math.log(self.beta[i])
        if self.var_type is ModelVarType.LEARNED:
            return values
        assert values is not None
        return (values + 1) / 2 * math.log(self.beta[i]) + (1 - values) / 2 * small

    def read(
        self, output: Tensor, x: Tensor, i: int, clip: bool, denoised_fn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        """Return x_0, the mean and the log-variance of one sample."""
        values = None
        if self.var_type not in FIXED:
            output, values = output[:C], output[C:]
        bar = self.bar[i + 1]
        if self.mean_type is ModelMeanType.EPSILON:
            x_0 = (x - math.sqrt(1 - bar) * output) / math.sqrt(bar)
        elif self.mean_type is ModelMeanType.START_X or i == 0:
            x_0 = output
        else:
            # The x_0 whose posterior mean is the output.
            slope = math.sqrt(self.bar[i]) / (1 - self.bar[i]) / self.precision(i)
            x_0 = (output - self.posterior(torch.zeros_like(x), x, i)) / slope
        if denoised_fn is not None:
            x_0 = denoised_fn(x_0)
        if clip:
            x_0 = x_0.clamp(-1, 1)
        mean = output if self.mean_type is ModelMeanType.PREVIOUS_X else self.posterior(x_0, x, i)
        return x_0, mean, self.log_variance(i, values)

    def p(self, output: Tensor, x: Tensor, i: int, z: Tensor, clip: bool = True, **options: Any) -> Tensor:
        _, mean, log_variance = self.read(output, x, i, clip, **options)
        return mean if i == 0 else mean + torch.exp(0.5 * torch.as_tensor(log_variance)) * z

    def ddim(self, output: Tensor, x: Tensor, i: int, z: Tensor, eta: float, clip: bool = True) -> Tensor:
        x_0, _, _ = self.read(output, x, i, clip)
        bar, before = self.bar[i + 1], self.bar[i]
        eps = (x - math.sqrt(bar) * x_0) / math.sqrt(1 - bar)
        sigma = eta * math.sqrt((1 - before) / (1 - bar) * (1 - bar / before))
        return math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * eps + sigma * z

    def invert(self, output: Tensor, x: Tensor, i: int, clip: bool = True) -> Tensor:
        x_0, _, _ = self.read(output, x, i, clip)
        bar, after = self.bar[i + 1], [*self.bar, 0.0][i + 2]
        eps = (x - math.sqrt(bar) * x_0) / math.sqrt(1 - bar)
        return math.sqrt(after) * x_0 + math.sqrt(1 - after) * eps


def build(
    mean_type: ModelMeanType = ModelMeanType.EPSILON,
    var_type: ModelVarType = ModelVarType.FIXED_SMALL,
    loss_type: LossType = LossType.MSE,
    steps: int = T,
    **options: Any,
) -> tuple[GaussianDiffusion, Net, Hand]:
    betas = get_named_beta_schedule("cosine" if steps < 30 else "linear", steps)
    diffusion = GaussianDiffusion(
        betas=betas, model_mean_type=mean_type, model_var_type=var_type, loss_type=loss_type, **options
    )
    return diffusion, Net(var_type).eval(), Hand(betas, mean_type, var_type)


def state(seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def each(function: Callable[..., Tensor], net: Net, x: Tensor, t: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    """Apply one of Hand's methods to every sample at its own timestep, in float64."""
    with torch.no_grad():
        output = net(x.double(), t)
    parts = zip(output, x.double(), t.tolist(), *(r.double() for r in rest), strict=True)
    return torch.stack([function(*part, **options) for part in parts])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {float(error):.3g}"
