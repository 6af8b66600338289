"""The UNet against diffusers' UNet2DModel, its shapes, its errors and its one compiled graph."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fastddpm.unet.blocks import timestep_embedding
from fastddpm.unet.unet import UNet, UNetConfig
from tests import tiny

SMALL: dict[str, Any] = {**tiny.ATTENTION, "sample_size": 16, "in_channels": 2, "out_channels": 3}

# Each variant turns one feature of UNet2DModel away from SMALL.
VARIANTS = {
    "small": {},
    "two-layers": {"layers_per_block": 2},
    "three-levels-mixed": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    },
    "one-level": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "one-head": {"attention_head_dim": None},
    "class-embedding": {"num_class_embeds": 5},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale-shift-attn-norm": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "attn-norm": {"attn_norm_num_groups": 8},
    "no-mid-attention": {"add_attention": False},
    "mid-scale": {"mid_block_scale_factor": math.sqrt(2)},
    "padding-0": {"downsample_padding": 0},
    "sin-first-shift-1": {"flip_sin_to_cos": False, "freq_shift": 1},
    "odd-embedding": {"block_out_channels": (9, 18), "norm_num_groups": 3, "attention_head_dim": 9},
    "embedding-width": {"time_embedding_dim": 20},
    "centred": {"center_input_sample": True},
    "eps-1e-3": {"norm_eps": 1e-3},
    "dropout-in-eval": {"dropout": 0.5},
    "gelu": {"act_fn": "gelu"},
    "mish": {"act_fn": "mish"},
    "relu": {"act_fn": "relu"},
}


def relative_l2(got: Tensor, want: Tensor) -> float:
    return ((got - want).double().norm() / want.double().norm()).item()


def small_unet(seed: int = 0, **changes: object) -> UNet:
    torch.manual_seed(seed)
    return UNet(UNetConfig(**{**SMALL, **changes}), zero_init=False).eval()


def random_inputs(config: UNetConfig, batch: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    size = config.sample_size
    assert isinstance(size, int)
    x = torch.randn(batch, config.in_channels, size, size, generator=generator)
    t = torch.randint(1000, (batch,), generator=generator)
    classes = config.num_class_embeds
    return x, t, torch.randint(classes, (batch,), generator=generator) if classes else None


def diffusers_model(config: UNetConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    values = {key: value for key, value in config.to_dict().items() if key != "null_class"}
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**values).eval()
    # diffusers starts norms at one and zero: move them, or an exchanged or missing norm would go unseen.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p), alpha=0.3)
    return model


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param(UNetConfig(**{**SMALL, **changes}), id=name) for name, changes in VARIANTS.items()),
        pytest.param(UNetConfig.digits(), id="digits"),
        pytest.param(UNetConfig.cifar10(), id="google/ddpm-cifar10-32"),
    ],
)
@torch.no_grad()
def test_forward_matches_diffusers(config: UNetConfig) -> None:
    theirs = diffusers_model(config)
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict())
    x, t, labels = random_inputs(config)
    assert relative_l2(ours(x, t, labels), theirs(x, t, labels).sample) < 1e-5


def test_state_dict_loads_into_diffusers() -> None:
    config = UNetConfig(**{**SMALL, "num_class_embeds": 5})
    theirs, ours = diffusers_model(config), small_unet(num_class_embeds=5)
    theirs.load_state_dict(ours.state_dict())
    x, t, labels = random_inputs(config)
    with torch.no_grad():
        assert relative_l2(theirs(x, t, labels).sample, ours(x, t, labels)) < 1e-5


def test_cifar10_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig.cifar10())
    assert sum(p.numel() for p in model.parameters()) == 35_746_307  # Ho et al. 2020, appendix B: 35.7 million


def test_digits_keeps_within_its_budget() -> None:
    with torch.device("meta"):
        model = UNet(UNetConfig.digits())
        x, t = torch.empty(1, 1, 32, 32), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(x, t)
    assert counter.get_total_flops() <= 0.25e9
    assert 2 * sum(p.numel() for p in model.parameters()) <= 6e6


def test_timestep_embedding_matches_formula_in_float64() -> None:
    t = torch.tensor([0.0, 1.0, 499.5, 999.0])
    got = timestep_embedding(t, 7, flip_sin_to_cos=False, freq_shift=1)
    angle = t.double()[:, None] * torch.tensor([10_000.0 ** (-i / 2) for i in range(3)], dtype=torch.float64)
    want = torch.cat([angle.sin(), angle.cos(), torch.zeros(4, 1)], dim=1)
    assert got.dtype == torch.float32
    # The frequency is off by some ulps of 2^-24, and the angle by t times that.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=999 * 4 * 2**-24)


@torch.no_grad()
def test_forward_embeds_t_in_float32_under_bfloat16() -> None:
    model = small_unet().to(torch.bfloat16)
    x = random_inputs(model.config)[0].to(torch.bfloat16)
    # 998 and 999 are one number in bfloat16.
    assert not torch.equal(model(x, torch.tensor([998, 998])), model(x, torch.tensor([999, 999])))


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])], ids=repr)
@torch.no_grad()
def test_forward_broadcasts_t(t: Tensor | float) -> None:
    model = small_unet()
    x, _, _ = random_inputs(model.config)
    assert torch.equal(model(x, t), model(x, torch.tensor([7, 7])))


@torch.no_grad()
def test_forward_takes_fractional_t() -> None:
    model = small_unet()
    x, _, _ = random_inputs(model.config)
    assert not torch.equal(model(x, 7.5), model(x, 7.0))


@torch.no_grad()
def test_forward_without_labels_uses_null_class() -> None:
    model = small_unet(num_class_embeds=5, null_class=3)
    x, t, _ = random_inputs(model.config)
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
    assert not torch.equal(model(x, t), model(x, t, torch.tensor([2, 2])))


@torch.no_grad()
def test_denoise_takes_time_projections_computed_once() -> None:
    model = small_unet(num_class_embeds=5)
    x, t, labels = random_inputs(model.config)
    time = model.project_time(model.embed(t, labels))
    assert [p.shape[1] for p in time] == [resnet.conv1.out_channels for resnet in model.resnets()]
    assert torch.equal(model.denoise(x, time), model(x, t, labels))


def test_fresh_network_is_zero_and_trains() -> None:
    torch.manual_seed(0)
    model = UNet(UNetConfig(**SMALL))
    x, t, _ = random_inputs(model.config)
    assert torch.equal(model(x, t), torch.zeros(2, 3, 16, 16))
    target = torch.randn(2, 3, 16, 16)
    losses = []
    for _ in range(4):  # the gradient reaches conv_out first, then conv2, then what lies before
        model.zero_grad()
        loss = (model(x, t) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.1)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_compile_makes_one_graph_for_all_t_and_labels() -> None:
    model = small_unet(num_class_embeds=5, null_class=4)
    x, _, _ = random_inputs(model.config, batch=3)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for t, label in [(0, 0), (1, 4), (999, 2), (500, 1)]:
        args = x * (t + 1), torch.full((3,), t), torch.full((3,), label)
        assert torch.equal(compiled(*args), model(*args))
    assert counter.frame_count == 1


BAD_INPUTS = [
    pytest.param({"x": torch.zeros(2, 3, 16, 16)}, ValueError, r"\[B, 2, H, W\].*\[2, 3, 16, 16\]", id="channels"),
    pytest.param({"x": torch.zeros(2, 16, 16)}, ValueError, r"\[B, 2, H, W\]", id="three-dimensions"),
    pytest.param({"x": torch.zeros(2, 2, 16, 15)}, ValueError, "multiples of 2", id="odd-width"),
    pytest.param({"x": torch.zeros(2, 2, 0, 16)}, ValueError, "positive", id="no-height"),
    pytest.param({"x": torch.zeros(2, 2, 16, 16, dtype=torch.uint8)}, TypeError, "floating point", id="uint8"),
    pytest.param({"x": torch.zeros(2, 2, 16, 16, dtype=torch.float64)}, TypeError, "float64.*float32", id="float64"),
    pytest.param({"t": torch.zeros(3)}, ValueError, r"t must have shape \[2\].*\[3\]", id="t-length"),
    pytest.param({"t": torch.zeros(2, 1)}, ValueError, r"t must have shape", id="t-dimensions"),
    pytest.param({"class_labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "class_labels", id="labels-length"),
    pytest.param({"class_labels": torch.zeros(2)}, TypeError, "int64", id="float-labels"),
    pytest.param({"class_labels": None}, ValueError, "no null class", id="labels-missing"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_INPUTS)
def test_forward_refuses_what_does_not_fit(bad: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 2, 16, 16), "t": torch.zeros(2), "class_labels": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        small_unet(num_class_embeds=5)(**{**good, **bad})


def test_forward_refuses_labels_for_unconditional_network() -> None:
    with pytest.raises(ValueError, match="without classes"):
        small_unet()(torch.zeros(1, 2, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


UNSUPPORTED = [
    ("time_embedding_type", "fourier", "fourier"),
    ("time_embedding_type", "learned", "learned"),
    ("mid_block_type", None, "None"),
    ("downsample_type", "resnet", "resnet"),
    ("upsample_type", "resnet", "resnet"),
    ("class_embed_type", "timestep", "timestep"),
    ("down_block_types", ["SkipDownBlock2D", "DownBlock2D"], "SkipDownBlock2D"),
    ("up_block_types", ["UpBlock2D", "CrossAttnUpBlock2D"], "CrossAttnUpBlock2D"),
    ("resnet_time_scale_shift", "spatial", "spatial"),
    ("act_fn", "tanh", "tanh"),
    ("cross_attention_dim", 64, "64"),
]


@pytest.mark.parametrize(("key", "value", "shown"), UNSUPPORTED)
def test_config_names_unsupported_key_and_value(key: str, value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{shown}"):
        UNetConfig.from_dict({**SMALL, key: value})


BAD_VALUES = [
    ("block_out_channels", (8,)),
    ("block_out_channels", (8, 18)),  # no multiple of norm_num_groups
    ("block_out_channels", (8, "16")),
    ("block_out_channels", 8),
    ("block_out_channels", (8, 10**9)),
    ("layers_per_block", 0),
    ("layers_per_block", 10**9),
    ("layers_per_block", 1.0),
    ("layers_per_block", True),
    ("attention_head_dim", 5),
    ("attention_head_dim", 0),
    ("attn_norm_num_groups", 5),
    ("norm_num_groups", None),
    ("norm_eps", 0.0),
    ("norm_eps", math.nan),
    ("mid_block_scale_factor", 0),
    ("dropout", 1.0),
    ("downsample_padding", 2),
    ("freq_shift", 2),
    ("flip_sin_to_cos", 1),
    ("sample_size", (16, 16, 16)),
    ("null_class", 0),  # there are no classes
    ("num_class_embeds", 0),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_config_refuses_values_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        UNetConfig(**{**SMALL, key: value})


def test_config_survives_its_dict() -> None:
    config = UNetConfig(**{**SMALL, "sample_size": (16, 32), "num_class_embeds": 5, "null_class": 4})
    assert UNetConfig.from_dict(config.to_dict()) == config
