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


def linear(T: int) -> Schedule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return Schedule.linear(T)


def small_recording(schedule: Schedule) -> Recording:
    x_0 = points.draw("swiss-roll", 30)
    process = Process.of(schedule)
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


def test_frames_go_there_and_back(cosine: Schedule) -> None:
    frames = animation.frames(small_recording(cosine))
    there, back = frames[: len(frames) // 2], frames[len(frames) // 2 :]
    assert all(f.forward for f in there)
    assert not any(f.forward for f in back)
    assert [f.k for f in there] == sorted(f.k for f in there) == [f.k for f in back[::-1]]
    # Every state is among them, and rests.
    assert {f.k for f in there if f.milliseconds >= animation.REST} == set(range(T + 1))


def test_between_two_states_the_points_keep_to_the_marginal(cosine: Schedule) -> None:
    x_0 = points.draw("swiss-roll", 5000)
    forward = forward_walk(x_0, cosine, range(T + 1))
    recorded = Recording("swiss-roll", Process.of(cosine), tuple(range(T + 1)), x_0, forward, forward, forward, "")
    for k in (0.0, 3.0, 8.0):
        torch.testing.assert_close(animation._between(recorded, forward, k), forward[int(k)], rtol=1e-5, atol=1e-5)
    for k in (2.4, 7.5):
        low = recorded.process.alpha_bar(int(k))
        alpha_bar = low + (k - int(k)) * (recorded.process.alpha_bar(int(k) + 1) - low)
        variance = animation._between(recorded, forward, k).double().square().sum(dim=1)
        expected = float(marginal(x_0, alpha_bar)[1].trace())
        assert float(variance.mean()) == pytest.approx(expected, abs=5 * float(variance.std()) / math.sqrt(5000))


def test_gif_holds_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "GLIDE_FRAMES", 2)
    recorded = small_recording(Schedule.cosine(2))
    with Image.open(io.BytesIO(animation.gif(recorded))) as gif:
        assert gif.n_frames == len(animation.frames(recorded))
        assert gif.info["loop"] == 0
        gif.seek(1)
        assert gif.info["duration"] == animation.REST
        assert gif.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
