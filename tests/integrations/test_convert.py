"""Conversion of other libraries' models: exact or refused, and nothing in a checkpoint is ever executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.cli import main
from fastddpm.files.checkpoints import Checkpoint
from fastddpm.integrations.convert import convert
from fastddpm.integrations.lucidrains.buffers import read_diffusion
from fastddpm.integrations.lucidrains.diffusion import GaussianDiffusion
from fastddpm.integrations.lucidrains.tables import OBJECTIVES, SCHEDULES, make_buffers
from fastddpm.integrations.openai.unet_weights import OpenAIFlags
from fastddpm.unet.unet import UNet
from tests.integrations.openai_unet import UNetModel
from tests.tiny import RGB, tiny_unet

PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}
FLAGS = OpenAIFlags(num_heads=2)


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
def test_lucidrains_schedule_is_read_and_its_objective_recognised(
    tmp_path: Path, schedule: str, T: int, objective: str, gamma: float | None
) -> None:
    path = trainer_checkpoint(tmp_path / "model-1.pt", lucidrains_state(schedule, objective, gamma, T))
    config = read_diffusion(Checkpoint(path), "model.", None, None)
    assert config.prediction_type == PREDICTION[objective]
    assert config.variance_type == "fixed_small"
    expected = torch.cumprod(1 - SCHEDULES[schedule](T), dim=0)
    assert torch.allclose(config.schedule().alphas_cumprod, expected, rtol=1e-5, atol=1e-9)


def test_lucidrains_own_schedule_keeps_its_betas(tmp_path: Path) -> None:
    betas = torch.linspace(0.001, 0.05, 200, dtype=torch.float64)
    torch.save({**make_buffers(betas, "pred_v", None), "model.x": torch.zeros(1)}, tmp_path / "diffusion.pt")
    config = read_diffusion(Checkpoint(tmp_path / "diffusion.pt"), "", None, None)
    assert config.trained_betas == tuple(betas.float().double().tolist())


def test_lucidrains_network_is_refused_with_the_way_out(tmp_path: Path, capsys: Any) -> None:
    path = trainer_checkpoint(tmp_path / "model-1.pt", lucidrains_state("sigmoid", "pred_v"))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in (str(path), "another architecture", "integrations.lucidrains"):
        assert part in error
    assert not (tmp_path / "out").exists()


class Adapter(nn.Module):
    """A UNet2DModel as denoising-diffusion-pytorch calls it."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet, self.channels, self.out_dim, self.self_condition = unet, 3, 3, False

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.unet(x, t)


def test_lucidrains_checkpoint_around_a_unet2dmodel_converts_and_samples(tmp_path: Path) -> None:
    unet = tiny_unet(RGB)
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
    ours = fastddpm.sample(converted, seeds=[4, 5], sampler="ddpm")
    assert torch.allclose(diffusion.sample(seeds=[4, 5]) * 2 - 1, ours, atol=1e-5)
    convert(path, tmp_path / "last", config=config, weights="last")
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
    theirs = diffusers.UNet2DModel(**RGB).eval()
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
    unet = tiny_unet(RGB)
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    weights = unet.state_dict()
    weights["conv_in.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin.*conv_in\.weight|sha256"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Hostile and damaged folders, and files without a network.


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A diffusers folder whose weights are in a .bin, which load refuses and convert reads."""
    unet = tiny_unet(RGB)
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
    with pytest.raises(ValueError, match=message) as caught:
        convert(bin_folder, tmp_path / "out")
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
    for name, message in (
        ("opt.pt", "no network of a known kind .* among its 0 tensors"),
        ("other.pt", "no network of a known kind .* among its 1 tensors 'something'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_load_points_a_pickle_to_convert(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="fastddpm convert"):
        fastddpm.load(tmp_path / "model.ckpt")
