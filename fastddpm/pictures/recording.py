"""What the picture of a process shows: states along the forward process and, beside them, along a reverse process."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.data import datasets as data
from fastddpm.data import points
from fastddpm.data.folder import image_file
from fastddpm.data.load import load_data
from fastddpm.files.image_reader import SUFFIXES as IMAGE_SUFFIXES
from fastddpm.pictures.mlp import train_points
from fastddpm.pictures.process import ExactDenoiser, Process, forward_walk, reverse_walk
from fastddpm.sampling.conditions import labels_for
from fastddpm.sampling.network import Model, diffusion_of, shape_of
from fastddpm.sampling.sampler import Sampler
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.unet.load import load

# Points of a built-in set that the network is trained on: enough that their own scatter is far below a sample's.
N_TRAIN = 1 << 16

# A single image larger than this is shrunk; a picture shows it at about this size.
MAX_SIDE = 128


@dataclass(frozen=True)
class Recording:
    """Everything that the picture shows.

    Attributes:
        indices: K states that were recorded, ascending, the first 0 and the last `process.steps`.
        x_0: [N, ...] the data set, whose exact moments are drawn.
        forward: [K, n, ...] the same n of its points or images at each of these states.
        reverse: [K, m, ...] m samples at each of these states.
        x0_estimates: [K, m, ...] what the network took for x_0 at each of them.
        model: what the reverse process was predicted by.
    """

    name: str
    process: Process
    indices: tuple[int, ...]
    x_0: Tensor
    forward: Tensor
    reverse: Tensor
    x0_estimates: Tensor
    model: str


def spread(steps: int, most: int) -> tuple[int, ...]:
    """Return at most `most` states of 0..steps, equally far apart up to rounding, both ends among them.

    Raises:
        ValueError: most is below 2.
    """
    count = min(steps + 1, integer("most", most, 2))
    return tuple(round(k * steps / (count - 1)) for k in range(count))


@dataclass(frozen=True)
class RecordingSettings:
    """What to record.

    Attributes:
        data: a name of `points.DATA_SETS` or `data.BUILT_IN`, a file of points, an image, or a file of images.
        schedule: a name of `Schedule.named`.
        exact: let the exact denoiser of the data predict the reverse process; so it does for images without a model.
        model: a model for images, by name or directory; it brings schedule and T, and `steps` are the network calls.
        shown: points, or images, that are drawn.
        train_steps: gradient steps of the points' network.
        states: how many states are recorded at most.
        seed: of data, weights and noise.
    """

    data: str = "swiss-roll"
    steps: int = 8
    schedule: str = "cosine"
    exact: bool = False
    model: str | None = None
    shown: int | None = None
    train_steps: int = 4000
    states: int = 9
    seed: int = 0
    device: str = "cpu"
    backend: str = "auto"


def record(settings: RecordingSettings, progress: bool = False) -> tuple[Recording, Sampler]:
    """Walk both processes, training the points' network on the way.

    Returns:
        The recording, and the sampler of its reverse process.

    Raises:
        ValueError: the data, the schedule or T are unusable, or do not suit the model.
    """
    if settings.shown is not None:
        integer("the number of points or images shown", settings.shown, 1)
    x_0 = load_x_0(settings)
    with warnings.catch_warnings():
        # The picture itself says whether the process ends Gaussian.
        warnings.filterwarnings("ignore", "the schedule does not end near a Gaussian", UserWarning)
        return _walk(settings, x_0, *_denoiser(settings, x_0, progress))


def load_x_0(settings: RecordingSettings) -> Tensor:
    """Load the data: points float32 [N, 2] of the scale of N(0, I), or images float32 [N, C, H, W] in [-1, 1]."""
    name, path = settings.data, Path(settings.data)
    if name in points.DATA_SETS:
        return points.draw(name, _n_points(settings) if settings.exact else N_TRAIN, settings.seed)
    if name not in data.BUILT_IN:
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            return data.as_floats(image_file(path, resolution=MAX_SIDE).images)
        if not path.is_dir():
            array = points.read_array(path)
            if array.ndim == 2:
                return points.standardised(array, name)
    return data.as_floats(load_data(name).images)


def _n_points(settings: RecordingSettings) -> int:
    return 2000 if settings.shown is None else settings.shown


def _denoiser(settings: RecordingSettings, x_0: Tensor, progress: bool) -> tuple[Model, DiffusionConfig, str]:
    """Return what predicts the reverse process, the process that it is for, and its name in the picture."""
    of_points, shape = x_0.dim() == 2, tuple(x_0.shape[1:])
    if settings.model is not None:
        if of_points:
            raise ValueError(
                f"--model goes with images, and {settings.data} are points; their network is trained on the spot"
            )
        model = load(settings.model)
        if shape_of(model) != shape:
            raise ValueError(
                f"model {settings.model} makes images {list(shape_of(model))} and {settings.data} holds {list(shape)}; "
                "choose data of the model's shape"
            )
        return model, diffusion_of(model), f"model {_label(settings.model)}"
    diffusion = DiffusionConfig(beta_schedule=settings.schedule, num_timesteps=settings.steps)
    if of_points:
        diffusion = point_diffusion(x_0, settings.schedule, settings.steps)
    if settings.exact or not of_points:
        return ExactDenoiser(x_0, diffusion.schedule(), settings.device), diffusion, r"exact $\epsilon^*$"
    where: Any = {"device": settings.device, "backend": settings.backend}
    trained = train_points(x_0, diffusion, steps=settings.train_steps, seed=settings.seed, progress=progress, **where)
    return trained, diffusion, "small MLP"


def point_diffusion(x_0: Tensor, schedule: str, steps: int) -> DiffusionConfig:
    """Return the process for points: epsilon, fixed_large, and x_0 clipped to the square that holds the data.

    With few steps the true posteriors are wide, and sigma^2 = beta_t comes closer to them than beta_tilde_t (Ho et al.
    2020, section 3.2: it is the optimum for x_0 ~ N(0, I)).
    """
    return DiffusionConfig(
        beta_schedule=schedule, num_timesteps=steps, variance_type="fixed_large", clip_range=float(x_0.abs().max())
    )


def _label(source: str) -> str:
    """Name a source as it is written in the picture: without its folder, and with no sign of mathtext."""
    return Path(source).name.replace("$", r"\$")


def _shown(settings: RecordingSettings, x_0: Tensor) -> Tensor:
    """Return the points or images that are drawn, the same for the same seed."""
    if x_0.dim() == 2:
        return x_0[: _n_points(settings)]
    generator = np.random.Generator(np.random.Philox(key=settings.seed % 2**64))
    return x_0[generator.permutation(len(x_0))[: 2 if settings.shown is None else settings.shown]]


def _walk(
    settings: RecordingSettings, x_0: Tensor, model: Model, diffusion: DiffusionConfig, name: str
) -> tuple[Recording, Sampler]:
    seed, device, backend = settings.seed, settings.device, settings.backend
    table = make_table("ddpm", diffusion, steps=settings.steps)
    sampler = Sampler(model, table, tuple(x_0.shape[1:]), device=device, backend=backend, compile=False)
    process, shown = Process.of(diffusion.schedule(), table.timesteps), _shown(settings, x_0)
    indices = spread(process.steps, settings.states)
    forward = forward_walk(shown.to(device), process.schedule, indices, seed=seed, backend=backend)
    labels = labels_for(model, range(len(shown)), None)
    reverse, x0_estimates = reverse_walk(sampler, len(shown), indices, seed=seed, class_labels=labels)
    return Recording(_label(settings.data), process, indices, x_0, forward, reverse, x0_estimates, name), sampler
