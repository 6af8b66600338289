"""The folder of a training run: what may be written to, resumed, or started from."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastddpm.data.load import load_data
from fastddpm.training.checkpoint import CHECKPOINT, read_state
from fastddpm.training.config import TrainConfig
from fastddpm.training.folder import LOG, SETTINGS, default_unet, read_settings
from fastddpm.training.trainer import build_trainer, train
from fastddpm.unet.save import save_pretrained
from fastddpm.unet.unet import UNet, UNetConfig
from tests.training.train_cases import TINY, at_step, same_run, tiny_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path)


@pytest.fixture
def trained(tmp_path: Path, config: TrainConfig) -> Path:
    """A saved model to start from."""
    torch.manual_seed(1)
    model = UNet(UNetConfig.from_dict(TINY), zero_init=False)
    model.diffusion = dataclasses.replace(config.diffusion(), variance_type="fixed_large")
    save_pretrained(model, tmp_path / "trained")
    return tmp_path / "trained"


def _from(trained: Path, config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, model=None, init=str(trained), **changes)


def test_init_starts_from_the_weights_of_a_model(config: TrainConfig, trained: Path) -> None:
    # At a rate of 0 the first step leaves the weights as they were.
    train(_from(trained, config, steps=1, lr=0.0), quiet=True)
    saved, out = load_file(trained / "diffusion_pytorch_model.safetensors"), Path(config.out)
    for name in ("diffusion_pytorch_model.safetensors", "raw/diffusion_pytorch_model.safetensors"):
        weights = load_file(out / name)
        assert weights.keys() == saved.keys()
        assert all(torch.equal(weights[key], saved[key]) for key in saved)
    assert (out / "scheduler_config.json").read_bytes() == (trained / "scheduler_config.json").read_bytes()


def test_init_resumes_to_the_bits_of_an_uninterrupted_run(
    config: TrainConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = _from(trained, config, out=str(tmp_path / "broken"))
    train(_from(trained, config), quiet=True)
    with monkeypatch.context() as patch:
        at_step(6, lambda: signal.raise_signal(signal.SIGTERM), patch)
        assert train(broken, quiet=True).steps == 7
    assert train(dataclasses.replace(broken, resume=True), quiet=True).steps == 12
    assert same_run(tmp_path / "run", tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"prediction": "v"}, "prediction_type was 'epsilon' and is 'v'; give its --schedule", id="target"),
        pytest.param({"schedule": "cosine"}, "beta_schedule was 'linear' and is 'cosine'", id="schedule"),
        pytest.param({"timesteps": 500}, "num_timesteps was 1000 and is 500", id="T"),
        pytest.param({"init": "nowhere"}, "no folder 'nowhere'", id="missing"),
        pytest.param({"out": "trained", "overwrite": True}, "would remove --init", id="itself"),
    ],
)
def test_init_refuses_what_it_cannot_start_from(
    config: TrainConfig, trained: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(trained.parent)
    before = (trained / "diffusion_pytorch_model.safetensors").read_bytes()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(dataclasses.replace(_from(trained, config), **change), quiet=True)
    assert (trained / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"in_channels": 3, "out_channels": 3}, r"3 channels in and 3 out; digits8x8 .* has 1", id="RGB"),
        pytest.param({"num_class_embeds": None, "null_class": None}, "0 classes; .* has 10", id="unconditional"),
        pytest.param({"num_class_embeds": 10, "null_class": 9}, "9 classes; .* has 10", id="null-is-a-digit"),
        pytest.param({"num_class_embeds": 10, "null_class": None}, "--class-dropout 0", id="no-null"),
    ],
)
def test_train_refuses_a_network_that_does_not_suit_the_images(
    config: TrainConfig, change: dict[str, Any], message: str
) -> None:
    Path(str(config.model)).write_text(json.dumps({**TINY, **change}))
    with pytest.raises(ValueError, match=message):
        train(config, quiet=True)


def test_train_drops_labels_to_the_networks_own_null_class(config: TrainConfig) -> None:
    # More classes than the data have, as in a model that is fine-tuned on a part of its own.
    model = UNet(UNetConfig.from_dict({**TINY, "num_class_embeds": 21, "null_class": 20}))
    trainer = build_trainer(dataclasses.replace(config, class_dropout=0.5), load_data("digits8x8"), model)
    seen: list[torch.Tensor] = []

    def net(x_t: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        seen.append(class_labels)
        return x_t

    trainer.net = net
    trainer.loss(torch.arange(64), n=0)
    assert 20 in seen[0]
    assert set(seen[0].tolist()) <= {*range(10), 20}


def test_train_refuses_a_folder_in_use(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def second_run() -> None:
        with pytest.raises(BlockingIOError, match="another run"):
            train(dataclasses.replace(config, resume=True), quiet=True)
        tried.append(True)

    tried: list[bool] = []
    at_step(5, second_run, monkeypatch)
    train(config, quiet=True)
    assert tried


def test_train_refuses_existing_output_unless_told(config: TrainConfig) -> None:
    train(config, quiet=True)
    with pytest.raises(FileExistsError, match="--resume"):
        train(config, quiet=True)
    (Path(config.out) / "notes.txt").write_text("mine")
    train(dataclasses.replace(config, overwrite=True, steps=3), quiet=True)
    assert read_state(Path(config.out))["step"] == 3
    assert (Path(config.out) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"lr": 1e-4}, "lr was 0.001 and is 0.0001", id="setting"),
        pytest.param({"model": None}, "model was", id="network"),
        pytest.param({"data": "CHANGED"}, "data_sha256 was", id="data"),
    ],
)
def test_train_refuses_to_resume_another_run(
    config: TrainConfig, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    import numpy as np

    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 10
    path = tmp_path / "d.npz"
    np.savez(path, images=images, labels=labels)
    config = dataclasses.replace(config, data=str(path), steps=4)
    train(config, quiet=True)
    if change == {"data": "CHANGED"}:
        np.savez(path, images=images[::-1], labels=labels)
        change = {}
    with pytest.raises(ValueError, match=named):
        train(dataclasses.replace(config, resume=True, **change), quiet=True)
    assert read_state(Path(config.out))["step"] == 4


def test_train_resumes_a_run_that_is_older_than_a_setting(config: TrainConfig) -> None:
    """What its settings do not name had the default."""
    train(dataclasses.replace(config, steps=2), quiet=True)
    path = Path(config.out) / SETTINGS
    stored = json.loads(path.read_text())
    for values in (stored["settings"], stored["config"]):
        for name in ("variance", "vlb_weight", "loss_weight", "gamma"):
            del values[name]
    # As version 0.1.0 wrote it.
    old = {"format": stored["format"], "settings": stored["settings"], "identity": stored["config"]}
    path.write_text(json.dumps(old))
    with pytest.raises(ValueError, match="loss_weight was 'uniform' and is 'p2'"):
        train(dataclasses.replace(config, resume=True, loss_weight="p2"), quiet=True)
    assert train(dataclasses.replace(config, resume=True, steps=4), quiet=True).steps == 4


def test_train_resumes_an_empty_folder_from_the_start_and_refuses_a_model(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert train(dataclasses.replace(config, resume=True, steps=2), quiet=True).steps == 2
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"no {SETTINGS}"):
        train(dataclasses.replace(config, out=str(foreign), resume=True), quiet=True)


@pytest.mark.parametrize("damage", ["truncated", "other format", "garbage"])
def test_train_names_a_damaged_checkpoint(config: TrainConfig, damage: str) -> None:
    train(config, quiet=True)
    path = Path(config.out) / CHECKPOINT
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other format":
        save_file({"x": torch.zeros(1)}, path)
    else:
        path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="not a usable checkpoint"):
        train(dataclasses.replace(config, resume=True, steps=20), quiet=True)


def _checkpoint(path: Path, change: str) -> None:
    """Write a checkpoint again, with one thing wrong in it."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = "optimizer.exp_avg_sq.conv_in.bias"
    if change == "infinite moments":
        tensors[name] = tensors[name] * float("inf")
    elif change == "integer weights":
        tensors["model.conv_in.bias"] = tensors["model.conv_in.bias"].long()
    elif change == "no moments":
        del tensors[name]
    elif change == "no format":
        metadata = {}
    else:
        metadata["state"] = change.replace("{", '{"format": "fastddpm-training-1", ', 1)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("infinite moments", "NaN or infinity"),
        ("integer weights", "is torch.int64, not floating point"),
        ("no moments", "missing: 'optimizer.exp_avg_sq.conv_in.bias'"),
        ("no format", "is not a fastddpm-training-1 file"),
        ('{"step": 2.5, "log": {}}', "step must be an integer >= 0, got 2.5"),
        ('{"step": 2, "log": {"sum": 1e999}}', "too large"),
        ('{"step": 2}', "its state has no log"),
        ("pipe", "not a regular file"),
        ("log", "not a regular file"),
        ("settings", "steps must be an integer >= 1, got 1e\\+308"),
    ],
    ids=lambda value: value[:20],
)
def test_train_reads_its_own_files_with_care(config: TrainConfig, change: str, message: str) -> None:
    train(dataclasses.replace(config, steps=2), quiet=True)
    out = Path(config.out)
    if change in ("pipe", "log"):
        path = out / (CHECKPOINT if change == "pipe" else LOG)
        path.unlink()
        os.mkfifo(path)
    elif change == "settings":
        path = out / SETTINGS
        path.write_text(path.read_text().replace('"steps": 2', '"steps": 1e308'))
    else:
        _checkpoint(out / CHECKPOINT, change)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.from_dict({**read_settings(out), "resume": True}), quiet=True)


@pytest.mark.parametrize(
    ("shape", "classes", "widths", "embeds"),
    [
        ((1, 32, 32), 10, (16, 32, 64, 96), 11),
        ((1, 8, 8), 0, (64, 96), None),
        ((3, 64, 64), 2, (64, 64, 128, 256, 384), 3),
    ],
)
def test_default_unet_fits_the_images(
    shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], embeds: int | None
) -> None:
    unet = default_unet(shape, classes, TrainConfig(data="", out=""))
    assert (unet.block_out_channels, unet.num_class_embeds) == (widths, embeds)
    with torch.device("meta"):
        model = UNet(unet)
        assert model(torch.zeros(2, *shape), torch.zeros(2)).shape == (2, *shape)
    if shape == (1, 32, 32):
        assert unet == UNetConfig.digits()


def test_default_unet_refuses_a_size_it_cannot_halve() -> None:
    with pytest.raises(ValueError, match="--resolution"):
        default_unet((3, 50, 50), 0, TrainConfig(data="", out=""))
