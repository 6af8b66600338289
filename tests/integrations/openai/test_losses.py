"""Training losses and the bound of the drop-in for OpenAI's packages, against float64 by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastddpm.integrations.openai import (
    LossType,
    ModelMeanType,
    ModelVarType,
)
from fastddpm.integrations.openai.losses import discretized_gaussian_log_likelihood
from tests.integrations.openai.cases import (
    BOTH,
    FIXED,
    SHAPE,
    B,
    C,
    Hand,
    Net,
    T,
    assert_close,
    build,
    state,
)


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
