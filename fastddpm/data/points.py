"""Points in the plane: three data sets, points from a file, and the distance between two clouds of them.

All sets have mean 0 and E|x_0|^2 = 2, the scale of N(0, I): what the forward process ends in. One factor scales both
axes, so shapes keep their proportions. The built-in sets are standardised by their exact moments, not by those of a
draw, so two draws differ by chance alone; a file is standardised by its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastddpm.checks import integer, one_of, printable
from fastddpm.data import datasets as data
from fastddpm.files.arrays import read_arrays
from fastddpm.noise.seeds import as_word

SUFFIXES = (".npy", ".npz", ".csv")

# Text takes about 50 bytes a point; more points than this nobody tells apart in a picture.
MAX_CSV_BYTES = 64 << 20


def draw(name: str, n: int, seed: int = 0) -> Tensor:
    """Draw n points of one of `DATA_SETS`, float32 [n, 2].

    Raises:
        ValueError: the name is unknown, n is not positive, or the seed is out of range.
    """
    one_of("points", name, DATA_SETS)
    n = integer("the number of points", n, 1)
    generator = np.random.Generator(np.random.Philox(key=as_word(seed, "seed", 1 << 64)))
    return torch.from_numpy(DATA_SETS[name](generator, n).astype(np.float32))


def _swiss_roll(generator: np.random.Generator, n: int) -> np.ndarray:
    """(u cos u, u sin u) with u uniform on [3 pi / 2, 9 pi / 2]: three half turns further out, and a little noise.

    E[u cos u] = 2, E[u sin u] = 2 / (3 pi), E[u^2] = (a^2 + a b + b^2) / 3 = 9.75 pi^2.
    """
    noise = 0.25
    u = generator.uniform(1.5 * math.pi, 4.5 * math.pi, n)
    points = np.stack([u * np.cos(u), u * np.sin(u)], axis=1) + noise * generator.standard_normal((n, 2))
    mean = np.array([2.0, 2.0 / (3.0 * math.pi)])
    return (points - mean) / _scale(9.75 * math.pi**2 + 2 * noise**2 - mean @ mean)


def _two_moons(generator: np.random.Generator, n: int) -> np.ndarray:
    """Two half circles, (cos u, sin u) and (1 - cos u, 1/2 - sin u) with u uniform on [0, pi], and a little noise.

    Both have variance 1/2 in x and 1/2 - 4 / pi^2 in y; their centres (0, 2 / pi) and (1, 1/2 - 2 / pi) add the square
    of half their distance.
    """
    noise = 0.06
    u = generator.uniform(0.0, math.pi, n)
    upper = generator.random(n) < 0.5
    x = np.where(upper, np.cos(u), 1.0 - np.cos(u))
    y = np.where(upper, np.sin(u), 0.5 - np.sin(u))
    points = np.stack([x, y], axis=1) + noise * generator.standard_normal((n, 2))
    between = 0.25 + (2.0 / math.pi - 0.25) ** 2
    return (points - np.array([0.5, 0.25])) / _scale(1.0 - 4.0 / math.pi**2 + between + 2 * noise**2)


def _checkerboard(generator: np.random.Generator, n: int) -> np.ndarray:
    """The eight dark squares of a 4 x 4 board of side 4, uniformly; both coordinates have the board's variance 4/3."""
    column, row = generator.integers(0, 4, n), generator.integers(0, 2, n)
    corner = np.stack([column, 2 * row + column % 2], axis=1)
    return (corner + generator.random((n, 2)) - 2.0) / _scale(2 * 4.0 / 3.0)


def _scale(second_moment: float) -> float:
    """Return what to divide centred points by so that E|x_0|^2 = 2."""
    return math.sqrt(second_moment / 2.0)


DATA_SETS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "swiss-roll": _swiss_roll,
    "two-moons": _two_moons,
    "checkerboard": _checkerboard,
}


def standardised(points: np.ndarray, name: str = "points") -> Tensor:
    """Centre points and scale both axes by one factor, so that their mean square norm is 2.

    Raises:
        ValueError: they are not [N, 2] finite numbers, or all the same.
    """
    if not is_points(points):
        raise ValueError(f"{name}: points must be numbers [N, 2] with N >= 2, got {points.dtype} {points.shape}")
    points = points.astype(np.float64)
    if not np.isfinite(points).all():
        bad = int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])
        raise ValueError(f"{name}: point {bad} is {points[bad].tolist()}; remove what is not finite")
    # Halves keep the sum of two huge coordinates from overflowing.
    centred = points - 2.0 * (points / 2.0).mean(axis=0)
    extent = float(np.abs(centred).max())
    if not 0.0 < extent < math.inf:
        raise ValueError(f"{name}: the points span {extent:g}; they must differ, and by less than 1e308")
    centred /= extent
    return torch.from_numpy((centred / _scale(float((centred**2).sum(axis=1).mean()))).astype(np.float32))


def is_points(array: np.ndarray) -> bool:
    """Tell whether an array is a list of at least two points in the plane."""
    return array.ndim == 2 and array.shape[1] == 2 and len(array) >= 2 and array.dtype.kind in "fiu"


def read_array(path: Path) -> np.ndarray:
    """Read the array of a .npy, .npz or .csv file, of whatever shape; sizes are checked before, no pickle is read.

    Raises:
        ValueError: there is no such file, or it is damaged, too large or no array of numbers.
    """
    if path.suffix not in SUFFIXES or not path.is_file():
        known = ", ".join([*DATA_SETS, *data.BUILT_IN])
        raise ValueError(f"no data at '{path}'; give {known}, an image, or a file ending in {', '.join(SUFFIXES)}")
    return _read_csv(path) if path.suffix == ".csv" else read_arrays(path)["images"]


def _read_csv(path: Path) -> np.ndarray:
    size = path.stat().st_size
    if size > MAX_CSV_BYTES:
        raise ValueError(f"{path}: {size} bytes of text, more than {MAX_CSV_BYTES}; save the points as .npy")
    try:
        return np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(printable(f"{path}: not numbers separated by commas: {error}")) from None


def sliced_wasserstein(x: Tensor, y: Tensor, n_directions: int = 128) -> float:
    """Return the sliced 2-Wasserstein distance of two clouds of equally many points in the plane.

    SW_2^2 = E_theta W_2^2(<x, theta>, <y, theta>), and on a line W_2^2 is the mean square difference of the sorted
    values (Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures", section 3). The directions are
    equally spaced on the half circle, a quadrature, so that nothing of the result is chance.

    Args:
        x: [N, 2].
        y: [N, 2].

    Raises:
        ValueError: the shapes are not both [N, 2] with N >= 1.
    """
    if x.shape != y.shape or x.dim() != 2 or x.shape[1] != 2 or len(x) == 0:
        raise ValueError(f"x and y must both be [N, 2] with N >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    angles = torch.arange(n_directions, dtype=torch.float64, device="cpu") * (math.pi / n_directions)
    directions = torch.stack([angles.cos(), angles.sin()])  # [2, n_directions]
    x_line, y_line = ((p.cpu().double() @ directions).sort(dim=0).values for p in (x, y))
    return float((x_line - y_line).square().mean().sqrt())


def compare(
    name: str, sample: Callable[[int, int], Tensor], *, n: int = 10_000, draws: int = 8, first_seed: int = 1
) -> tuple[float, float]:
    """Compare samples with data, and data with data: one pair of clouds says little, so means over several are taken.

    Args:
        name: of `DATA_SETS`.
        sample: called with n and a seed; returns n samples [n, 2].
        first_seed: of the first cloud; no seed is used twice for data.

    Returns:
        The mean sliced Wasserstein distance of samples and data, and that of two draws of the data.
    """
    seeds = range(first_seed, first_seed + draws)
    data_draws = {seed: draw(name, n, seed) for seed in seeds}
    of_samples = [sliced_wasserstein(sample(n, seed), data_draws[seed]) for seed in seeds]
    of_data = [sliced_wasserstein(draw(name, n, seed + draws), data_draws[seed]) for seed in seeds]
    return sum(of_samples) / draws, sum(of_data) / draws
