"""Points: the data sets against their definitions, files, the distance against closed forms, the training loss."""

from __future__ import annotations

import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm import DiffusionConfig
from fastddpm.data import points
from fastddpm.machine.building import Want
from fastddpm.ops.draw import randn
from fastddpm.pictures.mlp import PointMLP, train_points
from fastddpm.sampling.network import sampling_networks
from fastddpm.training.loss import ddpm_loss

N = 40_000


@pytest.mark.parametrize("name", points.DATA_SETS)
def test_draw_has_the_moments_of_a_standard_gaussian(name: str) -> None:
    x = points.draw(name, N).double()
    square = x.square().sum(dim=1)
    assert x.shape == (N, 2)
    assert (x.mean(dim=0).abs() <= 5 * x.std(dim=0) / math.sqrt(N)).all()
    assert abs(float(square.mean()) - 2.0) <= 5 * float(square.std()) / math.sqrt(N)


@pytest.mark.parametrize("name", points.DATA_SETS)
def test_draw_depends_on_the_seed_alone(name: str) -> None:
    assert torch.equal(points.draw(name, 100, 3), points.draw(name, 100, 3))
    assert not torch.equal(points.draw(name, 100, 3), points.draw(name, 100, 4))


def test_swiss_roll_lies_on_the_spiral() -> None:
    u = torch.linspace(1.5 * math.pi, 4.5 * math.pi, 4000, dtype=torch.float64)
    spiral = torch.stack([u * u.cos(), u * u.sin()], dim=1)
    x = points.draw("swiss-roll", 2000).double()
    # Undone: the scale from E|p|^2 = 9.75 pi^2 + 2 * 0.25^2, and the mean (2, 2 / (3 pi)).
    mean = torch.tensor([2.0, 2.0 / (3.0 * math.pi)], dtype=torch.float64)
    p = x * math.sqrt((9.75 * math.pi**2 + 0.125 - float(mean @ mean)) / 2) + mean
    assert float(torch.cdist(p, spiral).min(dim=1).values.max()) < 5 * 0.25


def test_two_moons_lie_on_their_half_circles() -> None:
    x = points.draw("two-moons", 2000).double()
    p = x * math.sqrt((1.0 - 4.0 / math.pi**2 + 0.25 + (2.0 / math.pi - 0.25) ** 2 + 2 * 0.06**2) / 2)
    p = p + torch.tensor([0.5, 0.25])
    upper = (p.norm(dim=1) - 1.0).abs() + 10.0 * (p[:, 1] < -0.3)
    lower = ((p - torch.tensor([1.0, 0.5])).norm(dim=1) - 1.0).abs() + 10.0 * (p[:, 1] > 0.8)
    assert float(torch.minimum(upper, lower).max()) < 5 * 0.06
    assert 850 < int((upper < lower).sum()) < 1150


def test_checkerboard_leaves_the_light_squares_empty() -> None:
    square = (points.draw("checkerboard", 4000).double() * math.sqrt(4.0 / 3.0) + 2.0).floor().long()
    assert int(square.min()) == 0
    assert int(square.max()) == 3
    assert (square.sum(dim=1) % 2 == 0).all()
    assert len(square.unique(dim=0)) == 8


def test_draw_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="unknown points 'spiral'; choose one of swiss-roll"):
        points.draw("spiral", 10)
    with pytest.raises(ValueError, match=">= 1, got 0"):
        points.draw("two-moons", 0)
    with pytest.raises(ValueError, match="seed must be an integer >= 0 and <= 2"):
        points.draw("two-moons", 10, -1)


def test_sliced_wasserstein_of_a_shift_and_of_a_stretch_matches_the_closed_form() -> None:
    x = points.draw("swiss-roll", 500).double()
    # W_2 on a line: |<c, theta>| for a shift by c, |1 - s| sqrt(E <x, theta>^2) for a stretch by s; and the mean of
    # <v, theta>^2 over directions is |v|^2 / 2.
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert points.sliced_wasserstein(x, x + shift) == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    stretched = abs(1 - 1.7) * math.sqrt(float(x.square().sum(dim=1).mean()) / 2)
    assert points.sliced_wasserstein(x, 1.7 * x) == pytest.approx(stretched, rel=1e-12)


def test_sliced_wasserstein_of_gaussians_matches_the_closed_form() -> None:
    n = 8000
    x, y = (randn((n, 2), seed=seed) for seed in (0, 1))
    # W_2(N(0, 1), N(0, s^2)) = |1 - s| in every direction; a sample's own error falls as 1 / sqrt(n).
    assert points.sliced_wasserstein(x, 1.5 * y) == pytest.approx(0.5, abs=5 * 1.5 / math.sqrt(n))


def test_sliced_wasserstein_ignores_the_order_of_the_points() -> None:
    x = points.draw("two-moons", 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert points.sliced_wasserstein(x, x[order]) == 0.0


@pytest.mark.parametrize(("x", "y"), [((3, 2), (4, 2)), ((3, 3), (3, 3)), ((0, 2), (0, 2))])
def test_sliced_wasserstein_refuses_clouds_it_cannot_pair(x: tuple[int, int], y: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must both be"):
        points.sliced_wasserstein(torch.zeros(x), torch.zeros(y))


def test_compare_averages_over_draws() -> None:
    shifted, of_data = points.compare("two-moons", lambda n, seed: points.draw("two-moons", n, 99 + seed) + 1.0, n=1000)
    # A shift by (1, 1) is 1 away in the mean of all directions; two draws of 1000 points are near.
    assert shifted == pytest.approx(1.0, abs=0.1)
    assert 0.0 < of_data < 0.15


RAW = np.array([[0.0, 10.0], [4.0, 10.0], [4.0, 12.0], [0.0, 12.0]])


def save(path: Path, array: np.ndarray) -> Path:
    if path.suffix == ".csv":
        np.savetxt(path, array, delimiter=",")
    else:
        (np.save if path.suffix == ".npy" else np.savez)(path, array)
    return path


def load_points(path: Path) -> Tensor:
    """The points of a file, as `fastddpm diffuse` draws them."""
    return points.standardised(points.read_array(path), str(path))


@pytest.mark.parametrize("suffix", points.SUFFIXES)
def test_load_points_centres_and_scales_both_axes_alike(tmp_path: Path, suffix: str) -> None:
    x = load_points(save(tmp_path / f"p{suffix}", RAW))
    # Centred: (+-2, +-1), whose mean square norm is 5.
    expected = torch.tensor([[-2.0, -1.0], [2.0, -1.0], [2.0, 1.0], [-2.0, 1.0]], dtype=torch.float64) * math.sqrt(
        2 / 5
    )
    assert torch.equal(x, expected.float())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 3)), r"points must be numbers \[N, 2\].*\(5, 3\)"),
        (np.zeros((1, 2)), r"N >= 2"),
        (np.ones((4, 2)), "the points span 0"),
        (np.array([[1.0, 2.0], [np.nan, 0.0]]), "point 1 is"),
        (np.array([[1e308, 0.0], [-1e308, 0.0]]), None),
    ],
    ids=["three-columns", "one-point", "all-equal", "nan", "huge"],
)
def test_load_points_checks_the_values(tmp_path: Path, array: np.ndarray, message: str | None) -> None:
    path = save(tmp_path / "p.npy", array)
    if message is None:
        assert torch.equal(load_points(path).abs()[:, 0], torch.full((2,), math.sqrt(2)))
        return
    with pytest.raises(ValueError, match=message):
        load_points(path)


def test_load_points_refuses_files_that_are_no_arrays(tmp_path: Path) -> None:
    whole = save(tmp_path / "p.npy", RAW).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-3])
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(RAW))
    np.save(tmp_path / "objects.npy", np.array([[1, "a"]], dtype=object))
    (tmp_path / "text.csv").write_text("x,y\n1,2\n")
    (tmp_path / "points.txt").write_text("1,2\n")
    for name in ("cut.npy", "pickle.npy", "objects.npy"):
        with pytest.raises(ValueError, match=f"{name}: not a usable array file"):
            load_points(tmp_path / name)
    with pytest.raises(ValueError, match="not numbers separated by commas"):
        load_points(tmp_path / "text.csv")
    for name in ("points.txt", "missing.npy"):
        with pytest.raises(ValueError, match=r"no data at .*; give swiss-roll"):
            load_points(tmp_path / name)


def test_load_points_refuses_text_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(points, "MAX_CSV_BYTES", 10)
    with pytest.raises(ValueError, match="bytes of text, more than 10; save the points"):
        load_points(save(tmp_path / "p.csv", RAW))


def diffusion(T: int) -> DiffusionConfig:
    return DiffusionConfig(beta_schedule="cosine", num_timesteps=T)


@torch.no_grad()
def test_point_mlp_gives_each_point_its_own_timestep() -> None:
    model = PointMLP(diffusion(8), width=16, depth=2)
    x, t = points.draw("two-moons", 24), torch.arange(24) % 8

    def one_by_one() -> Tensor:
        return torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(24)])

    torch.testing.assert_close(model(x, t), one_by_one(), rtol=1e-4, atol=1e-5)
    assert float((model(x, t) - model(x, t.flip(0))).abs().max()) > 1e-3


@torch.no_grad()
def test_point_mlp_samples_with_tabulated_shifts() -> None:
    """Eight matrix products a step instead of twelve, and the same points."""
    model = PointMLP(diffusion(8), width=16, depth=2).eval()
    timesteps, x, products = torch.arange(7, -1, -1), points.draw("two-moons", 24), Counter[str]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products[func.name()] += 1
            return func(*args, **(kwargs or {}))

    network = sampling_networks(model, timesteps, want=Want.NEVER, strict=True)(24)
    assert not network.reads_t  # type: ignore[attr-defined]
    assert not network.shares_weights  # type: ignore[attr-defined]
    for row, t in enumerate(timesteps):
        with Count():
            found = network(x, torch.empty(0), torch.tensor([row]), {})
        torch.testing.assert_close(found, model(x, t.expand(24)), rtol=1e-4, atol=1e-5)
    # First and last layer, and two in each block: none for the embedding.
    assert products["aten::addmm"] == 8 * (2 + 2 * 2)


def test_train_points_learns_and_repeats(capsys: pytest.CaptureFixture[str]) -> None:
    x_0 = points.draw("two-moons", 2000)
    first = train_points(x_0, diffusion(8), steps=60, batch=128, seed=1, progress=False)
    assert capsys.readouterr().err == ""
    again = train_points(x_0, diffusion(8), steps=60, batch=128, seed=1)
    bar = capsys.readouterr().err
    assert "60/60" in bar
    assert "loss 0." in bar
    assert not first.training
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    # Predicting nothing costs 1.
    assert ddpm_loss(first, x_0, diffusion(8).schedule(), seed=2, step=0) < 0.6


def test_train_points_refuses_bad_settings() -> None:
    x_0 = points.draw("two-moons", 10)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        train_points(x_0, diffusion(8), steps=0)
    with pytest.raises(ValueError, match="predicts epsilon, got prediction_type 'v'"):
        train_points(x_0, DiffusionConfig(prediction_type="v"), steps=1)
    with pytest.raises(FloatingPointError, match="use a smaller learning rate"):
        train_points(x_0, diffusion(8), steps=3, batch=8, lr=1e30)
