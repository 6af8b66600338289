"""The improved-diffusion and guided-diffusion drop-in, against the papers' formulas in float64 by hand."""

from __future__ import annotations

import enum
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.integrations.openai.diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    accelerate,
    get_named_beta_schedule,
    space_timesteps,
)
from fastddpm.integrations.openai.losses import discretized_gaussian_log_likelihood

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The tensors are too small to share.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


# Tables, enums and spacing.


def test_linear_tables_have_the_known_values() -> None:
    diffusion, _, _ = build(ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, steps=1000)
    for t, expected in ((0, 0.9999), (500, 0.077797), (999, 4.0358e-5)):
        assert diffusion.alphas_cumprod[t] == pytest.approx(expected, rel=2e-5)
    # Known: the log of beta_tilde at t = 1 stands in at t = 0, as its variance does for FIXED_LARGE.
    assert diffusion.posterior_log_variance_clipped[0] == pytest.approx(-9.8167, abs=1e-4)
    net, x = Net().eval(), state()
    out = diffusion.p_mean_variance(net, x, torch.tensor([0, 1, 2, 999]))
    expected = [math.exp(-9.8167), *(float(diffusion.betas[t]) for t in (1, 2, 999))]
    for i, variance in enumerate(expected):
        assert out["variance"][i].unique().tolist() == pytest.approx([variance], rel=1e-4)


# A linear schedule of fewer than 20 steps has betas above 1.
@pytest.mark.parametrize(("name", "steps"), [*itertools.product(["linear", "cosine"], [25, 1000, 4000]), ("cosine", 2)])
def test_tables_agree_with_bayes_rule(name: str, steps: int) -> None:
    betas = get_named_beta_schedule(name, steps)
    hand = Hand(betas, ModelMeanType.EPSILON, ModelVarType.FIXED_SMALL)
    diffusion = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_SMALL,
        loss_type=LossType.MSE,
    )
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for i in {0, 1, steps // 2, steps - 1}:
        assert diffusion.posterior_mean_coef1[i] == pytest.approx(float(hand.posterior(one, zero, i)), rel=1e-9)
        assert diffusion.posterior_mean_coef2[i] == pytest.approx(float(hand.posterior(zero, one, i)), rel=1e-9)
        assert diffusion.posterior_log_variance_clipped[i] == pytest.approx(hand.log_variance(i, None), rel=1e-9)
        assert diffusion.alphas_cumprod_next[i] == pytest.approx([*hand.bar, 0.0][i + 2], rel=1e-12)
    for name in ("betas", "sqrt_recipm1_alphas_cumprod", "posterior_variance"):
        table = getattr(diffusion, name)
        assert isinstance(table, np.ndarray)
        assert table.dtype == np.float64
        assert table.shape == (steps,)


def test_space_timesteps_accumulates_for_every_count() -> None:
    for count in range(2, 1001):
        position, expected = 0.0, set()
        for _ in range(count):
            expected.add(round(position))
            position += 999 / (count - 1)
        assert space_timesteps(1000, [count]) == expected
    assert space_timesteps(1000, "1000") == expected


def test_space_timesteps_keeps_sections_and_strides() -> None:
    assert space_timesteps(1000, "ddim250") == set(range(0, 1000, 4))
    kept = space_timesteps(300, [10, 15, 20])
    assert [sum(start <= t < start + 100 for t in kept) for start in (0, 100, 200)] == [10, 15, 20]
    for counts in ("ddim299", [301], "ddimx"):
        with pytest.raises(ValueError):  # noqa: PT011
            space_timesteps(300, counts)


def test_enums_have_the_originals_members_and_values() -> None:
    assert [(m.name, m.value) for m in ModelMeanType] == [("PREVIOUS_X", 1), ("START_X", 2), ("EPSILON", 3)]
    names = ["LEARNED", "FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"]
    assert [(m.name, m.value) for m in ModelVarType] == list(zip(names, range(1, 5), strict=True))
    assert [(m.name, m.is_vb()) for m in LossType] == [
        ("MSE", False),
        ("RESCALED_MSE", False),
        ("KL", True),
        ("RESCALED_KL", True),
    ]


# One step.


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


# Whole loops.


@pytest.mark.parametrize(("mean_type", "var_type"), [BOTH[0], BOTH[5], BOTH[11], (ModelMeanType.EPSILON, FIXED[1])])
@pytest.mark.parametrize("eta", [None, 0.0, 0.6])
def test_loops_match_hand_with_the_originals_draws(
    mean_type: ModelMeanType, var_type: ModelVarType, eta: float | None
) -> None:
    diffusion, net, hand = build(mean_type, var_type)
    torch.manual_seed(4)
    x = torch.randn(SHAPE).double()
    for i in reversed(range(T)):
        # One more draw than steps: z is drawn at t = 0 too, and for DDIM without noise.
        z, t = torch.randn(SHAPE), torch.full((B,), i)
        x = each(hand.p, net, x, t, z) if eta is None else each(hand.ddim, net, x, t, z, eta=eta)
    expected_state = torch.get_rng_state()
    name = "p_sample_loop" if eta is None else "ddim_sample_loop"
    options = {} if eta is None else {"eta": eta}
    torch.manual_seed(4)
    whole = getattr(diffusion, name)(net, SHAPE, **options)
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert_close(whole, x, 2e-5)
    torch.manual_seed(4)
    steps = list(getattr(diffusion, f"{name}_progressive")(net, list(SHAPE), **options))
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert len(steps) == T
    assert_close(steps[-1]["sample"], whole.double(), 1e-6)
    assert set(steps[0]) == {"sample", "pred_xstart"}


def test_a_1000_step_loop_matches_the_papers_form() -> None:
    diffusion, net, hand = build(steps=1000)
    shape = (1, C, SIZE, SIZE)
    torch.manual_seed(4)
    x = torch.randn(shape).double()
    for i in reversed(range(1000)):
        z = torch.randn(shape)
        x = each(hand.p, net, x, torch.tensor([i]), z)
    torch.manual_seed(4)
    assert float((diffusion.p_sample_loop(net, shape).double() - x).abs().max()) <= 1e-4


def test_loop_takes_the_callers_noise_labels_and_closures() -> None:
    diffusion, net, _ = build()
    noise, y = state(5, 1.0), torch.tensor([0, 1, 2, 3])
    results = []
    for model in (net, lambda x, t, y: net(x, t, y)):
        torch.manual_seed(1)
        results.append(
            diffusion.p_sample_loop(model, SHAPE, noise=noise, model_kwargs={"y": y}, device="cpu", progress=True)
        )
    assert_close(results[0], results[1].double())
    torch.manual_seed(1)
    unlabelled = diffusion.p_sample_loop(net, SHAPE, noise=noise)
    assert float((unlabelled - results[0])[1:].abs().max()) > 1e-3


def test_loop_with_active_dropout_draws_in_the_originals_order() -> None:
    diffusion, _, _ = build()
    net = Net(dropout=0.5).train()
    torch.manual_seed(4)
    x = torch.randn(SHAPE)
    for i in reversed(range(T)):
        with torch.no_grad():
            out = diffusion.p_mean_variance(net, x, torch.full((B,), i))
            z = torch.randn(SHAPE)
        x = out["mean"] + (i > 0) * (0.5 * out["log_variance"]).exp() * z
    torch.manual_seed(4)
    assert_close(diffusion.p_sample_loop(net, SHAPE), x.double())


@pytest.mark.parametrize("name", ["p_sample_loop", "ddim_sample_loop"])
def test_seeds_give_the_same_samples_in_any_batch(name: str) -> None:
    diffusion, net, _ = build()
    options = {} if name == "p_sample_loop" else {"eta": 0.7}
    loop, before = getattr(diffusion, name), torch.get_rng_state()
    batch = loop(net, (3, *SHAPE[1:]), seeds=[5, 2**64 - 1, 5], **options)
    assert torch.equal(batch[0], batch[2])
    alone = loop(net, (1, *SHAPE[1:]), seed=2**64 - 1, sample_ids=[0], **options)
    assert_close(alone, batch[1:2].double())
    assert float((batch[0] - batch[1]).abs().max()) > 1e-2
    *_, last = getattr(diffusion, f"{name}_progressive")(net, (3, *SHAPE[1:]), seeds=[5, 2**64 - 1, 5], **options)
    assert_close(last["sample"], batch.double())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="3"):
        loop(net, (3, *SHAPE[1:]), seeds=[1, 2])


def test_a_subclass_that_replaces_a_method_is_obeyed() -> None:
    class Halved(GaussianDiffusion):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_mean_variance(*args, **kwargs)
            return {**out, "mean": 0.5 * out["mean"]}

    class Counting(GaussianDiffusion):
        calls = 0

        def p_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            self.calls += 1
            return super().p_sample(*args, **kwargs)

    plain, net, _ = build()
    options = {"betas": plain.betas, "model_mean_type": plain.model_mean_type}
    options |= {"model_var_type": plain.model_var_type, "loss_type": plain.loss_type}
    halved, counting, x, t = Halved(**options), Counting(**options), state(1), torch.zeros(B, dtype=torch.int64)
    with torch.no_grad():
        assert_close(halved.p_sample(net, x, t)["sample"], 0.5 * plain.p_sample(net, x, t)["sample"].double())
    counting.p_sample_loop(net, SHAPE)
    assert counting.calls == T


def test_a_model_that_raises_keeps_its_exception() -> None:
    class Broken(Net):
        def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
            raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        build()[0].p_sample_loop(Broken(), SHAPE)


# Respacing.


@pytest.mark.parametrize("rescale", [False, True])
def test_spaced_diffusion_is_the_process_of_the_kept_alpha_bars(rescale: bool) -> None:
    betas = get_named_beta_schedule("linear", 500)
    kept = space_timesteps(500, [5, 3])
    options = {"model_mean_type": ModelMeanType.EPSILON, "model_var_type": ModelVarType.LEARNED_RANGE}
    diffusion = SpacedDiffusion(
        kept, betas=betas, loss_type=LossType.RESCALED_MSE, rescale_timesteps=rescale, **options
    )
    assert diffusion.timestep_map == sorted(kept)
    assert diffusion.num_timesteps == 8
    bar = np.cumprod(1 - betas)[sorted(kept)]
    assert diffusion.alphas_cumprod == pytest.approx(bar, rel=1e-12)
    hand = Hand(diffusion.betas, **{name.removeprefix("model_"): value for name, value in options.items()})
    net = Net(ModelVarType.LEARNED_RANGE).eval()
    given = [t * 1000 / 500 if rescale else t for t in sorted(kept, reverse=True)]
    torch.manual_seed(4)
    x = torch.randn(SHAPE).double()
    for i, t in zip(reversed(range(8)), given, strict=True):
        z = torch.randn(SHAPE)
        with torch.no_grad():
            output = net(x, torch.full((B,), t))
        x = torch.stack([hand.p(*part[:2], i, part[2]) for part in zip(output, x, z.double(), strict=True)])
    net.seen.clear()
    torch.manual_seed(4)
    assert_close(diffusion.p_sample_loop(net, SHAPE), x, 2e-5)
    assert [t.unique().item() for t in net.seen] == given
    assert {t.dtype for t in net.seen} == {torch.float32 if rescale else torch.int64}
    net.seen.clear()
    diffusion.training_losses(net, state(1), torch.tensor([0, 7, 3, 1]))
    assert net.seen[0].tolist() == [given[::-1][i] for i in (0, 7, 3, 1)]


def test_spaced_diffusion_refuses_timesteps_outside_the_process() -> None:
    for use in ([], [-1, 3], [3, 10]):
        with pytest.raises(ValueError, match=r"0\.\.9"):
            SpacedDiffusion(
                use,
                betas=get_named_beta_schedule("cosine", 10),
                model_mean_type=ModelMeanType.EPSILON,
                model_var_type=ModelVarType.FIXED_SMALL,
                loss_type=LossType.MSE,
            )


# Losses.


def exact_bound(hand: Hand, output: Tensor, x_0: Tensor, x_t: Tensor, i: int) -> float:
    """The term of the variational bound in bits per dimension, with torch.distributions in float64."""
    _, mean, log_variance = hand.read(output, x_t, i, clip=False)
    std = torch.exp(0.5 * torch.as_tensor(log_variance, dtype=torch.float64))
    model = torch.distributions.Normal(mean, std.expand(mean.shape))
    if i > 0:
        true = torch.distributions.Normal(hand.posterior(x_0, x_t, i), math.sqrt(1 / hand.precision(i)))
        return float(torch.distributions.kl_divergence(true, model).mean()) / math.log(2)
    upper = torch.where(x_0 > 0.999, 1.0, model.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, model.cdf(x_0 - 1 / 255))
    return float(-(upper - lower).clamp(min=1e-12).log().mean()) / math.log(2)


class Nearly(nn.Module):
    """Returns the true target with an error of at most 0.05, so that no likelihood lies in a far tail."""

    def __init__(self, net: Net, hand: Hand, x_0: Tensor, eps: Tensor) -> None:
        super().__init__()
        self.net, self.hand, self.x_0, self.eps = net, hand, x_0.double(), eps.double()

    def target(self, k: int, i: int) -> tuple[Tensor, Tensor]:
        """Return x_t and what the network should say of sample k at timestep i."""
        x_0, eps, bar = self.x_0[k], self.eps[k], self.hand.bar[i + 1]
        x_t = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * eps
        mean_type = self.hand.mean_type
        if mean_type is ModelMeanType.PREVIOUS_X:
            return x_t, self.hand.posterior(x_0, x_t, i)
        return x_t, eps if mean_type is ModelMeanType.EPSILON else x_0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output = 0.05 * self.net(x, t)
        truth = torch.stack([self.target(k, i)[1] for k, i in enumerate(t.tolist())])
        return torch.cat([output[:, :C] + truth.to(x.dtype), output[:, C:]], dim=1)


@pytest.mark.parametrize("loss_type", list(LossType))
@pytest.mark.parametrize(("mean_type", "var_type"), BOTH)
def test_training_losses_match_hand(loss_type: LossType, mean_type: ModelMeanType, var_type: ModelVarType) -> None:
    diffusion, net, hand = build(mean_type, var_type, loss_type)
    x_0, eps, t = state(1, 0.3).clamp(-1, 1), state(2, 1.0), torch.tensor([0, 9, 4, 1])
    model = Nearly(net, hand, x_0, eps)
    with torch.no_grad():
        losses = diffusion.training_losses(model, x_0, t, noise=eps)
        truths = [model.target(k, i) for k, i in enumerate(t.tolist())]
        outputs = model(torch.stack([x_t for x_t, _ in truths]), t)
    for k, (i, (x_t, target), output) in enumerate(zip(t.tolist(), truths, outputs, strict=True)):
        bound = exact_bound(hand, output, x_0[k].double(), x_t, i)
        # The originals approximate the normal distribution function by a tanh: only t = 0 feels it.
        tolerance = {"rel": 1e-2 if i == 0 else 2e-3, "abs": 1e-6}
        if loss_type.is_vb():
            expected = bound * (T if loss_type is LossType.RESCALED_KL else 1)
            assert set(losses) == {"loss"}
            assert float(losses["loss"][k]) == pytest.approx(expected, **tolerance)
            continue
        assert float(losses["mse"][k]) == pytest.approx(float((target - output[:C]).square().mean()), rel=1e-3)
        if var_type in FIXED:
            assert torch.equal(losses["loss"], losses["mse"])
        else:
            scale = T / 1000 if loss_type is LossType.RESCALED_MSE else 1
            assert float(losses["vb"][k]) == pytest.approx(scale * bound, **tolerance)
            assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


def test_the_bound_trains_only_the_variance_in_the_mse_losses() -> None:
    diffusion, net, _ = build(ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE, LossType.RESCALED_MSE)
    losses = diffusion.training_losses(net, state(1, 0.3).clamp(-1, 1), torch.tensor([1, 9, 4, 2]))
    losses["vb"].sum().backward()
    assert net.weight.grad is not None
    assert float(net.weight.grad[:C].abs().max()) == 0.0
    assert float(net.weight.grad[C:].abs().max()) > 0.0


def test_bins_of_the_discretised_likelihood_sum_to_one() -> None:
    bins = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).clamp(-1, 1)
    for mean, log_scale in ((0.0, -1.0), (0.9, -3.0), (-1.2, 0.0)):
        total = discretized_gaussian_log_likelihood(bins, torch.tensor(mean), torch.tensor(log_scale)).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_calc_bpd_loop_sums_the_terms_of_every_timestep() -> None:
    diffusion, net, hand = build(ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE, LossType.KL)
    x_0 = state(1, 0.3).clamp(-1, 1)
    torch.manual_seed(3)
    terms = diffusion.calc_bpd_loop(net, x_0, clip_denoised=False)
    assert terms["vb"].shape == terms["mse"].shape == terms["xstart_mse"].shape == (B, T)
    torch.manual_seed(3)
    for k, i in enumerate(reversed(range(T))):
        noise, t = torch.randn(SHAPE), torch.full((B,), i)
        x_t = math.sqrt(hand.bar[i + 1]) * x_0.double() + math.sqrt(1 - hand.bar[i + 1]) * noise.double()
        with torch.no_grad():
            output = net(x_t, t)
        expected = [exact_bound(hand, *part, i) for part in zip(output, x_0.double(), x_t, strict=True)]
        assert terms["vb"][:, k].tolist() == pytest.approx(expected, rel=2e-2 if i == 0 else 2e-3, abs=1e-5)
        mse = (output[:, :C] - noise).square().mean(dim=(1, 2, 3))
        assert terms["mse"][:, k].tolist() == pytest.approx(mse.tolist(), rel=1e-3)
    bar = hand.bar[-1]
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(math.sqrt(bar) * x_0.double(), math.sqrt(1 - bar)), torch.distributions.Normal(0, 1)
    )
    assert terms["prior_bpd"].tolist() == pytest.approx(
        (prior.mean(dim=(1, 2, 3)) / math.log(2)).tolist(), rel=1e-3, abs=1e-7
    )
    assert torch.allclose(terms["total_bpd"], terms["vb"].sum(dim=1) + terms["prior_bpd"])


def test_q_methods_match_hand() -> None:
    diffusion, _, hand = build()
    x_0, eps, t = state(1), state(2), torch.tensor([0, 9, 4, 1])
    mean, variance, log_variance = diffusion.q_mean_variance(x_0, t)
    posterior, beta_tilde, log_beta_tilde = diffusion.q_posterior_mean_variance(x_0, eps, t)
    x_t = diffusion.q_sample(x_0, t, noise=eps)
    for k, i in enumerate(t.tolist()):
        bar = hand.bar[i + 1]
        assert_close(mean[k], math.sqrt(bar) * x_0[k].double())
        assert_close(x_t[k], math.sqrt(bar) * x_0[k].double() + math.sqrt(1 - bar) * eps[k].double())
        assert_close(variance[k], torch.full(SHAPE[1:], 1 - bar).double())
        assert_close(log_variance[k], torch.full(SHAPE[1:], math.log(1 - bar)).double())
        assert_close(posterior[k], hand.posterior(x_0[k].double(), eps[k].double(), i))
        assert_close(log_beta_tilde[k], torch.full(SHAPE[1:], hand.log_variance(i, None)).double())
        assert float(beta_tilde[k].max()) == pytest.approx(0.0 if i == 0 else 1 / hand.precision(i), rel=1e-6)
    assert beta_tilde.shape == log_variance.shape == SHAPE
    torch.manual_seed(0)
    drawn = diffusion.q_sample(x_0, t)
    torch.manual_seed(0)
    assert torch.equal(drawn, diffusion.q_sample(x_0, t, noise=torch.randn(SHAPE)))


# Construction, errors and live instances.


def test_bad_input_raises_what_the_original_raises() -> None:
    good: dict[str, Any] = {
        "betas": get_named_beta_schedule("cosine", 10),
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
    }
    for bad in ([0.1, 0.0], [0.1, 1.1], [[0.1]], [], [float("nan")]):
        with pytest.raises(AssertionError, match="betas"):
            GaussianDiffusion(**{**good, "betas": bad})
    with pytest.raises(TypeError, match=r"ModelMeanType.*got 'epsilon'"):
        GaussianDiffusion(**{**good, "model_mean_type": "epsilon"})
    with pytest.raises(NotImplementedError, match="unknown beta schedule: quadratic"):
        get_named_beta_schedule("quadratic", 10)
    diffusion, net = GaussianDiffusion(**good), Net()
    with pytest.raises(AssertionError, match=r"t must have shape \[4\]"):
        diffusion.p_sample(net, state(), torch.tensor([1]))
    with pytest.raises(AssertionError, match=r"expected \(4, 3, 4, 4\)"):
        diffusion.p_sample(Net(ModelVarType.LEARNED), state(), torch.full((B,), 1))
    with pytest.raises(AssertionError, match="shape must be a tuple or a list"):
        next(iter(diffusion.p_sample_loop_progressive(net, np.array(SHAPE))))
    with pytest.raises(AttributeError, match="betas is fixed"):
        diffusion.betas = good["betas"]
    with pytest.raises(ValueError, match="read-only"):
        diffusion.betas[0] = 0.5


def test_a_last_beta_of_one_works_for_x0_prediction() -> None:
    betas = [0.1, 0.5, 1.0]
    diffusion = GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
    )
    assert bool(diffusion.p_sample_loop(Net().eval(), SHAPE).isfinite().all())


def test_single_step_process_returns_the_estimate() -> None:
    diffusion, net, _ = build(ModelMeanType.START_X, steps=1)
    torch.manual_seed(0)
    x_T = torch.randn(SHAPE)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(diffusion.p_sample_loop(net, SHAPE), net(x_T, torch.zeros(B)).clamp(-1, 1))


def test_pickles_after_a_run_sample_the_same() -> None:
    diffusion, net, _ = build()
    expected = diffusion.p_sample_loop(net, SHAPE, seeds=[1, 2, 3, 4])
    twin = pickle.loads(pickle.dumps(diffusion))
    assert torch.equal(twin.p_sample_loop(net, SHAPE, seeds=[1, 2, 3, 4]), expected)


def test_weights_changed_between_runs_are_noticed() -> None:
    diffusion, net, _ = build()
    first = diffusion.p_sample_loop(net, SHAPE, seeds=[1, 2, 3, 4])
    with torch.no_grad():
        net.weight.mul_(0.5)
    changed = diffusion.p_sample_loop(net, SHAPE, seeds=[1, 2, 3, 4])
    assert not torch.equal(changed, first)
    fresh, _, _ = build()
    assert torch.equal(changed, fresh.p_sample_loop(net, SHAPE, seeds=[1, 2, 3, 4]))


def stand_in(source: GaussianDiffusion, module: str) -> Any:
    """An object as OpenAI's packages make it: same class name, attributes and foreign enums."""
    attributes = {
        name: getattr(source, name)
        for name in ("betas", "rescale_timesteps", "timestep_map", "original_num_steps")
        if hasattr(source, name)
    }
    for name, kind in (("model_mean_type", ModelMeanType), ("model_var_type", ModelVarType), ("loss_type", LossType)):
        foreign: Any = enum.Enum(kind.__name__, [member.name for member in kind])  # type: ignore[misc]
        attributes[name] = foreign[getattr(source, name).name]
    kind = type(type(source).__name__, (), {"__module__": module})
    instance = kind()
    vars(instance).update(attributes)
    return instance


def test_accelerate_takes_over_live_instances() -> None:
    plain, net, _ = build()
    spaced = SpacedDiffusion(
        space_timesteps(100, "ddim10"),
        betas=get_named_beta_schedule("linear", 100),
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.RESCALED_KL,
        rescale_timesteps=True,
    )
    for source, module in (
        (plain, "improved_diffusion.gaussian_diffusion"),
        (spaced, "guided_diffusion.respace"),
    ):
        fast = accelerate(stand_in(source, module))
        assert type(fast) is type(source)
        assert fast.loss_type is source.loss_type
        seeds = {"seeds": [1, 2, 3, 4]}
        assert torch.equal(fast.p_sample_loop(net, SHAPE, **seeds), source.p_sample_loop(net, SHAPE, **seeds))
        assert type(fastddpm.accelerate(stand_in(source, module))) is type(source)
    assert accelerate(plain, backend="torch") is plain
    assert plain.sampler_options == {"backend": "torch"}
    with pytest.raises(TypeError, match=r"mine\.GaussianDiffusion"):
        accelerate(stand_in(plain, "mine"))
