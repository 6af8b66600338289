"""The trainer: its draws as functions of (seed, k, n), and what interruptions leave."""

from __future__ import annotations

import dataclasses
import errno
import functools
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fastddpm
import fastddpm.files.atomic
from fastddpm.data.datasets import Dataset
from fastddpm.data.load import load_data
from fastddpm.training import trainer as training
from fastddpm.training.checkpoint import CHECKPOINT, read_state
from fastddpm.training.config import TrainConfig
from fastddpm.training.folder import LOG
from fastddpm.training.log import read_log
from fastddpm.training.loss import ddpm_loss
from fastddpm.training.trainer import DivergenceError, batch_indices, drop, learning_rate, train
from fastddpm.unet.load import load
from fastddpm.unet.unet import UNet, UNetConfig
from tests.training.train_cases import TINY, at_step, same_run, tiny_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return tiny_run(tmp_path)


def test_batch_indices_visits_every_image_once_an_epoch_in_another_order() -> None:
    epochs = [torch.cat([batch_indices(5, 4 * epoch + i, 32, 8) for i in range(4)]) for epoch in range(3)]
    assert all(epoch.sort().values.tolist() == list(range(32)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert not torch.equal(epochs[0][:8], batch_indices(6, 0, 32, 8))


def test_drop_drops_the_share_asked_for_by_image_and_step() -> None:
    k, labels = torch.arange(20_000), torch.full((20_000,), 4)
    dropped = drop(labels, 10, 0.1, 0, k, 3) == 10
    assert set(drop(labels, 10, 0.1, 0, k, 3).tolist()) == {4, 10}
    # 5 standard errors of a binomial share: sqrt(0.1 * 0.9 / 20000) = 0.0021.
    assert abs(dropped.double().mean().item() - 0.1) < 5 * 0.0021213
    alone = drop(labels[:100], 10, 0.1, 0, k[:100], 3) == 10
    assert torch.equal(alone, dropped[:100])
    assert not torch.equal(dropped, drop(labels, 10, 0.1, 0, k, 4) == 10)


def test_learning_rate_rises_stays_and_falls(config: TrainConfig) -> None:
    settings = dataclasses.replace(config, steps=100, warmup=10, decay=0.2, lr=1.0)
    rates = [learning_rate(settings, n) for n in range(100)]
    assert rates[:11] == pytest.approx([(n + 1) / 10 for n in range(10)] + [1.0])
    assert rates[11:81] == [1.0] * 70
    assert rates[81:] == pytest.approx([1 - i / 20 for i in range(1, 20)])


def test_trainer_noises_image_k_alike_in_any_batch(config: TrainConfig) -> None:
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    data = Dataset("random", images, torch.arange(40) % 10, tuple("0123456789"))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def net(x_t: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        seen.append((x_t, t, class_labels))
        return x_t

    model = UNet(UNetConfig.from_dict(TINY))
    trainer = training.build_trainer(dataclasses.replace(config, flip=True), data, model)
    trainer.net = net
    trainer.loss(torch.arange(40), n=2)
    trainer.loss(torch.tensor([30, 3]), n=2)
    trainer.loss(torch.tensor([30, 3]), n=3)
    for all_images, two, later in zip(*seen, strict=True):
        assert torch.equal(all_images[[30, 3]], two)
        assert two.dtype == torch.int64 or not torch.equal(two, later)


def test_accumulation_gives_the_gradient_of_the_whole_batch(config: TrainConfig) -> None:
    weights = []
    for accumulate in (1, 3):
        torch.manual_seed(0)
        data = load_data("digits8x8")
        model = UNet(UNetConfig.from_dict(TINY))
        whole = dataclasses.replace(config, accumulate=accumulate, dropout=0.0)
        trainer = training.build_trainer(whole, data, model)
        losses = [trainer.step(n) for n in range(3)]
        weights.append((losses, model.conv_in.weight.detach().clone()))
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    torch.testing.assert_close(weights[0][1], weights[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_resumes_to_the_bits_of_an_uninterrupted_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    config = dataclasses.replace(config, dtype=dtype, accumulate=2, flip=True)
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(config, quiet=True)
    with monkeypatch.context() as patch:
        at_step(6, lambda: signal.raise_signal(signal.SIGINT), patch)
        stopped = train(broken, quiet=True)
    assert (stopped.steps, stopped.signal) == (7, signal.SIGINT)
    assert not same_run(tmp_path / "run", tmp_path / "broken")
    again = train(dataclasses.replace(broken, resume=True), quiet=True)
    assert (again.steps, again.signal) == (12, None)
    assert same_run(tmp_path / "run", tmp_path / "broken")


KILLED_IN_A_WRITE = """
import os, signal, sys
from fastddpm.files import atomic
from fastddpm.training.config import TrainConfig
from fastddpm.training.trainer import train

write, written = atomic._write_synced, []

def write_or_die(path, content):
    if sys.argv[2] in path.name:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, content)

atomic._write_synced = write_or_die
train(TrainConfig(**eval(sys.argv[1])), quiet=True)
"""


@pytest.mark.parametrize("name", [CHECKPOINT, "samples-"])
def test_train_survives_a_kill_in_the_middle_of_a_file(config: TrainConfig, tmp_path: Path, name: str) -> None:
    config = dataclasses.replace(config, sample_every=4, timesteps=10, schedule="cosine")
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    train(config, quiet=True)
    command = [sys.executable, "-c", KILLED_IN_A_WRITE, repr(dataclasses.asdict(broken)), name]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "broken").glob(".*.tmp")
    assert leftover.name.startswith(f".{name}")
    assert read_state(tmp_path / "broken")["step"] == 4
    # What a kill in the middle of a line of the log leaves, and a file of somebody else's.
    with (tmp_path / "broken" / LOG).open("a") as log:
        log.write('{"step": 15, "lo')
    (tmp_path / "broken" / ".notes.txt.1.tmp").write_bytes(b"mine")
    train(dataclasses.replace(broken, resume=True), quiet=True)
    assert [p.name for p in (tmp_path / "broken").glob(".*.tmp")] == [".notes.txt.1.tmp"]
    assert same_run(tmp_path / "run", tmp_path / "broken")


def test_train_keeps_the_last_checkpoint_when_the_disk_is_full(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = fastddpm.files.atomic._write_synced, []

    def full(path: Path, content: bytes) -> None:
        if CHECKPOINT in path.name:
            written.append(path)
            if len(written) == 2:
                path.write_bytes(content[:1000])
                raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(fastddpm.files.atomic, "_write_synced", full)
        with pytest.raises(OSError, match="No space left"):
            train(config, quiet=True)
    out = Path(config.out)
    assert not list(out.glob(".*.tmp"))
    assert read_state(out)["step"] == 4
    assert train(dataclasses.replace(config, resume=True), quiet=True).steps == 12


def test_train_stops_at_a_loss_that_is_not_finite(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*args: Any, **kwargs: Any) -> Tensor:
        losses.append(ddpm_loss(*args, **kwargs))
        return losses[-1] * (float("nan") if len(losses) == 7 else 1.0)

    losses: list[Tensor] = []
    monkeypatch.setattr(training, "ddpm_loss", diverging)
    with pytest.raises(DivergenceError, match=r"loss nan.* at step 6; the last good checkpoint is .* at step 4"):
        train(config, quiet=True)
    assert all(v.isfinite().all() for v in load_file(Path(config.out) / CHECKPOINT).values())


def test_train_learns(config: TrainConfig) -> None:
    train(dataclasses.replace(config, steps=80, batch=32, warmup=10, lr=3e-3, dropout=0.0), quiet=True)
    losses = [line["loss"] for line in read_log(Path(config.out))]
    assert len(losses) == 16
    assert losses[0] > 0.9  # predicts zero: E ||eps||^2 = 1
    assert sum(losses[-4:]) / 4 < 0.7


def test_train_learns_a_variance_in_further_channels(config: TrainConfig) -> None:
    settings = {"model": None, "variance": "learned_range", "loss_weight": "min-snr", "steps": 4, "timesteps": 50}
    train(dataclasses.replace(config, **settings, schedule="cosine", prediction="v"), quiet=True)
    model = load(config.out)
    assert model.diffusion is not None
    assert (model.config.out_channels, model.diffusion.variance_type) == (2, "learned_range")
    assert fastddpm.sample(model, seeds=[0], steps=2, class_labels=3).isfinite().all()


def test_trainer_weighs_the_timesteps_as_asked(config: TrainConfig) -> None:
    data, k = load_data("digits8x8"), torch.arange(8)
    losses = {}
    for weight, gamma in (("uniform", None), ("min-snr", None), ("p2", 0.5)):
        settings = dataclasses.replace(config, loss_weight=weight, gamma=gamma, dropout=0.0)
        torch.manual_seed(0)
        trainer = training.build_trainer(settings, data, UNet(UNetConfig.from_dict(TINY)))
        losses[weight] = trainer.loss(k, n=0).item()
        schedule, x_0 = settings.diffusion().schedule(), data.x_0(k)
        labels = drop(data.labels[k], 10, config.class_dropout, 7, k, 0)
        options = {"weighting": weight, "gamma": gamma, "class_labels": labels}
        again = ddpm_loss(trainer.model, x_0, schedule, seed=7, step=0, sample_ids=k, **options)
        assert losses[weight] == again.item()
    assert len(set(losses.values())) == 3


def test_trainer_drops_and_mirrors_the_condition_with_its_image(config: TrainConfig) -> None:
    generator, k = torch.Generator().manual_seed(1), torch.arange(64)
    images, other = (torch.randn(64, n, 8, 8, generator=generator) for n in (1, 2))
    beside = torch.cat([images, other], dim=1)
    net = UNet(UNetConfig.from_dict({**TINY, "in_channels": 4, "num_class_embeds": None, "null_class": None}))
    seen: list[Tensor] = []

    def spy(x_t: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor) -> Tensor:
        seen.append(condition)
        return x_t

    losses = []
    for p in (0.0, 0.25):
        settings = dataclasses.replace(config, batch=64, flip=True, class_dropout=p)
        trainer = training.build_trainer(settings, Dataset("random", images, condition=beside), net)
        trainer.net = spy
        losses.append(trainer.loss(k, n=3))
    mirrored = torch.tensor([bool(torch.equal(row, beside[i].flip(2))) for i, row in enumerate(seen[0])])
    assert 16 <= int(mirrored.sum()) <= 48
    assert torch.equal(seen[0], torch.where(mirrored[:, None, None, None], beside.flip(3), beside))
    # Its first channel is the image that was noised.
    x_0, schedule = seen[0][:, :1], config.diffusion().schedule()
    assert losses[0] == losses[1] == ddpm_loss(lambda x_t, t: x_t, x_0, schedule, seed=7, step=3, sample_ids=k)
    dropped = drop(torch.ones(64), 0.0, 0.25, 7, k, 3) == 0
    assert 8 <= int(dropped.sum()) <= 24
    assert torch.equal(seen[1], torch.where(dropped[:, None, None, None], 0.0, seen[0]))


def test_train_saves_a_model_that_loads_with_its_diffusion(config: TrainConfig) -> None:
    train(dataclasses.replace(config, prediction="v", schedule="cosine"), quiet=True)
    averaged, raw = load(config.out), load(Path(config.out) / "raw")
    assert averaged.diffusion is not None
    assert (averaged.diffusion.prediction_type, averaged.diffusion.beta_schedule) == ("v", "cosine")
    tensors = load_file(Path(config.out) / CHECKPOINT)
    for name, p in averaged.named_parameters():
        assert torch.equal(p, tensors[f"ema.{name}"])
        assert torch.equal(dict(raw.named_parameters())[name], tensors[f"model.{name}"])
    assert not torch.equal(averaged.conv_in.weight, raw.conv_in.weight)


def test_train_draws_grids_and_plots(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(dataclasses.replace(config, steps=10, sample_every=10, timesteps=50, schedule="cosine"), quiet=False)
    assert "drawing samples" in capsys.readouterr().err
    with Image.open(Path(config.out) / "samples-0000010.png") as grid:
        assert grid.size == (10 * (64 + 2) + 2, 4 * (64 + 2) + 2)
    with Image.open(Path(config.out) / "loss.png") as plot:
        assert plot.size[0] > 400


def test_train_compiled_takes_the_same_steps(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One graph of forward and backward is what is checked; Inductor's code rounds differently, and takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config = dataclasses.replace(config, steps=2, save_every=0)
    train(config, quiet=True)
    train(dataclasses.replace(config, compile=True, out=str(tmp_path / "compiled")), quiet=True)
    assert same_run(tmp_path / "run", tmp_path / "compiled")


def test_train_leaves_the_callers_generator_alone(config: TrainConfig) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    train(config, quiet=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("accumulate", 9),
        ("lr", float("nan")),
        ("lr", -1.0),
        ("ema", 1.0),
        ("dropout", -0.1),
        ("class_dropout", 1.5),
        ("seed", 2**63),
        ("seed", -1),
        ("dtype", "float16"),
        ("schedule", "quadratic"),
        ("prediction", "noise"),
        ("timesteps", 0),
        ("decay", 1.1),
        ("save_every", -1),
    ],
)
def test_config_names_the_setting_out_of_range(config: TrainConfig, field: str, value: Any) -> None:
    names = {"schedule": "beta_schedule", "prediction": "prediction_type", "timesteps": "num_timesteps"}
    with pytest.raises(ValueError, match=names.get(field, field)):
        dataclasses.replace(config, **{field: value})
