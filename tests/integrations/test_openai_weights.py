"""OpenAI's networks as `UNet`: the same function, or refused by name; the diffusion that flags mean."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm.integrations.openai import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
)
from fastddpm.integrations.openai.tables import p_rows
from fastddpm.integrations.openai.unet_weights import OpenAIFlags, convert_unet, diffusion_of
from fastddpm.tables.ddpm import ddpm_table
from tests.integrations.openai_unet import UNetModel

FLAGS = OpenAIFlags(num_heads=2)
SOURCE = Path("model.pt")


@pytest.mark.parametrize(
    ("build", "flags"),
    [
        pytest.param({}, FLAGS, id="scale_shift"),
        pytest.param({"scale_shift": False, "blocks": 2}, FLAGS, id="additive-2-blocks"),
        pytest.param({"out": 6, "attention": ()}, FLAGS, id="learned-only-middle-attention"),
        pytest.param({"attention": (0, 1)}, OpenAIFlags(num_head_channels=16), id="head-channels-two-widths"),
        pytest.param({"attention": (0, 1)}, OpenAIFlags(num_heads=1), id="one-head-two-widths"),
        pytest.param({}, OpenAIFlags(num_heads=4, new_attention_order=True), id="new-order"),
        pytest.param({"mult": (1, 1, 2), "attention": (1, 2), "classes": 7}, OpenAIFlags(num_head_channels=8), id="y"),
        pytest.param({"channels": 1, "out": 1, "mult": (2,), "width": 32}, FLAGS, id="unlike-first-width"),
    ],
)
def test_openai_unet_computes_the_same(build: dict[str, Any], flags: OpenAIFlags) -> None:
    theirs = UNetModel(**build)
    if build.get("mult") == (2,):
        with pytest.raises(ValueError, match="time embedding of width 32 in a network whose first width is 64"):
            convert_unet(theirs.w, flags, SOURCE)
        return
    ours = convert_unet(theirs.w, flags, SOURCE).double()
    x = torch.randn(2, build.get("channels", 3), 8, 8, generator=theirs.generator, dtype=torch.float64)
    t = torch.tensor([3.0, 777.25])
    y = torch.tensor([6, 1]) if "classes" in build else None
    expected = theirs(x, t, y, flags)
    with torch.no_grad():
        actual = ours(x, t, y)
    assert float(expected.abs().max()) > 0.1
    assert float((actual - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


def test_openai_heads_are_not_guessed() -> None:
    weights = UNetModel().w
    with pytest.raises(ValueError, match="do not say how many attention heads"):
        convert_unet(weights, OpenAIFlags(), SOURCE)
    wide = UNetModel(attention=(0, 1)).w
    with pytest.raises(ValueError, match=r"num_heads = 2 at the widths \[32, 64\].*integrations\.openai"):
        convert_unet(wide, FLAGS, SOURCE)
    with pytest.raises(ValueError, match="not both"):
        convert_unet(weights, OpenAIFlags(num_heads=2, num_head_channels=8), SOURCE)
    with pytest.raises(ValueError, match="24"):
        convert_unet(weights, OpenAIFlags(num_head_channels=24), SOURCE)


def without(weights: dict[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(start)}


def test_openai_networks_of_another_build_are_refused_by_name() -> None:
    plain = UNetModel(mult=(1, 2))
    updown = dict(plain.w)
    updown |= {name.replace("output_blocks.1.0", "output_blocks.1.2"): t for name, t in plain.w.items()}
    deep = UNetModel(mult=(1, 2)).w | {"input_blocks.1.0.extra.weight": torch.zeros(1)}
    cases = [
        (updown, "resblock_updown=True"),
        (without(plain.w, "input_blocks.2."), "conv_resample=False"),
        (without(plain.w, "output_blocks."), "classifiers are not supported"),
        (UNetModel(channels=6, out=3).w, "super-resolution"),
        (UNetModel(channels=6, out=6).w, "super-resolution"),
        (without(plain.w, "output_blocks.0.1."), r"another architecture: 10 missing.*up_blocks\.0\.attentions\.0"),
        (deep, "unknown parameter 'input_blocks.1.0.extra.weight'"),
        (without(plain.w, "out.2.weight"), r"no parameter 'out\.2\.weight'"),
        (without(plain.w, "out.2.bias"), r"another architecture: 1 missing.*conv_out\.bias"),
    ]
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            convert_unet(weights, FLAGS, SOURCE)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_openai_diffusion_is_that_of_the_training_script(schedule: str) -> None:
    for learned, xstart, small in itertools.product((False, True), repeat=3):
        config = diffusion_of(
            OpenAIFlags(noise_schedule=schedule, predict_xstart=xstart, sigma_small=small), learned=learned
        )
        variance = ModelVarType.LEARNED_RANGE if learned else ModelVarType["FIXED_SMALL" if small else "FIXED_LARGE"]
        assert config.variance_type == variance.name.lower()
        mean = ModelMeanType.START_X if xstart else ModelMeanType.EPSILON
        assert_same_rows(config, range(1000), get_named_beta_schedule(schedule, 1000), mean, variance)


def assert_same_rows(
    config: Any, kept: range, betas: Any, mean: ModelMeanType, variance: ModelVarType, rescale: bool = False
) -> None:
    """Compare the library's table with the rows of the drop-in, which its own tests check by hand."""
    table = ddpm_table(config.schedule(), prediction_type=config.prediction_type, variance_type=config.variance_type)
    theirs = SpacedDiffusion(
        kept,
        betas=betas,
        model_mean_type=mean,
        model_var_type=variance,
        loss_type=LossType.MSE,
        rescale_timesteps=rescale,
    )
    rows = p_rows(theirs._tables, mean, variance).flip(0)
    # The last row adds no noise, whatever h0 and h1 say.
    assert torch.allclose(table.rows64[:-1], rows[:-1], rtol=2e-6, atol=1e-6)
    assert table.learned == (variance is ModelVarType.LEARNED_RANGE)
    given = theirs._scale_timesteps(torch.arange(len(kept))).flip(0)
    assert torch.equal(table.timesteps.float(), given.float())


def test_openai_rescaled_timesteps_become_whole_ones() -> None:
    flags = OpenAIFlags(diffusion_steps=4000, noise_schedule="cosine", rescale_timesteps=True)
    config = diffusion_of(flags, learned=True)
    assert config.num_timesteps == 1000
    variance = ModelVarType.LEARNED_RANGE
    betas = get_named_beta_schedule("cosine", 4000)
    assert_same_rows(config, range(0, 4000, 4), betas, ModelMeanType.EPSILON, variance, rescale=True)
    plain = diffusion_of(OpenAIFlags(diffusion_steps=4000, rescale_timesteps=False), learned=True)
    assert_same_rows(plain, range(4000), get_named_beta_schedule("linear", 4000), ModelMeanType.EPSILON, variance)
    with pytest.raises(ValueError, match="4000 it matters"):
        diffusion_of(OpenAIFlags(diffusion_steps=4000), learned=True)
    with pytest.raises(ValueError, match="fractions of timesteps"):
        diffusion_of(OpenAIFlags(diffusion_steps=500, rescale_timesteps=True), learned=True)
    with pytest.raises(ValueError, match="sqrt"):
        diffusion_of(OpenAIFlags(noise_schedule="sqrt"), learned=True)
