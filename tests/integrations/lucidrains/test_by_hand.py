"""The denoising-diffusion-pytorch drop-in, against the papers' formulas in float64 by hand, and its seeds."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import reference
from fastddpm.integrations.lucidrains import GaussianDiffusion
from fastddpm.integrations.lucidrains.tables import BUFFERS, OBJECTIVES, ddim_timesteps
from fastddpm.schedules.schedule import Schedule
from tests.integrations.lucidrains.cases import (
    PREDICTION,
    SIZE,
    Net,
    images,
    options,
    relative,
)

pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")


def test_sigmoid_schedule_has_the_known_alpha_bars() -> None:
    bar = GaussianDiffusion(Net(), image_size=SIZE).state_dict()["alphas_cumprod"]
    for t, expected in ((0, 0.9996997), (500, 0.4983428), (999, 3.003e-7)):
        assert float(bar[t]) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_matches_the_papers_form_in_float64(objective: str) -> None:
    diffusion = GaussianDiffusion(Net().double(), **options(objective=objective, beta_schedule="cosine"))
    schedule = Schedule.cosine(50)
    x, z = torch.randn(2, 4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = GaussianDiffusion(Net(), **options(objective=objective, beta_schedule="cosine"))
    for t in (49, 25, 1, 0):
        with torch.no_grad():
            output = diffusion.model(x, torch.full((4,), t))
        expected = reference.p_sample(x, output, t, schedule, z, prediction_type=PREDICTION[objective])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: z.to(x.dtype))
            actual, _ = fast.p_sample(x.float(), t)
        # float32 tables and states against float64: x_0 is ill-conditioned at t = T - 1, where |a| = 1e4.
        assert relative(actual.double(), expected) <= 5e-4, t


def test_losses_are_the_weighted_errors_by_hand() -> None:
    weights = {"pred_noise": lambda snr: 1.0, "pred_x0": lambda snr: snr, "pred_v": lambda snr: snr / (snr + 1)}
    x_0, eps = images(1, batch=1).double() * 2 - 1, torch.randn(1, 3, SIZE, SIZE).double()
    for objective in OBJECTIVES:
        diffusion = GaussianDiffusion(Net().double(), **options(objective=objective, beta_schedule="cosine"))
        bar = float(Schedule.cosine(50).alphas_cumprod[20])
        x_t = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * eps
        v = math.sqrt(bar) * eps - math.sqrt(1 - bar) * x_0
        target = {"pred_noise": eps, "pred_x0": x_0, "pred_v": v}[objective]
        t = torch.tensor([20])
        with torch.no_grad():
            expected = weights[objective](bar / (1 - bar)) * (diffusion.model(x_t, t) - target).square().mean()
            loss = diffusion.p_losses(x_0, t, noise=eps)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_ddim_timesteps_truncate_towards_zero() -> None:
    assert ddim_timesteps(1000, 10) == [*range(999, -1, -100), -1]
    assert ddim_timesteps(1000, 3) == [999, 665, 332, -1]


def test_ddim_with_eta_zero_walks_to_the_clipped_x0() -> None:
    diffusion = GaussianDiffusion(Net(), **options(sampling_timesteps=1, auto_normalize=False, objective="pred_x0"))
    torch.manual_seed(0)
    x_T = torch.randn(2, 3, SIZE, SIZE)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(diffusion.sample(2), diffusion.model(x_T, torch.tensor([49, 49])).clamp(-1, 1))


@pytest.mark.parametrize("changes", [{}, {"sampling_timesteps": 10, "ddim_sampling_eta": 0.5}], ids=["ddpm", "ddim"])
def test_seeds_give_the_same_images_in_any_batch(changes: dict[str, Any]) -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(**changes))
    state = torch.get_rng_state()
    batch = diffusion.sample(seeds=[3, 2**64 - 1, 3])
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])
    assert torch.allclose(diffusion.sample(seeds=[2**64 - 1])[0], batch[1], atol=1e-5)
    ids = diffusion.sample(seed=3, sample_ids=[0, 5])
    assert torch.allclose(ids[0], batch[0], atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_p_sample_with_seeds_continues_a_seeded_run() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(auto_normalize=False))
    states = diffusion.sample(seeds=[1, 2], return_all_timesteps=True)
    x = states[:, 40]
    for t in range(9, -1, -1):
        x, x_start = diffusion.p_sample(x, t, seeds=[1, 2])
    assert torch.equal(x, states[:, -1])
    assert torch.equal(x_start, x.clamp(-1, 1))


def test_seed_arguments_that_contradict_each_other_are_refused() -> None:
    diffusion = GaussianDiffusion(Net(), **options())
    for call, message in (
        ({"seeds": [1], "seed": 2}, "seed"),
        ({"sample_ids": [1]}, "pass seed="),
        ({"batch_size": 3, "seeds": [1, 2]}, "batch of 3|2"),
        ({"seeds": [-1]}, "-1"),
        ({"seed": 1, "sample_ids": [2**32]}, str(2**32)),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion.sample(**call)


def test_options_and_buffers_changed_later_are_noticed() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(beta_schedule="cosine"))
    first = diffusion.sample(seeds=[1])
    diffusion.is_ddim_sampling, diffusion.sampling_timesteps = True, 5
    assert not torch.equal(diffusion.sample(seeds=[1]), first)
    diffusion.is_ddim_sampling = False
    assert torch.equal(diffusion.sample(seeds=[1]), first)
    other = GaussianDiffusion(diffusion.model, **options(beta_schedule="sigmoid"))
    diffusion.load_state_dict(other.state_dict())
    assert torch.equal(diffusion.sample(seeds=[1]), other.sample(seeds=[1]))
    with torch.no_grad():
        diffusion.model.weight.mul_(0.5)
    assert not torch.equal(diffusion.sample(seeds=[1]), first)


def test_copies_and_pickles_sample_the_same_after_a_run() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options())
    expected = diffusion.sample(seeds=[1])
    for twin in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert torch.equal(twin.sample(seeds=[1]), expected)
        assert set(twin.state_dict()) == {"model.weight", *BUFFERS}


def test_a_subclass_that_replaces_a_part_of_the_step_is_obeyed() -> None:
    class Still(GaussianDiffusion):
        def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x_start, torch.zeros(1), torch.full((1,), -1e9)

    diffusion = Still(Net().eval(), **options(auto_normalize=False))
    states = diffusion.sample(1, return_all_timesteps=True)
    for i in (0, 30):
        with torch.no_grad():
            output = diffusion.model(states[:, i], torch.tensor([49 - i]))
        x_start = diffusion.predict_start_from_v(states[:, i], torch.tensor([49 - i]), output).clamp(-1, 1)
        assert torch.equal(states[:, i + 1], x_start)


def test_sampling_is_possible_after_training_steps_and_before() -> None:
    diffusion = GaussianDiffusion(Net(), **options())
    diffusion.sample(1, seeds=[1])
    loss = diffusion(images())
    loss.backward()
    assert float(diffusion.model.weight.grad.abs().max()) > 0


def test_a_model_that_raises_keeps_its_exception() -> None:
    class Broken(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        GaussianDiffusion(Broken(), **options()).sample(1)


@pytest.mark.parametrize("name", ["p_sample", "forward"])
def test_methods_trace_into_one_graph(name: str) -> None:
    diffusion = GaussianDiffusion(Net(), **options())

    def call(x: Tensor) -> Tensor:
        return diffusion(x) if name == "forward" else diffusion.p_sample(x, 7)[0]

    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    actual = traced(images())
    torch.manual_seed(1)
    assert torch.allclose(actual, call(images()), atol=1e-6)
