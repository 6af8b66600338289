"""Conversion of other libraries' models: exact or refused, and nothing in a checkpoint is ever executed."""

from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastddpm
from fastddpm.cli import main
from fastddpm.files.pickles import read_checkpoint
from fastddpm.integrations.convert import convert, read
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion
from fastddpm.integrations.lucidrains.tables import BUFFERS, OBJECTIVES, SCHEDULES, make_buffers
from fastddpm.integrations.openai.diffusion import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    get_named_beta_schedule,
)
from fastddpm.integrations.openai.tables import p_rows
from fastddpm.integrations.openai.unet_weights import OpenAIFlags, convert_unet, diffusion_of
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.unet.unet import UNet, UNetConfig

PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}
FLAGS = OpenAIFlags(num_heads=2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# OpenAI's network, written here from its papers: a state_dict, and what it computes.


class UNetModel:
    """The UNet of Nichol & Dhariwal 2021 in OpenAI's names, as functions of a state_dict."""

    def __init__(
        self,
        mult: tuple[int, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[int, ...] = (1,),
        scale_shift: bool = True,
        out: int = 3,
        classes: int | None = None,
        channels: int = 3,
        width: int = 32,
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.w: dict[str, Tensor] = {}
        self.scale_shift, self.temb = scale_shift, 4 * width
        self.linear("time_embed.0", width, self.temb)
        self.linear("time_embed.2", self.temb, self.temb)
        if classes:
            self.w["label_emb.weight"] = self.randn(classes, self.temb)
        self.conv("input_blocks.0.0", channels, width)
        stack, now, index = [width], width, 1
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.resblock(f"input_blocks.{index}.0", now, width * factor)
                now = width * factor
                if level in attention:
                    self.attention(f"input_blocks.{index}.1", now)
                stack.append(now)
                index += 1
            if level < len(mult) - 1:
                self.conv(f"input_blocks.{index}.0.op", now, now)
                stack.append(now)
                index += 1
        self.resblock("middle_block.0", now, now)
        self.attention("middle_block.1", now)
        self.resblock("middle_block.2", now, now)
        index = 0
        for level, factor in reversed(list(enumerate(mult))):
            for j in range(blocks + 1):
                self.resblock(f"output_blocks.{index}.0", now + stack.pop(), width * factor)
                now = width * factor
                if level in attention:
                    self.attention(f"output_blocks.{index}.1", now)
                if level and j == blocks:
                    self.conv(f"output_blocks.{index}.{1 + (level in attention)}.conv", now, now)
                index += 1
        self.norm("out.0", now)
        self.conv("out.2", now, out)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) / math.sqrt(math.prod(shape[1:]) or 1)

    def linear(self, name: str, inside: int, outside: int) -> None:
        self.w |= {f"{name}.weight": self.randn(outside, inside), f"{name}.bias": 0.1 * self.randn(outside)}

    def conv(self, name: str, inside: int, outside: int, size: int = 3) -> None:
        self.w |= {f"{name}.weight": self.randn(outside, inside, size, size), f"{name}.bias": 0.1 * self.randn(outside)}

    def norm(self, name: str, width: int) -> None:
        self.w |= {f"{name}.weight": 1 + 0.1 * self.randn(width), f"{name}.bias": 0.1 * self.randn(width)}

    def resblock(self, name: str, inside: int, outside: int) -> None:
        self.norm(f"{name}.in_layers.0", inside)
        self.conv(f"{name}.in_layers.2", inside, outside)
        self.linear(f"{name}.emb_layers.1", self.temb, outside * (1 + self.scale_shift))
        self.norm(f"{name}.out_layers.0", outside)
        self.conv(f"{name}.out_layers.3", outside, outside)
        if inside != outside:
            self.conv(f"{name}.skip_connection", inside, outside, 1)

    def attention(self, name: str, width: int) -> None:
        self.norm(f"{name}.norm", width)
        self.w |= {f"{name}.qkv.weight": self.randn(3 * width, width, 1), f"{name}.qkv.bias": self.randn(3 * width)}
        self.w |= {f"{name}.proj_out.weight": self.randn(width, width, 1), f"{name}.proj_out.bias": self.randn(width)}

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None, flags: OpenAIFlags) -> Tensor:
        """Run in float64, apart from the sines."""
        self.d = {name: tensor.double() for name, tensor in self.w.items()}
        half = self.temb // 8
        angle = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        emb = self.apply_linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], dim=1).double())
        emb = self.apply_linear("time_embed.2", functional.silu(emb))
        if y is not None:
            emb = emb + self.d["label_emb.weight"][y]
        saved = []
        for i in itertools.takewhile(lambda i: self.has(f"input_blocks.{i}."), itertools.count()):
            x = self.run(f"input_blocks.{i}", x, emb, flags)
            saved.append(x)
        x = self.run("middle_block", x, emb, flags)
        for i in itertools.takewhile(lambda i: self.has(f"output_blocks.{i}."), itertools.count()):
            x = self.run(f"output_blocks.{i}", torch.cat([x, saved.pop()], dim=1), emb, flags)
        return self.apply_conv("out.2", functional.silu(self.apply_norm("out.0", x)))

    def has(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.d)

    def run(self, block: str, x: Tensor, emb: Tensor, flags: OpenAIFlags) -> Tensor:
        for i in itertools.takewhile(lambda i: self.has(f"{block}.{i}."), itertools.count()):
            name = f"{block}.{i}"
            if self.has(f"{name}.in_layers"):
                x = self.run_resblock(name, x, emb)
            elif self.has(f"{name}.qkv"):
                x = self.run_attention(name, x, flags)
            elif self.has(f"{name}.op"):
                x = self.apply_conv(f"{name}.op", x, stride=2)
            elif self.has(f"{name}.conv"):
                x = self.apply_conv(f"{name}.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
            else:
                x = self.apply_conv(name, x)
        return x

    def run_resblock(self, name: str, x: Tensor, emb: Tensor) -> Tensor:
        h = self.apply_conv(f"{name}.in_layers.2", functional.silu(self.apply_norm(f"{name}.in_layers.0", x)))
        time = self.apply_linear(f"{name}.emb_layers.1", functional.silu(emb))[:, :, None, None]
        if self.scale_shift:
            width = h.shape[1]
            h = self.apply_norm(f"{name}.out_layers.0", h) * (1 + time[:, :width]) + time[:, width:]
        else:
            h = self.apply_norm(f"{name}.out_layers.0", h + time)
        h = self.apply_conv(f"{name}.out_layers.3", functional.silu(h))
        return h + (self.apply_conv(f"{name}.skip_connection", x) if self.has(f"{name}.skip_connection") else x)

    def run_attention(self, name: str, x: Tensor, flags: OpenAIFlags) -> Tensor:
        B, width, H, W = x.shape
        heads = flags.num_heads or width // (flags.num_head_channels or 0)
        qkv = torch.einsum(
            "oc,bcn->bon", self.d[f"{name}.qkv.weight"][:, :, 0], self.apply_norm(f"{name}.norm", x).flatten(2)
        )
        qkv = qkv + self.d[f"{name}.qkv.bias"][:, None]
        size, results = width // heads, []
        for k in range(heads):
            if flags.new_attention_order:
                q, key, v = (qkv[:, part * width + k * size :][:, :size] for part in range(3))
            else:
                q, key, v = (qkv[:, (3 * k + part) * size :][:, :size] for part in range(3))
            weights = torch.softmax(q.transpose(1, 2) @ key / math.sqrt(size), dim=-1)
            results.append(v @ weights.transpose(1, 2))
        out = torch.einsum("oc,bcn->bon", self.d[f"{name}.proj_out.weight"][:, :, 0], torch.cat(results, dim=1))
        return x + (out + self.d[f"{name}.proj_out.bias"][:, None]).reshape(B, width, H, W)

    def apply_linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.d[f"{name}.weight"].T + self.d[f"{name}.bias"]

    def apply_conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.d[f"{name}.weight"]
        return functional.conv2d(x, weight, self.d[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def apply_norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, correction=0)
        x = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        return x * self.d[f"{name}.weight"][:, None, None] + self.d[f"{name}.bias"][:, None, None]


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
            convert_unet(theirs.w, flags)
        return
    ours = convert_unet(theirs.w, flags).double()
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
        convert_unet(weights, OpenAIFlags())
    wide = UNetModel(attention=(0, 1)).w
    with pytest.raises(ValueError, match=r"num_heads = 2 at the widths \[32, 64\].*integrations\.openai"):
        convert_unet(wide, FLAGS)
    with pytest.raises(ValueError, match="not both"):
        convert_unet(weights, OpenAIFlags(num_heads=2, num_head_channels=8))
    with pytest.raises(ValueError, match="24"):
        convert_unet(weights, OpenAIFlags(num_head_channels=24))


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
        (without(plain.w, "output_blocks.0.1."), r"another build.*up_blocks\.0\.attentions\.0"),
        (deep, "unknown parameter 'input_blocks.1.0.extra.weight'"),
        (without(plain.w, "out.2.weight"), r"no parameter 'out\.2\.weight'"),
        (without(plain.w, "out.2.bias"), r"another build.*conv_out\.bias"),
    ]
    for weights, message in cases:
        with pytest.raises(ValueError, match=message):
            convert_unet(weights, FLAGS)


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


def test_convert_command_writes_an_openai_model_that_samples(tmp_path: Path, capsys: Any) -> None:
    theirs = UNetModel(out=6)
    torch.save(theirs.w, tmp_path / "ema_0.9999.pt")
    arguments = [str(tmp_path / "ema_0.9999.pt"), str(tmp_path / "out"), "--num-heads", "2", "--image-size", "8"]
    assert main(["convert", *arguments]) == 0
    assert "learned_range" in capsys.readouterr().out
    model = fastddpm.load(tmp_path / "out")
    assert model.config.sample_size == 8
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        assert torch.allclose(model(x, t).double(), theirs(x.double(), t, None, FLAGS), atol=1e-4)
    images = fastddpm.sample(model, seeds=[1, 2], steps=3)
    assert bool(images.isfinite().all())
    assert main(["convert", *arguments]) == 1
    assert "holds a model already" in capsys.readouterr().err


# lucidrains.


def trainer_checkpoint(path: Path, model: dict[str, Tensor], average: dict[str, Tensor] | None = None) -> Path:
    ema = {f"ema_model.{name}": tensor for name, tensor in (average or model).items()}
    ema |= {f"online_model.{name}": tensor for name, tensor in model.items()} | {"step": torch.tensor(3)}
    torch.save({"step": 3, "model": model, "opt": {"state": {}}, "ema": ema, "scaler": None, "version": "2.3.4"}, path)
    return path


def lucidrains_state(schedule: str, objective: str, gamma: float | None = None, T: int = 1000) -> dict[str, Tensor]:
    return {
        **make_buffers(SCHEDULES[schedule](T), objective, gamma),
        "model.init_conv.weight": torch.zeros(8, 3, 7, 7),
        "model.time_mlp.1.weight": torch.zeros(32, 8),
    }


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("schedule", "T"), [("linear", 1000), ("linear", 400), ("cosine", 100), ("sigmoid", 1000)])
def test_lucidrains_schedule_and_objective_are_recognised(
    tmp_path: Path, schedule: str, T: int, objective: str, gamma: float | None
) -> None:
    path = trainer_checkpoint(tmp_path / "model-1.pt", lucidrains_state(schedule, objective, gamma, T))
    convert(path, tmp_path / "out", schedule_only=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["scheduler_config.json"]
    config = fastddpm.DiffusionConfig.from_scheduler_config(
        json.loads((tmp_path / "out" / "scheduler_config.json").read_text())
    )
    assert config.prediction_type == PREDICTION[objective]
    assert config.variance_type == "fixed_small"
    expected = torch.cumprod(1 - SCHEDULES[schedule](T), dim=0)
    assert torch.allclose(config.schedule().alphas_cumprod, expected, rtol=1e-9, atol=1e-15)


def test_lucidrains_own_schedule_keeps_its_betas(tmp_path: Path) -> None:
    betas = torch.linspace(0.001, 0.05, 200, dtype=torch.float64)
    torch.save({**make_buffers(betas, "pred_v", None), "model.x": torch.zeros(1)}, tmp_path / "diffusion.pt")
    config = read(tmp_path / "diffusion.pt", schedule_only=True).diffusion
    assert config is not None
    assert config.trained_betas == tuple(betas.float().double().tolist())


def test_lucidrains_network_is_refused_with_the_way_out(tmp_path: Path, capsys: Any) -> None:
    path = trainer_checkpoint(tmp_path / "model-1.pt", lucidrains_state("sigmoid", "pred_v"))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (str(path), "another architecture", "integrations.lucidrains", "--schedule-only"):
        assert part in error
    assert not (tmp_path / "out").exists()
    assert main(["convert", str(path), str(tmp_path / "out"), "--schedule-only"]) == 0
    assert "predicts v" in capsys.readouterr().out


def small_unet() -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    return UNet(config, zero_init=False).eval()


class Adapter(nn.Module):
    """A UNet2DModel as denoising-diffusion-pytorch calls it."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet, self.channels, self.out_dim, self.self_condition = unet, 3, 3, False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.unet(x, t)


def test_lucidrains_checkpoint_around_a_unet2dmodel_converts_and_samples(tmp_path: Path) -> None:
    unet = small_unet()
    diffusion = GaussianDiffusion(Adapter(unet), image_size=8, timesteps=20, objective="pred_v", beta_schedule="cosine")
    last = {
        name: tensor + 1.0 if name.startswith("model") else tensor for name, tensor in diffusion.state_dict().items()
    }
    path = trainer_checkpoint(tmp_path / "model-1.pt", last, average=diffusion.state_dict())
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"give its config\.json too"):
        convert(path, tmp_path / "out")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "sha256" not in k}))
    convert(path, tmp_path / "out", config=config)
    converted = fastddpm.load(tmp_path / "out")
    assert converted.diffusion is not None
    assert (converted.diffusion.prediction_type, converted.diffusion.num_timesteps) == ("v", 20)
    ours = fastddpm.sample(converted, seeds=[4, 5])
    assert torch.allclose(diffusion.sample(seeds=[4, 5]) * 2 - 1, ours, atol=1e-5)
    convert(path, tmp_path / "last", config=config, average=False)
    difference = fastddpm.load(tmp_path / "last").conv_in.weight - converted.conv_in.weight
    assert torch.allclose(difference, torch.ones(()), atol=1e-5)


# diffusers.


@pytest.mark.parametrize(
    ("safe", "pipeline"),
    [(True, True), (False, True), (False, False)],
    ids=["safetensors-pipeline", "bin-pipeline", "bin-unet"],
)
def test_diffusers_folder_converts_to_the_same_network(tmp_path: Path, safe: bool, pipeline: bool) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    if pipeline:
        diffusers.DDPMPipeline(theirs, scheduler).save_pretrained(tmp_path / "source", safe_serialization=safe)
    else:
        theirs.save_pretrained(tmp_path / "source", safe_serialization=safe)
        scheduler.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", layout="pipeline")
    ours = fastddpm.load(tmp_path / "out")
    assert ours.diffusion is not None
    assert (ours.diffusion.beta_schedule, ours.diffusion.prediction_type) == ("cosine", "v")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1, 500])
    with torch.no_grad():
        expected = theirs(x, t).sample
        assert torch.allclose(ours(x, t), expected, atol=1e-5)
        back = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
        assert torch.allclose(back.unet(x, t).sample, expected, atol=1e-5)
    assert not list((tmp_path / "out").rglob("*.bin"))


def test_bin_of_another_architecture_is_refused_by_file_and_key(tmp_path: Path) -> None:
    unet = small_unet()
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    weights = unet.state_dict()
    weights["conv_in.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin.*conv_in\.weight|sha256"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Hostile and damaged files: faults.md rows 35 to 37.


class Bomb:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path, form: str, capsys: Any) -> None:
    payload = {"model": {"conv_in.weight": torch.zeros(1)}, "extra": Bomb(tmp_path / "ran")}
    path = tmp_path / "model.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": Bomb(tmp_path / "ran")}))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "refused" in error
    assert str(path) in error
    assert "state_dict" in error
    # torch's own advice would open the hole.
    assert "weights_only" not in error
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_the_environment_cannot_force_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"extra": Bomb(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="refused"):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    # The danger is real: a plain torch.load, which reads the variable, runs what is in the file (here: makes another).
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(tmp_path / "model.pt")
    assert (tmp_path / "ran").exists()


def test_damaged_and_hostile_archives_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(100)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    assert torch.equal(read_checkpoint(tmp_path / "good.pt")["a"], torch.zeros(100))
    (tmp_path / "truncated.pt").write_bytes(good[:300])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "huge.pt")
    torch.save({"a": torch.zeros(3).to_sparse()}, tmp_path / "sparse.pt")
    for name, entry, kind in (
        ("climbs.pt", "../../evil", zipfile.ZIP_STORED),
        ("absolute.pt", "/etc/evil", zipfile.ZIP_STORED),
        ("bomb.pt", "archive/data/0", zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("archive/data.pkl", b"")
            archive.writestr(entry, bytes(10**6))
    cases = {
        "truncated.pt": "no usable checkpoint|damaged|refused",
        "empty.pt": "no usable checkpoint",
        "text.pt": "refused|no usable checkpoint",
        "tensor.pt": "must hold a dict",
        "huge.pt": r"'a' claims shape \[1000000000000\]",
        "sparse.pt": "'a' claims shape|refused|no usable",
        "climbs.pt": "points outside the archive",
        "absolute.pt": "points outside the archive",
        "bomb.pt": "compressed",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="not a regular file"):
        read_checkpoint(Path("/dev/zero"))


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A diffusers folder whose weights are in a .bin, which load refuses and convert reads."""
    unet = small_unet()
    unet.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "diffusion_pytorch_model.safetensors").unlink()
    config = tmp_path / "bin" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if "sha256" not in k}))
    torch.save(unet.state_dict(), tmp_path / "bin" / "diffusion_pytorch_model.bin")
    return tmp_path / "bin"


@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"in_channels": NaN}', "NaN"),
        ('{"beta_end": 1e999}', "too large"),
        ('{"layers_per_block": 2, "layers_per_block": 3}', "given twice"),
        ("[" * 100_000, "nested deeper"),
        ('{"layers_per_block": 1000000000, "num_train_timesteps": 1000000000}', "layers_per_block|num_train_timesteps"),
        ('{"block_out_channels": "wide", "beta_schedule": 7}', "block_out_channels|beta_schedule"),
        (" " * (1 << 20) + "{}", "at most"),
    ],
    ids=["nan", "inf", "twice", "deep", "huge", "type", "long"],
)
def test_hostile_configurations_beside_a_bin_are_refused_at_once(
    bin_folder: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    (bin_folder / file).write_text(content)
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        convert(bin_folder, tmp_path / "out")
    assert time.process_time() - start < 1
    assert file in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "config.json", "scheduler_config.json"])
def test_links_out_of_a_folder_with_a_bin_are_refused(bin_folder: Path, tmp_path: Path, file: str) -> None:
    (bin_folder / file).rename(tmp_path / "elsewhere")
    (bin_folder / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{file}: links to .*elsewhere"):
        convert(bin_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_without_a_known_network_are_refused(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, tmp_path / "opt.pt")
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pt")
    broken = lucidrains_state("cosine", "pred_v", T=50)
    broken["loss_weight"] = torch.rand(50)
    torch.save(broken, tmp_path / "broken.pt")
    for name, message in (
        ("opt.pt", "holds no network.*param_groups"),
        ("other.pt", "no known checkpoint; its first names are something"),
        ("broken.pt", "loss_weight fits 0 objectives"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "out")
    assert set(BUFFERS) <= set(broken)
    assert not (tmp_path / "out").exists()


def test_load_points_a_pickle_to_convert(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="fastddpm convert"):
        fastddpm.load(tmp_path / "model.ckpt")
