"""Single steps of the drop-in for OpenAI's packages, against the papers' formulas in float64 by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastddpm.integrations.openai import (
    ModelMeanType,
    ModelVarType,
)
from tests.integrations.openai.cases import (
    BOTH,
    SHAPE,
    B,
    assert_close,
    build,
    each,
    state,
)


@pytest.mark.parametrize(("mean_type", "var_type"), BOTH)
@pytest.mark.parametrize("clip", [True, False])
def test_p_sample_matches_hand_for_a_timestep_per_sample(
    mean_type: ModelMeanType, var_type: ModelVarType, clip: bool
) -> None:
    diffusion, net, hand = build(mean_type, var_type)
    x, t, z = state(1), torch.tensor([0, 9, 4, 1]), state(2, 1.0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: z)
        out = diffusion.p_sample(net, x, t, clip_denoised=clip)
    # Without the clamp, x_0 at t = T - 1 is the small difference of numbers 40 times larger.
    assert_close(out["sample"], each(hand.p, net, x, t, z, clip=clip), 1e-6 if clip else 4e-5)
    expected = each(lambda *part: hand.read(*part, clip)[0], net, x, t)
    assert_close(out["pred_xstart"], expected, 1e-4)


@pytest.mark.parametrize(("mean_type", "var_type"), BOTH)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_sample_matches_hand(mean_type: ModelMeanType, var_type: ModelVarType, eta: float) -> None:
    diffusion, net, hand = build(mean_type, var_type)
    x, t, z = state(1), torch.tensor([0, 9, 4, 1]), state(2, 1.0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: z)
        out = diffusion.ddim_sample(net, x, t, eta=eta)
    # With eta = 1, 1 - bar_prev - sigma^2 cancels in the original's float32: at t = 9 its root 0.031 is off by up to
    # 3e-7 / (2 * 0.031), and which way depends on the processor's square root.
    assert_close(out["sample"], each(hand.ddim, net, x, t, z, eta=eta), 1e-6 if eta < 1 else 1.5e-5)


@pytest.mark.parametrize(("mean_type", "var_type"), BOTH)
def test_ddim_reverse_sample_matches_hand_and_draws_nothing(mean_type: ModelMeanType, var_type: ModelVarType) -> None:
    diffusion, net, hand = build(mean_type, var_type)
    x, t, before = state(1), torch.tensor([0, 9, 4, 1]), torch.get_rng_state()
    with torch.no_grad():
        out = diffusion.ddim_reverse_sample(net, x, t)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(out["sample"], each(hand.invert, net, x, t), 2e-6)
    with pytest.raises(AssertionError, match=r"eta must be 0, got 0\.5"):
        diffusion.ddim_reverse_sample(net, x, t, eta=0.5)


@pytest.mark.parametrize(("mean_type", "var_type"), BOTH)
def test_rows_and_the_originals_arithmetic_agree(mean_type: ModelMeanType, var_type: ModelVarType) -> None:
    diffusion, net, _ = build(mean_type, var_type)
    x, t = state(1), torch.tensor([0, 9, 4, 1])
    for method, options in ((diffusion.p_sample, {}), (diffusion.ddim_sample, {"eta": 0.5})):
        results = []
        for denoised_fn in (None, lambda x_0: x_0):
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(method(net, x, t, denoised_fn=denoised_fn, **options)["sample"])
        assert_close(results[0], results[1].double(), 1e-6)


@pytest.mark.parametrize("v", [-1.0, -0.3, 0.5, 1.0])
def test_learned_range_interpolates_the_log_variance(v: float) -> None:
    diffusion, _, hand = build(ModelMeanType.START_X, ModelVarType.LEARNED_RANGE)
    output = torch.cat([torch.zeros(SHAPE), torch.full(SHAPE, v)], dim=1)
    small = 1 / hand.precision(5)
    std = math.exp(0.5 * ((v + 1) / 2 * math.log(hand.beta[5]) + (1 - (v + 1) / 2) * math.log(small)))
    torch.manual_seed(0)
    sample = diffusion.p_sample(lambda x, t: output, torch.zeros(SHAPE), torch.full((B,), 5))["sample"]
    torch.manual_seed(0)
    assert_close(sample, std * torch.randn(SHAPE).double())


def test_denoised_fn_is_applied_before_the_clamp() -> None:
    diffusion, net, hand = build()
    x, t, z = state(1), torch.tensor([3, 3, 9, 1]), state(2, 1.0)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: z)
        out = diffusion.p_sample(net, x, t, denoised_fn=lambda x_0: x_0 + 0.4)
    assert_close(out["sample"], each(hand.p, net, x, t, z, denoised_fn=lambda x_0: x_0 + 0.4))
    assert float(out["pred_xstart"].max()) == 1.0


def test_cond_fn_shifts_the_mean_by_variance_times_gradient() -> None:
    diffusion, net, hand = build(var_type=ModelVarType.FIXED_LARGE, rescale_timesteps=True)
    x, t, y = state(1), torch.tensor([0, 9, 4, 1]), torch.tensor([0, 1, 2, 3])
    seen: list[Tensor] = []

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t)
        return -x * y.view(-1, 1, 1, 1)

    results = []
    for cond_fn in (None, gradient):
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(diffusion.p_sample(net, x, t, cond_fn=cond_fn, model_kwargs={"y": y})["sample"].double())
    variance = torch.tensor([math.exp(hand.log_variance(i, None)) for i in t.tolist()]).view(-1, 1, 1, 1)
    assert_close(results[1] - results[0], variance * -x.double() * y.view(-1, 1, 1, 1), 1e-5)
    assert seen[0].tolist() == [0.0, 900.0, 400.0, 100.0]


def test_cond_fn_in_ddim_shifts_eps_by_the_scaled_gradient() -> None:
    diffusion, net, hand = build()
    x, t = 0.3 * state(1), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        out = diffusion.ddim_sample(net, x, t, clip_denoised=False, cond_fn=lambda x, t: 0.2 * x)
        outputs = net(x.double(), t)
    for k, i in enumerate(t.tolist()):
        eps = outputs[k] - math.sqrt(1 - hand.bar[i + 1]) * 0.2 * x[k].double()
        assert_close(out["sample"][k], hand.ddim(eps, x[k].double(), i, torch.zeros(()), 0.0, clip=False), 2e-6)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_other_dtypes_promote_as_in_the_original(dtype: torch.dtype, expected: torch.dtype) -> None:
    diffusion, net, hand = build()
    x, t = state(1).to(dtype), torch.tensor([9, 4, 2, 1])
    z = torch.zeros(SHAPE, dtype=dtype)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: z)
        out = diffusion.p_sample(net, x, t)
    assert out["sample"].dtype == expected
    assert_close(out["sample"], each(hand.p, net, x, t, z), 1e-6 if dtype == torch.float64 else 3e-3)


def test_p_sample_of_channels_last_draws_like_x() -> None:
    diffusion, net, hand = build()
    x, t = state(1).to(memory_format=torch.channels_last), torch.tensor([9, 4, 2, 1])
    torch.manual_seed(2)
    with torch.no_grad():
        sample = diffusion.p_sample(net, x, t)["sample"]
    torch.manual_seed(2)
    # What randn_like gives depends on the memory format of its argument.
    assert_close(sample, each(hand.p, net, x, t, torch.randn_like(x)))
    torch.manual_seed(2)
    contiguous = torch.randn_like(x.contiguous())
    torch.manual_seed(2)
    assert not torch.equal(torch.randn_like(x), contiguous)


def test_p_sample_stays_differentiable_outside_no_grad() -> None:
    diffusion, net, _ = build(ModelMeanType.START_X)
    x = (0.1 * state(1)).requires_grad_()
    diffusion.p_sample(net, x, torch.full((B,), 5))["sample"].sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0
    assert float(net.weight.grad.abs().max()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["p_sample", "ddim_sample", "training_losses"])
def test_methods_trace_into_one_graph(name: str) -> None:
    diffusion, _, _ = build()
    x, t = state(1), torch.tensor([0, 9, 4, 1])

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + 0.1 * t.view(-1, 1, 1, 1))

    def call(x: Tensor) -> Tensor:
        if name == "training_losses":
            return diffusion.training_losses(model, x, t)["loss"]
        with torch.no_grad():
            return getattr(diffusion, name)(model, x, t, **({"eta": 0.5} if name == "ddim_sample" else {}))["sample"]

    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    actual = traced(x)
    torch.manual_seed(1)
    assert_close(actual, call(x).double())
