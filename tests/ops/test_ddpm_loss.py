"""The training loss: its rows against the papers, its value against float64, its gradient, and its determinism."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import Schedule, ops, reference
from fastddpm.diagnostics.step_cases import arrange
from fastddpm.noise import v1 as noise
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins as step
from fastddpm.ops.operators import pack
from fastddpm.tables.table import check_weighting, loss_rows

SCHEDULE = Schedule.linear()
T = SCHEDULE.num_timesteps
PREDICTIONS = ["epsilon", "x_0", "v"]
SHAPES = [(3, 3, 8, 8), (5, 2), (2, 5), (2, 3, 7, 5), (1, 1, 32, 32)]


def counter(batch: int, n: int = 3) -> Counter:
    return noise.counter(resolve_seeds(seed=11, batch=batch), n, noise.STREAM_TRAIN)


def operands(shape: tuple[int, ...], prediction: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments of ``ops.ddpm_loss`` for a target; m is near it, as a trained network's output is."""
    g = torch.Generator().manual_seed(sum(shape))
    x_0 = torch.rand(shape, generator=g) * 2 - 1
    rows, t = loss_rows(SCHEDULE, prediction), torch.arange(shape[0]) * 37 % T
    c = None if prediction == "x_0" else counter(shape[0])
    given = None if prediction == "epsilon" else x_0
    exact = step.residual(torch.zeros(shape), given, rows, t, c)
    m = (exact + 0.1 * torch.randn(shape, generator=g)).to(dtype)
    return {"m": m, "rows": rows, "row": t, "noise": c, "x_0": given}


def target64(kw: dict[str, Any], prediction: str) -> Tensor:
    """The target in float64, from the noise's float32 bits."""
    shape, t = kw["m"].shape, kw["row"]
    per_sample = (-1, *(1,) * (len(shape) - 1))
    if prediction == "x_0":
        return kw["x_0"].double()
    eps = noise.normals(*kw["noise"], math.prod(shape[1:])).reshape(shape).double()
    if prediction == "epsilon":
        return eps
    alpha_bar = SCHEDULE.alphas_cumprod[t].reshape(per_sample)
    return alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * kw["x_0"].double()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_within_1e_6_of_float64(shape: tuple[int, ...], prediction: str) -> None:
    kw = operands(shape, prediction)
    expected = (target64(kw, prediction) - kw["m"].double()).square().flatten(1).mean(dim=1)
    # v's target is rounded to float32 before m, which is close to it, is subtracted.
    assert ops.ddpm_loss(**kw).tolist() == pytest.approx(expected.tolist(), rel=1e-6, abs=5e-8)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_residual_matches_numpy(prediction: str) -> None:
    """Each operation rounded to float32 on its own."""
    kw = operands((3, 3, 8, 8), prediction)
    row = kw["rows"][kw["row"]].numpy().reshape(3, 3, 1, 1, 1).swapaxes(0, 1)
    target = np.float32(0)
    if kw["noise"] is not None:
        target = row[0] * noise.normals(*kw["noise"], 192).reshape(3, 3, 8, 8).numpy()
    if kw["x_0"] is not None:
        target = target + row[1] * kw["x_0"].numpy()
    residual = step.residual(kw["m"], kw["x_0"], kw["rows"], kw["row"], kw["noise"])
    assert torch.equal(residual, torch.from_numpy(target - kw["m"].numpy()))


def test_gradient_is_the_scaled_residual_in_ms_dtype_and_layout() -> None:
    kw = operands((3, 3, 8, 8), "v", torch.bfloat16)
    kw["rows"][:, 2] = 3.0
    m = arrange(kw["m"], "channels_last").requires_grad_()
    upstream = torch.tensor([1.0, -0.5, 0.0])
    (ops.ddpm_loss(**(kw | {"m": m})) * upstream).sum().backward()
    residual = step.residual(kw["m"], kw["x_0"], kw["rows"], kw["row"], kw["noise"])
    scale = -2.0 * upstream * (kw["rows"][kw["row"], 2] / 192)
    assert m.grad is not None
    assert m.grad.dtype == torch.bfloat16
    assert m.grad.stride() == m.stride()
    assert torch.equal(m.grad, (scale.reshape(3, 1, 1, 1) * residual).to(torch.bfloat16))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_operator_passes_gradcheck_in_float64(prediction: str, learned: bool) -> None:
    kw = operands((2, 1, 2, 3), prediction)
    kw["rows"][:, 2] = 0.7
    m = kw["m"].double().repeat(1, 1 + learned, 1, 1).requires_grad_()
    x_0 = None if kw["x_0"] is None else kw["x_0"].double().requires_grad_()

    def loss(*inputs: Tensor) -> Tensor:
        given = inputs[1] if len(inputs) > 1 else None
        return torch.ops.fastddpm.ddpm_loss(
            inputs[0], given, kw["rows"], kw["row"], *pack(kw["noise"]), learned, "torch", False
        )

    assert torch.autograd.gradcheck(loss, (m,) if x_0 is None else (m, x_0))


def test_a_learned_variance_has_no_part_in_the_loss() -> None:
    kw = operands((3, 3, 8, 8), "epsilon")
    doubled = torch.cat([kw["m"], torch.full_like(kw["m"], math.nan)], dim=1).requires_grad_()
    loss = ops.ddpm_loss(**(kw | {"m": doubled}), learned=True)
    assert torch.equal(loss, ops.ddpm_loss(**kw))
    loss.sum().backward()
    assert doubled.grad is not None
    assert (doubled.grad[:, 3:] == 0).all()
    assert (doubled.grad[:, :3] != 0).all()


OPCHECKS = [("epsilon", False, torch.float32), ("v", True, torch.bfloat16), ("x_0", False, torch.float32)]


@pytest.mark.parametrize(("prediction", "learned", "dtype"), OPCHECKS, ids=str)
def test_operators_pass_opcheck(prediction: str, learned: bool, dtype: torch.dtype) -> None:
    kw = operands((2, 2, 3, 4), prediction, dtype)
    m = arrange(kw["m"].repeat(1, 1 + learned, 1, 1), "channels_last").requires_grad_()
    arguments = (m, kw["x_0"], kw["rows"], kw["row"], *pack(kw["noise"]), learned)
    gradient = (m.detach(), *arguments[1:], torch.ones(2), "auto", False)
    for name, args in (("ddpm_loss", (*arguments, "auto", False)), ("ddpm_loss_gradient", gradient)):
        results = torch.library.opcheck(getattr(torch.ops.fastddpm, name).default, args)
        assert set(results.values()) == {"SUCCESS"}


def test_weightings_are_those_of_their_papers_whatever_is_predicted() -> None:
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
    snr = alpha_bar / (1 - alpha_bar)
    papers = {
        # Hang et al. 2023: min(SNR, gamma) for x_0, / SNR for eps, / (SNR + 1) for v.
        ("min-snr", None): (np.minimum(snr, 5) / snr, np.minimum(snr, 5), np.minimum(snr, 5) / (snr + 1)),
        ("min-snr", 1.0): (np.minimum(snr, 1) / snr, np.minimum(snr, 1), np.minimum(snr, 1) / (snr + 1)),
        # Choi et al. 2022: 1 / (k + SNR)^gamma of the noise's error, k = 1.
        ("p2", None): (1 / (1 + snr), snr / (1 + snr), alpha_bar / (1 + snr)),
        ("p2", 0.5): (1 / np.sqrt(1 + snr), snr / np.sqrt(1 + snr), alpha_bar / np.sqrt(1 + snr)),
        ("uniform", None): (np.ones(T),) * 3,
    }
    for (weighting, gamma), weights in papers.items():
        for prediction, expected in zip(PREDICTIONS, weights, strict=True):
            rows = loss_rows(SCHEDULE, prediction, weighting, gamma)
            assert rows[:, 2].numpy() == pytest.approx(expected, rel=1e-6)


def test_weights_are_finite_at_zero_terminal_snr() -> None:
    for weighting in ("min-snr", "p2"):
        assert loss_rows(SCHEDULE.zero_terminal_snr(), "v", weighting).isfinite().all()


@pytest.mark.parametrize(
    ("weighting", "gamma", "message"),
    [
        ("minsnr", None, "choose one of uniform, min-snr, p2"),
        ("uniform", 5.0, "has no gamma"),
        ("p2", -1.0, "gamma must be a finite number > 0"),
        ("min-snr", math.nan, "gamma must be a finite number > 0"),
    ],
)
def test_weighting_refuses(weighting: str, gamma: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weighting(weighting, gamma)


def network(x_t: Tensor, t: Tensor) -> Tensor:
    """Elementwise, so that a sample's output does not depend on the batch."""
    return 0.5 * x_t + 0.001 * t.to(x_t.dtype).reshape(-1, *(1,) * (x_t.dim() - 1))


def test_ddpm_loss_is_l_simple_of_the_reference() -> None:
    x_0, t = torch.rand(6, 1, 4, 4) * 2 - 1, torch.tensor([0, 1, 7, 250, 998, 999])
    eps = noise.normals(*counter(6, 9), 16).reshape(x_0.shape)
    expected = reference.simple_loss(network, x_0.double(), t, SCHEDULE, eps.double())
    loss = fastddpm.ddpm_loss(network, x_0, SCHEDULE, seed=11, step=9, t=t)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    each = fastddpm.ddpm_loss(network, x_0, SCHEDULE, seed=11, step=9, t=t, reduction="none")
    assert each.shape == (6,)
    assert each.mean().item() == loss.item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_loss_of_the_exact_target_is_zero(prediction: str) -> None:
    x_0, t = torch.rand(4, 2, 4, 4) * 2 - 1, torch.tensor([3, 400, 700, 999])
    eps = noise.normals(*counter(4), 32).reshape(x_0.shape)
    signal, sigma = (
        c[t].float().reshape(4, 1, 1, 1) for c in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
    )
    targets = {"epsilon": eps, "x_0": x_0, "v": signal * eps - sigma * x_0}
    losses = fastddpm.ddpm_loss(
        lambda x, t: targets[prediction], x_0, SCHEDULE, seed=11, step=3, t=t, prediction_type=prediction
    )
    assert losses.item() == 0.0


def test_ddpm_loss_of_a_sample_depends_on_seed_id_and_step_alone() -> None:
    x_0 = torch.rand(8, 1, 8, 8) * 2 - 1
    whole = fastddpm.ddpm_loss(network, x_0, SCHEDULE, seed=5, step=2, reduction="none")
    again = fastddpm.ddpm_loss(network, x_0, SCHEDULE, seed=5, step=2, reduction="none")
    assert torch.equal(whole, again)
    k = torch.tensor([6, 1])
    part = fastddpm.ddpm_loss(network, x_0[k], SCHEDULE, seed=5, step=2, sample_ids=k, reduction="none")
    assert torch.equal(part, whole[k])
    for other in ({"seed": 6, "step": 2}, {"seed": 5, "step": 3}):
        assert not torch.equal(whole, fastddpm.ddpm_loss(network, x_0, SCHEDULE, **other, reduction="none"))


def test_ddpm_loss_draws_every_timestep_alike() -> None:
    """Chi-squared over ten bins of 20,000 timesteps: below 9 + 5 sqrt(18)."""
    seen = []

    def record(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x_t

    fastddpm.ddpm_loss(record, torch.zeros(20_000, 1), SCHEDULE, seed=1, step=0)
    counts = torch.bincount(seen[0] // 100, minlength=10).double()
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 9 + 5 * math.sqrt(18)


def test_ddpm_loss_trains_through_a_network_and_x_0() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    x_0 = (torch.rand(4, 2) * 2 - 1).requires_grad_()
    t = torch.tensor([10, 200, 500, 900])
    eps = noise.normals(*counter(4, 0), 2)
    options = {"seed": 11, "step": 0, "t": t, "prediction_type": "v"}
    fastddpm.ddpm_loss(lambda x, t: scale * x, x_0, SCHEDULE, **options).backward()
    exact_scale, exact = scale.detach().double().requires_grad_(), x_0.detach().double().requires_grad_()
    x_t = reference.q_sample(exact, t, SCHEDULE, eps.double())
    signal, sigma = SCHEDULE.sqrt_alphas_cumprod[t, None], SCHEDULE.sqrt_one_minus_alphas_cumprod[t, None]
    (signal * eps - sigma * exact - exact_scale * x_t).square().mean().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(exact_scale.grad.item(), rel=1e-5)
    torch.testing.assert_close(x_0.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_ddpm_loss_with_a_learned_variance_is_the_hybrid_loss(variance: str) -> None:
    x_0, t = torch.rand(4, 2, 4, 4) * 2 - 1, torch.tensor([0, 5, 400, 999])
    eps = noise.normals(*counter(4), 32).reshape(x_0.shape).double()
    weight = torch.tensor([0.9, 0.1], requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([weight[0] * x, weight[1] * x], dim=1)

    gradients = []
    for exact in (False, True):
        if exact:
            loss = reference.hybrid_loss(model, x_0.double(), t, SCHEDULE, eps, variance_type=variance)
        else:
            loss = fastddpm.ddpm_loss(model, x_0, SCHEDULE, seed=11, step=3, t=t, variance_type=variance)
        gradients.append((loss.item(), *torch.autograd.grad(loss, weight)[0].tolist()))
    assert gradients[0] == pytest.approx(gradients[1], rel=2e-4)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "reduction": ({"reduction": "sum"}, ValueError, "unknown reduction 'sum'; choose one of mean, none"),
    "variance": ({"variance_type": "fixed_small"}, ValueError, "learned, learned_range"),
    "prediction": ({"prediction_type": "noise"}, ValueError, "epsilon, x_0, v"),
    "ids": ({"sample_ids": [1, 2, 3]}, ValueError, "batch of 2"),
    "seed": ({"seed": -1}, ValueError, "seed must be an integer >= 0 and <= 2"),
    "step": ({"step": 2**32}, ValueError, "step must be an integer >= 0 and <= 2"),
    "t": ({"t": torch.tensor([1.0, 2.0])}, ValueError, "int64"),
    "learned": ({"variance_type": "learned", "prediction_type": "v"}, ValueError, "twice|expected"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_ddpm_loss_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastddpm.ddpm_loss(network, torch.zeros(2, 2, 4, 4), SCHEDULE, **({"seed": 0, "step": 0} | change))


def test_op_refuses_a_target_without_a_term_and_float64() -> None:
    rows, t, m = loss_rows(SCHEDULE), torch.tensor([0]), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no term"):
        ops.ddpm_loss(m, rows, t, None, None)
    with pytest.raises(TypeError, match="float64"):
        ops.ddpm_loss(m.double(), rows, t, counter(2), None)


def test_op_of_an_empty_batch_is_empty() -> None:
    rows, none = loss_rows(SCHEDULE), torch.zeros(0, dtype=torch.int64)
    assert ops.ddpm_loss(torch.zeros(0, 3), rows, none, None, torch.zeros(0, 3)).shape == (0,)
