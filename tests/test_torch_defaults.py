"""torch.set_default_dtype and torch.set_default_device change no bit of what the library returns."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import DiffusionConfig, Sampler, Schedule, reference
from fastddpm.data import points
from fastddpm.data.datasets import Dataset
from fastddpm.evaluation.classifier import Classifier, load_classifier
from fastddpm.evaluation.measures import measure
from fastddpm.evaluation.real_images import Reference
from fastddpm.evaluation.steps import measure_steps
from fastddpm.files.tensors import sha256
from fastddpm.pictures.mlp import train_points
from fastddpm.pictures.process import ExactDenoiser, forward_walk
from fastddpm.schedules.betas import SCHEDULES
from fastddpm.schedules.levels import SPACINGS
from fastddpm.schedules.spacing import space_timesteps, spaced_timesteps
from fastddpm.tables.by_name import SAMPLERS, make_table
from fastddpm.tables.table import loss_rows, q_rows, q_step_rows
from fastddpm.training.trainer import train
from fastddpm.unet.unet import UNet
from tests.evaluation import classifier_training
from tests.tiny import RGB, tiny_unet
from tests.training.train_cases import tiny_run

pytestmark = pytest.mark.usefixtures("still_generators")

PACKAGE = Path(fastddpm.__file__).parent
SHAPE = (2, 3, 8, 8)
X = torch.linspace(-1, 1, 384).reshape(SHAPE)
M, Z, T = X.sin(), X.cos(), torch.tensor([3, 7])
BOTH = torch.cat([M, Z], dim=1)
DIFFUSION = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
SCHEDULE = DIFFUSION.schedule()
NET = tiny_unet(RGB)
NET.diffusion = DIFFUSION
CLASSIFIER = Classifier(2)
LABELLED = Dataset("grey", X[:, :1].repeat(10, 1, 1, 1), torch.arange(20) % 2, ("a", "b"))


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def saved(model: UNet) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        fastddpm.save_pretrained(model, folder)
        return fastddpm.load(folder).state_dict()


def grid() -> str:
    with tempfile.TemporaryDirectory() as folder:
        fastddpm.save_grid(X, Path(folder) / "grid.png")
        return sha256(Path(folder) / "grid.png")


def trained() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(tiny_run(Path(folder)), steps=1)
        train(config, quiet=True)
        return {path.name: sha256(path) for path in Path(config.out).rglob("*.safetensors")}


def measured() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.safetensors"
        classifier_training.save_classifier(path, CLASSIFIER)
        return measure(LABELLED, Reference(LABELLED, LABELLED), load_classifier(path, 2)).to_json()


def bits() -> Any:
    found = fastddpm.bits_per_dim(model, X, DIFFUSION, strata=2)
    return list(found)


def model(x: Tensor, t: Tensor) -> Tensor:
    return x.sin()


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([x.sin(), x.cos()], dim=1)


def drawn(sampler: str = "fast", **options: Any) -> Tensor:
    return fastddpm.sample(NET, steps=3, sampler=sampler, compile=False, **options)


def sampler(**options: Any) -> Sampler:
    return Sampler(NET, fastddpm.ddpm_table(SCHEDULE, steps=3), SHAPE[1:], compile=False, **options)


STEPS = {"steps": 5}
ENTRIES: dict[str, Callable[[], Any]] = {
    **{f"Schedule.named {name}": lambda name=name: Schedule.named(name, 50) for name in SCHEDULES},
    "Schedule.linear": lambda: Schedule.linear(50),
    "Schedule.linear_rescaled": lambda: Schedule.linear_rescaled(50),
    "Schedule.scaled_linear": lambda: Schedule.scaled_linear(50),
    "Schedule.cosine": lambda: Schedule.cosine(50),
    "Schedule.sigmoid_geodiff": lambda: Schedule.sigmoid_geodiff(50),
    "Schedule.sigmoid_jabri": lambda: Schedule.sigmoid_jabri(50),
    "Schedule.laplace": lambda: Schedule.laplace(50),
    "Schedule.from_betas": lambda: Schedule.from_betas([0.1, 0.2]),
    "Schedule.from_alphas_cumprod": lambda: Schedule.from_alphas_cumprod(np.array([0.9, 0.3])),
    "Schedule.zero_terminal_snr": lambda: Schedule.linear(50).zero_terminal_snr(),
    "Schedule.respaced": lambda: SCHEDULE.respaced(spaced_timesteps(50, 5, "linspace")),
    "DiffusionConfig": lambda: DiffusionConfig(num_timesteps=2, trained_betas=(0.1, 0.2)).schedule(),
    "space_timesteps": lambda: space_timesteps(50, "ddim10"),
    **{
        f"spacing {name}": lambda name=name: make_table("unipc", DiffusionConfig(), steps=5, spacing=name)
        for name in SPACINGS
    },
    **{f"sampler {name}": lambda name=name: make_table(name, DIFFUSION, steps=5) for name in SAMPLERS},
    "ddpm_table": lambda: fastddpm.ddpm_table(SCHEDULE, prediction_type="v", timesteps=[40, 3, 0]),
    "ddim_table": lambda: fastddpm.ddim_table(SCHEDULE, eta=0.5, timesteps=[40, 3, 0]),
    "ddim_inversion_table": lambda: fastddpm.ddim_inversion_table(SCHEDULE, steps=5),
    "dpm_solver_table": lambda: fastddpm.dpm_solver_table(SCHEDULE, sigmas=[9.0, 2.0, 0.1]),
    "slerp": lambda: fastddpm.slerp(X, M, 0.3),
    "Table": lambda: fastddpm.ddpm_table(SCHEDULE).with_guidance(2.0),
    "q_rows": lambda: [q_rows(SCHEDULE), q_step_rows(SCHEDULE), loss_rows(SCHEDULE, weighting="min-snr")],
    "reference.q_step": lambda: reference.q_step(X, T, SCHEDULE, Z),
    "reference.q_sample": lambda: reference.q_sample(X, 3, SCHEDULE, generator=generator()),
    "reference.q_posterior": lambda: reference.q_posterior(X, Z, T, SCHEDULE),
    "reference.predict_x0": lambda: reference.predict_x0(X, M, T, SCHEDULE, "v"),
    "reference.p_mean_variance": lambda: reference.p_mean_variance(X, BOTH, T, SCHEDULE, variance_type="learned_range"),
    "reference.p_sample": lambda: reference.p_sample(X, M, T, SCHEDULE, Z),
    "reference.p_sample_loop": lambda: reference.p_sample_loop(
        model, X, SCHEDULE, timesteps=[40, 3, 0], generator=generator()
    ),
    "reference.simple_loss": lambda: reference.simple_loss(model, X, T, SCHEDULE, Z),
    "reference.hybrid_loss": lambda: reference.hybrid_loss(learned, X, T, SCHEDULE, Z),
    "reference.vlb_term": lambda: reference.vlb_term(M, X, Z, T, SCHEDULE),
    "reference.mean_flat": lambda: reference.mean_flat(X),
    "reference.normal_kl": lambda: reference.normal_kl(X, M, Z, X),
    "reference.discretized_log_likelihood": lambda: reference.discretized_log_likelihood(X, M, Z),
    "reference.ddim_step": lambda: [
        reference.ddim_step(X, M, *SCHEDULE.alphas_cumprod[[7, 3]].float(), eta=eta, z=Z) for eta in (0.0, 0.5)
    ],
    "randn": lambda: fastddpm.randn(SHAPE, seeds=[1, 2]),
    "load": lambda: fastddpm.load("digits").state_dict(),
    "save_pretrained": lambda: saved(NET),
    "save_grid": grid,
    "UNet": lambda: NET(X, T),
    "sample": lambda: [drawn(seeds=[1, 2]), drawn("ddpm", generator=generator(), batch_size=2)],
    "Sampler": lambda: sampler(check_finite=True).sample(seeds=[1, 2], return_x0=True),
    "Sampler in bfloat16": lambda: sampler(dtype=torch.bfloat16).sample(seed=1, batch_size=2),
    "Sampler.steps": lambda: [(result.x_t, result.x0) for result in sampler().steps(seeds=[1])],
    "ddpm_loss": lambda: [
        fastddpm.ddpm_loss(model, X, SCHEDULE, seed=0, step=1),
        fastddpm.ddpm_loss(learned, X, SCHEDULE, seed=0, step=1, variance_type="learned_range"),
    ],
    "bits_per_dim": bits,
    "train": trained,
    "train_points": lambda: train_points(X[0, 0], DIFFUSION, steps=2, progress=False).state_dict(),
    "train_classifier": lambda: classifier_training.train_classifier(LABELLED, epochs=1).state_dict(),
    "measure": measured,
    "measure_steps": lambda: [
        row["error"] for row in measure_steps(NET, samplers=["ddim"], calls=[2], many=4, seeds=range(2))["rows"]
    ],
    **{f"points {name}": lambda name=name: points.draw(name, 8) for name in points.DATA_SETS},
    "forward_walk": lambda: forward_walk(X, SCHEDULE, [0, 3]),
    "ExactDenoiser": lambda: ExactDenoiser(X, SCHEDULE)(Z, T),
}
# Of no bits, or tried in the tests of what they stand in for.
OTHERS = {"BackendUnavailable", "UNetConfig", "Schedule", "accelerate"}


def bits_of(value: Any) -> Iterator[Any]:
    """Everything in a result that has bits."""
    if isinstance(value, Tensor):
        assert value.device.type == "cpu"
        yield value.dtype, tuple(value.shape), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, part in sorted(value.items()):
            yield key
            yield from bits_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from bits_of(part)
    elif isinstance(value, Schedule):
        names = [name for name, kind in vars(Schedule).items() if isinstance(kind, functools.cached_property)]
        yield from bits_of([value.betas, *(getattr(value, name) for name in names)])
    elif isinstance(value, fastddpm.Table):
        yield from bits_of([value.rows64, value.rows, value.timesteps])
    else:
        yield value


SETTINGS: dict[str, Callable[[], None]] = {
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "meta": lambda: torch.set_default_device("meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_depends_on_torchs_defaults(name: str) -> None:
    expected = list(bits_of(ENTRIES[name]()))
    assert expected
    for setting, set_default in SETTINGS.items():
        set_default()
        try:
            found = list(bits_of(ENTRIES[name]()))
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert found == expected, setting


def test_every_public_entry_is_tried() -> None:
    functions = {f"reference.{n}" for n, f in inspect.getmembers(reference, inspect.isfunction) if n[0] != "_"}
    functions = {name for name in functions if getattr(reference, name[10:]).__module__ == reference.__name__}
    makers = {f"Schedule.{name}" for name, kind in vars(Schedule).items() if isinstance(kind, classmethod)}
    wanted = {*fastddpm.__all__, *functions, *(name for name in makers if "_checked" not in name)}
    assert wanted - ENTRIES.keys() - OTHERS == {"Schedule.named"}


FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"tensor", "zeros"}
# Commands, which nobody calls with other defaults, and a module's parameters, which lie where torch's own would.
ELSEWHERE = ("cli", "diagnostics", "unet/unet.py")


def test_every_tensor_is_made_on_a_named_device() -> None:
    found = [
        f"{path}:{call.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(ELSEWHERE)
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}
        if "device" not in {keyword.arg for keyword in call.keywords}
    ]
    assert found == []
