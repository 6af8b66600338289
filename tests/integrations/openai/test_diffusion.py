"""Construction, errors and live instances of the drop-in for OpenAI's packages."""

from __future__ import annotations

import enum
import pickle
from typing import Any

import numpy as np
import pytest
import torch

import fastddpm
from fastddpm.integrations.openai import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    accelerate,
    get_named_beta_schedule,
    space_timesteps,
)
from tests.integrations.openai.cases import (
    SHAPE,
    B,
    Net,
    build,
    state,
)


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
