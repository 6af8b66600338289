"""q_sample's twin against NumPy and float64, and against the distribution it draws from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm import Schedule, ops
from fastddpm.diagnostics.step_cases import arrange
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.tables.table import q_rows, q_step_rows
from tests.ops.shapes import SHAPES

SCHEDULE = Schedule.linear()
K = 5


def counter(batch: int, step: int = 3) -> Counter:
    return noise_v1.counter(resolve_seeds(seeds=range(batch)), step, noise_v1.STREAM_TRAIN)


def normals(noise: Counter, shape: tuple[int, ...]) -> Tensor:
    return noise_v1.normals(*noise, math.prod(shape[1:])).reshape(shape)


def numpy_q_sample(x_0: Tensor, rows: Tensor, row: Tensor, eps: Tensor) -> Tensor:
    """x_t in NumPy float32, each operation rounded."""
    c_x, sigma = rows.numpy()[row.expand(len(x_0)).numpy()].reshape(len(x_0), 2, *(1,) * (x_0.dim() - 1)).swapaxes(0, 1)
    return torch.from_numpy(c_x * x_0.float().numpy() + sigma * eps.float().numpy()).to(x_0.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_sample_matches_numpy(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    t, noise, rows = torch.arange(shape[0]) * 3 % 1000, counter(shape[0]), q_rows(SCHEDULE)
    x_t, eps = ops.q_sample(x_0, rows, t, noise, return_eps=True)
    z = normals(noise, shape)
    assert torch.equal(eps, z.to(dtype))
    assert torch.equal(x_t, numpy_q_sample(x_0, rows, t, z))
    assert torch.equal(x_t, ops.q_sample(x_0, rows, t, noise))


def test_q_sample_uses_the_noise_given() -> None:
    x_0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    rows, t = q_rows(SCHEDULE), torch.tensor([999])
    x_t, returned = ops.q_sample(x_0, rows, t, eps, return_eps=True)
    assert torch.equal(x_t, numpy_q_sample(x_0, rows, t, eps))
    assert torch.equal(returned, eps)


@pytest.mark.parametrize("layout", ["channels-last", "expanded", "offset"])
def test_q_sample_takes_any_layout(layout: str) -> None:
    x_0 = torch.randn(2, 3, 4, 4)
    if layout == "expanded":
        x_0 = x_0[:, :1].expand(2, 3, 4, 4)
    rows, t, noise = q_rows(SCHEDULE), torch.tensor([5, 500]), counter(2)
    same = arrange(x_0, "channels_last") if layout == "channels-last" else x_0
    if layout == "offset":
        same = torch.zeros(97)[1:].view(2, 3, 4, 4).copy_(x_0)
    got = ops.q_sample(same, rows, t, noise)
    assert torch.equal(got, ops.q_sample(x_0.contiguous(), rows, t, noise))
    assert got.is_contiguous()


def test_q_sample_of_an_empty_batch_is_empty() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    x_t, eps = ops.q_sample(torch.zeros(0, 3), q_rows(SCHEDULE), none, Counter(none, none, none, 2), return_eps=True)
    assert x_t.shape == eps.shape == (0, 3)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_q_sample_has_the_moments_of_equation_4(t: int) -> None:
    """x_t given x_0 = 1 is N(sqrt(alpha_bar), 1 - alpha_bar); standard errors of mean and variance of n draws."""
    n = 1 << 18
    x_t = ops.q_sample(torch.ones(1, n), q_rows(SCHEDULE), torch.tensor([t]), counter(1, t))
    alpha_bar = float(SCHEDULE.alphas_cumprod[t])
    std = math.sqrt(1 - alpha_bar)
    assert abs(x_t.double().mean().item() - math.sqrt(alpha_bar)) <= K * std / math.sqrt(n)
    assert abs(x_t.double().var().item() - std**2) <= K * std**2 * math.sqrt(2 / n)


def test_q_sample_single_steps_compose_to_equation_4() -> None:
    """T single steps q(x_t | x_{t-1}) reach the closed form's moments (Ho et al. 2020, eqs. 2 and 4)."""
    schedule, n = Schedule.linear_rescaled(50), 1 << 15
    x, rows = torch.full((1, n), 2.0), q_step_rows(schedule)
    for t in range(50):
        x = ops.q_sample(x, rows, torch.tensor([t]), counter(1, t))  # type: ignore[assignment]
    alpha_bar = float(schedule.alphas_cumprod[-1])
    assert abs(x.double().mean().item() - 2 * math.sqrt(alpha_bar)) <= K * math.sqrt((1 - alpha_bar) / n)
    assert abs(x.double().var().item() - (1 - alpha_bar)) <= K * (1 - alpha_bar) * math.sqrt(2 / n)


def test_q_sample_is_differentiable_in_x_0_and_eps() -> None:
    """x_t is linear: its derivatives are c_x and sigma."""
    x_0, eps = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    rows, t = q_rows(SCHEDULE), torch.tensor([10, 900])
    x_t, same = ops.q_sample(x_0, rows, t, eps, return_eps=True)
    weights = torch.randn(2, 3)
    ((weights * x_t).sum() + (3.0 * same).sum()).backward()
    c_x, sigma = rows[t].unsqueeze(-1).unbind(1)
    assert torch.equal(x_0.grad, c_x * weights)
    assert torch.equal(eps.grad, sigma * weights + 3.0)


def test_q_sample_with_a_counter_is_differentiable_in_x_0() -> None:
    x_0 = torch.randn(2, 3, requires_grad=True)
    rows, t = q_rows(SCHEDULE), torch.tensor([10])
    x_t = ops.q_sample(x_0, rows, t, counter(2))
    x_t.sum().backward()
    assert torch.equal(x_0.grad, rows[10, 0].expand(2, 3))


X = torch.zeros(2, 3)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "noise shape": ({"noise": torch.zeros(1, 3)}, ValueError, "nothing is broadcast"),
    "noise dtype": ({"noise": X.half()}, ValueError, "noise is torch.float16, but x_0 is torch.float32"),
    "noise device": ({"noise": X.to("meta")}, ValueError, "noise is on meta, but x is on cpu"),
    "rows": ({"rows": torch.zeros(5, 14)}, ValueError, r"rows must be float32 \[R, 2\]"),
    "row": ({"row": torch.tensor([1, 2, 3])}, ValueError, "row must be int64"),
    "float64": ({"x_0": X.double()}, TypeError, "fastddpm.reference"),
    "int": ({"x_0": X.long()}, TypeError, "int64"),
    "scalar": ({"x_0": torch.tensor(1.0)}, ValueError, "samples first"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_q_sample_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x_0": X, "rows": torch.zeros(5, 2), "row": torch.tensor([0]), "noise": X} | change
    with pytest.raises(error, match=message):
        ops.q_sample(**arguments)


def test_q_sample_refuses_a_row_out_of_range_on_the_cpu() -> None:
    with pytest.raises(IndexError):
        ops.q_sample(X, torch.zeros(5, 2), torch.tensor([5]), X)


def test_q_sample_numpy_oracle_rounds_like_float32() -> None:
    """The oracle itself, against float64: two products and a sum are within 1.5 ulp of the larger product."""
    x_0, eps, rows = torch.randn(1, 999), torch.randn(1, 999), q_rows(SCHEDULE)
    got = numpy_q_sample(x_0, rows, torch.tensor([300]), eps).double()
    c_x, sigma = rows[300].double()
    bound = 1.5 * np.finfo(np.float32).eps * ((c_x * x_0).abs() + (sigma * eps).abs())
    assert ((got - (c_x * x_0.double() + sigma * eps.double())).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_sample_keeps_what_a_mask_keeps(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x_0, before = (torch.randn(shape, generator=g) for _ in range(2))
    keep, t, noise, rows = (
        torch.rand(shape, generator=g) < 0.5,
        torch.tensor([400]),
        counter(shape[0]),
        q_rows(SCHEDULE),
    )
    out, version = before.clone(), 0
    assert ops.q_sample(x_0, rows, t, noise, out=out, keep=keep) is out
    assert torch.equal(out, torch.where(keep, before, numpy_q_sample(x_0, rows, t, normals(noise, shape))))
    assert out._version > version


def test_q_sample_refuses_an_out_that_does_not_fit() -> None:
    x_0, rows, t, noise = torch.randn(2, 8), q_rows(SCHEDULE), torch.tensor([1]), counter(2)
    keep = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="out= and keep= go together"):
        ops.q_sample(x_0, rows, t, noise, keep=keep)
    with pytest.raises(ValueError, match=r"keep must be torch.bool \[2, 8\].*got torch.float32"):
        ops.q_sample(x_0, rows, t, noise, out=x_0.clone(), keep=keep.float())
    with pytest.raises(ValueError, match="out must be contiguous"):
        ops.q_sample(x_0, rows, t, noise, out=torch.zeros(8, 2).T, keep=keep)
    with pytest.raises(RuntimeError, match="x_0 requires a gradient"):
        ops.q_sample(x_0.clone().requires_grad_(), rows, t, noise, out=x_0.clone(), keep=keep)
