"""Whole loops and respaced processes of the drop-in for OpenAI's packages, against float64 by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm.integrations.openai import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
    space_timesteps,
)
from tests.integrations.openai.cases import (
    BOTH,
    FIXED,
    SHAPE,
    SIZE,
    B,
    C,
    Hand,
    Net,
    T,
    assert_close,
    build,
    each,
    state,
)


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
