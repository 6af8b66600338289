"""Recordings: points and images from every source, along their own process or a model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastddpm
from fastddpm import DiffusionConfig, Sampler, ddpm_table
from fastddpm.data import points
from fastddpm.pictures import strip as drawing
from fastddpm.pictures.recording import RecordingSettings, point_diffusion, record, spread
from tests.tiny import tiny_unet

T = 8


@pytest.mark.parametrize(
    ("steps", "most", "expected"), [(8, 9, range(9)), (1, 9, (0, 1)), (100, 5, (0, 25, 50, 75, 100))]
)
def test_spread_keeps_both_ends(steps: int, most: int, expected: Any) -> None:
    assert spread(steps, most) == tuple(expected)


def test_point_diffusion_clips_no_data() -> None:
    roll = points.draw("swiss-roll", 400)
    assert point_diffusion(roll, "cosine", T).clip_range == float(roll.abs().max())


def test_swiss_roll_is_sampled_as_well_as_its_data_allow() -> None:
    """With a seventh of the training that `fastddpm diffuse` has, and a quarter of the points that it measures."""
    _, sampler = record(RecordingSettings(data="swiss-roll", steps=100, train_steps=600, shown=1))
    of_samples, of_data = points.compare("swiss-roll", lambda n, seed: sampler.sample(seed=seed, batch_size=n), draws=2)
    assert of_samples <= 1.5 * of_data


def test_record_standardises_the_points_of_a_file(workdir: Path) -> None:
    np.savetxt(workdir / "p.csv", np.random.default_rng(0).normal(5.0, 3.0, (40, 2)), delimiter=",")
    (workdir / "some").mkdir()
    (workdir / "p.csv").rename(workdir / "some" / "p $1$.csv")
    recorded, _ = record(RecordingSettings(data="some/p $1$.csv", steps=2, exact=True, shown=10))
    assert recorded.name == r"p \$1\$.csv"
    assert recorded.forward.shape == (3, 10, 2)
    assert float(recorded.x_0.double().mean(dim=0).abs().max()) < 1e-7
    assert float(recorded.x_0.double().square().sum(dim=1).mean()) == pytest.approx(2.0, rel=1e-6)


def test_record_shows_images_and_their_exact_reverse_process() -> None:
    recorded, _ = record(RecordingSettings(data="digits8x8", shown=3))
    assert recorded.forward.shape == recorded.reverse.shape == (T + 1, 3, 1, 8, 8)
    # Every sample is one of the images, up to the last mean's blur.
    distances = torch.cdist(recorded.reverse[0].flatten(1), recorded.x_0.flatten(1)).min(dim=1).values
    assert float(distances.max()) < 0.5
    assert len(drawing.strip_figure(recorded).axes) == 3 * (T + 1)


def test_record_returns_to_the_only_image_there_is(workdir: Path) -> None:
    Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)).save(workdir / "a.png")
    recorded, _ = record(RecordingSettings(data="a.png", steps=3))
    assert recorded.forward.shape == recorded.reverse.shape == (4, 1, 3, 9, 9)
    torch.testing.assert_close(recorded.reverse[0], recorded.x_0, rtol=0, atol=1e-5)
    assert drawing.headline(recorded) == "a.png: an image dissolves into a Gaussian in 3 steps, and a sample comes back"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = tiny_unet(num_class_embeds=4, null_class=3)
    network.diffusion = DiffusionConfig(num_timesteps=200, beta_end=0.1)
    directory = tmp_path_factory.mktemp("model")
    fastddpm.save_pretrained(network, directory)
    return directory


def test_record_follows_a_model_along_its_own_process(model: Path) -> None:
    recorded, _ = record(RecordingSettings(data="digits8x8", model=str(model), steps=5, shown=2))
    assert recorded.process.t[0] == 0
    assert recorded.process.t[-1] == 200
    assert len(recorded.process.t) == 6
    assert "dissolve into a Gaussian in 5 of 200 steps, and samples come back" in drawing.headline(recorded)
    # The same run through the front door: ids 0 and 1 have the classes 0 and 1 of three.
    x = fastddpm.load(model)
    table = ddpm_table(x.diffusion.schedule(), steps=5)
    expected = Sampler(x, table, (1, 8, 8), compile=False).sample(seed=0, batch_size=2, class_labels=[0, 1])
    torch.testing.assert_close(recorded.reverse[0], expected, rtol=1e-4, atol=1e-4)


def test_record_refuses_data_of_another_shape_than_the_model_s(model: Path, workdir: Path) -> None:
    np.save(workdir / "big.npy", np.zeros((3, 16, 16), np.uint8))
    with pytest.raises(ValueError, match=r"makes images \[1, 8, 8\] and big.npy holds \[1, 16, 16\]"):
        record(RecordingSettings(data="big.npy", model=str(model)))
