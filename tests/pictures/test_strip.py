"""The picture and the animation: what they say and where they draw it."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import Schedule
from fastddpm.data import points
from fastddpm.pictures import gif as animation
from fastddpm.pictures import strip as drawing
from fastddpm.pictures.process import Process, forward_walk, marginal
from fastddpm.pictures.recording import Recording, spread

T = 8


@pytest.fixture(scope="module")
def cosine() -> Schedule:
    return Schedule.cosine(T)


def whole(schedule: Schedule) -> Process:
    return Process.of(schedule, torch.arange(schedule.num_timesteps))


def linear(T: int) -> Schedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Schedule.linear(T)


def small_recording(schedule: Schedule) -> Recording:
    x_0 = points.draw("swiss-roll", 30)
    process = whole(schedule)
    indices = spread(process.steps, 9)
    forward = forward_walk(x_0, schedule, indices)
    return Recording("swiss-roll", process, indices, x_0, forward, forward, forward, "MLP")


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in figure.texts)


def test_strip_names_every_state_and_says_whether_it_ends_gaussian(cosine: Schedule) -> None:
    text = words(drawing.strip_figure(small_recording(cosine)))
    for t in range(T + 1):
        assert rf"$t = {t}$" in text
    for alpha_bar in ("1", "0.958", "0.847", "0.684", "0.494", "0.304", "0.144", "0.0375", r"3.7\cdot 10^{-5}"):
        assert rf"$\bar{{\alpha}}_t = {alpha_bar}$" in text
    for snr in (r"\infty", "22.7", "0.0389", r"3.7\cdot 10^{-5}"):
        assert f"SNR ${snr}$" in text
    assert r"ends Gaussian: $\bar{\alpha}_{8} = 3.7\cdot 10^{-5} < 10^{-3}$" in text
    text = words(drawing.strip_figure(small_recording(linear(2))))
    assert r"does NOT end Gaussian: $\bar{\alpha}_{2} = 0.980 \geq 10^{-3}$" in text


def test_strip_draws_the_exact_moments_over_the_points(cosine: Schedule) -> None:
    recorded = small_recording(cosine)
    axes = drawing.strip_figure(recorded).axes
    assert len(axes) == 2 * (T + 1)
    for k in (0, 3, T):
        mean, covariance = marginal(recorded.x_0, recorded.process.alpha_bar(k))
        drawn = axes[k].patches[1]
        assert drawn.get_center() == pytest.approx(mean.tolist())
        # The principal axes of the ellipse at two standard deviations, put together again.
        angle = math.radians(drawn.angle)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        variances = np.diag([(drawn.width / 4) ** 2, (drawn.height / 4) ** 2])
        np.testing.assert_allclose(turn @ variances @ turn.T, covariance, atol=1e-9)
        assert np.array_equal(axes[k].collections[0].get_offsets(), recorded.forward[k].numpy())


def test_strip_is_a_png_of_moderate_size(cosine: Schedule) -> None:
    png = drawing.strip(small_recording(Schedule.cosine(2)))
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        assert np.asarray(image.convert("RGB"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.9578, "0.958"),
        (22.71, "22.7"),
        (0.001, "10^{-3}"),
        (0.9999, "0.9999"),
        (9999.4, "10^{4}"),
        (145.2, "145"),
        (math.inf, r"\infty"),
        (0.0, "0"),
    ],
)
def test_number_is_written_for_reading(value: float, text: str) -> None:
    assert drawing.number(value) == text


def test_colours_tell_directions_apart_and_stay_in_gamut() -> None:
    angle = torch.arange(24) * (2 * math.pi / 24)
    rgb = drawing.colours(torch.stack([angle.cos(), angle.sin()], dim=1))
    assert rgb.min() >= 0.0
    assert rgb.max() <= 1.0
    assert min(np.linalg.norm(a - b) for i, a in enumerate(rgb) for b in rgb[:i]) > 0.03


def test_mosaic_stacks_images_with_a_white_gap() -> None:
    states = torch.stack([torch.full((1, 3, 2), -1.0), torch.full((1, 3, 2), 1.0)])
    assert drawing.mosaic(states).tolist() == [[0, 0]] * 3 + [[255, 255]] * 4


def test_gif_goes_there_and_back_and_rests_at_the_ends() -> None:
    with Image.open(io.BytesIO(animation.gif(small_recording(Schedule.cosine(2))))) as gif:
        assert gif.info["loop"] == 0
        durations = []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert gif.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert durations == 2 * [animation.PAUSE, animation.REST, animation.PAUSE]


def test_gif_of_images_shows_x_0_beneath(monkeypatch: pytest.MonkeyPatch) -> None:
    x_0 = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    process = whole(Schedule.cosine(2))
    forward = forward_walk(x_0, process.schedule, range(3))
    recorded = Recording("a.png", process, (0, 1, 2), x_0, forward, forward, -forward, "model")
    shown: list[list[np.ndarray]] = []

    def pixels(figure: Any) -> Image.Image:
        shown.append([np.asarray(axes.images[0].get_array()) for axes in figure.axes])
        return Image.new("RGB", (4, 4))

    monkeypatch.setattr(drawing, "pixels", pixels)
    animation.gif(recorded)
    states, estimates = ([drawing.mosaic(x) for x in values] for values in (forward, -forward))
    there = [(state, states[0]) for state in states]
    back = list(zip(states, estimates, strict=True))[::-1]
    assert len(shown) == 6
    for panels, expected in zip(shown, [*there, *back], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(panels, expected, strict=True))
