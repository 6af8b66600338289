"""The settings of a training run: what each means, its default and its range, and which of them decide the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import TYPE_CHECKING, Any

from fastddpm import checks

if TYPE_CHECKING:
    import torch

    from fastddpm.schedules.diffusion import DiffusionConfig

# lambda of Nichol & Dhariwal 2021, section 3.1.
VLB_WEIGHT = 0.001


def setting(help: str, default: Any = MISSING, *, free: bool = False, **limits: Any) -> Any:
    """Describe a setting.

    Args:
        help: what it means; `fastddpm train --help` prints it.
        default: its default.
        free: it may differ when a run is resumed: where, how long, how often; it changes no step that was taken.
        **limits: of its value, see `checks.number`; or ``kind``, its type, where the default is None.
    """
    kind = limits.pop("kind", type(default) if default is not MISSING else str)
    return field(default=default, metadata={"help": help, "free": free, "kind": kind, "limits": limits})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; the metadata of each field says what it means.

    Raises:
        ValueError: a value is unknown, of the wrong type or out of range.
    """

    data: str = setting("mnist, digits8x8, an image folder, or a .npy/.npz file")
    out: str = setting("folder for checkpoints, log and model", free=True)
    model: str | None = setting("UNet configuration (JSON); without it one that suits the images' size", None, kind=str)
    init: str | None = setting("model to start from, a folder or a shipped name, not fresh weights", None, kind=str)
    steps: int = setting("gradient steps in all", 10_000, free=True, ge=1)
    batch: int = setting("images per gradient step", 64, ge=1)
    accumulate: int = setting("passes that a step's batch is divided among", 1, ge=1)
    lr: float = setting("AdamW's learning rate between warm-up and descent", 1e-3, ge=0)
    warmup: int = setting("steps over which the learning rate rises from 0", 500, ge=0)
    decay: float = setting("last fraction of the steps, over which the learning rate falls to 0", 0.3, ge=0, le=1)
    weight_decay: float = setting("AdamW's weight decay", 0.01, ge=0)
    grad_clip: float = setting("largest norm of the gradient, 0 for no bound", 1.0, ge=0)
    ema: float = setting("decay of the weights' moving average", 0.999, ge=0, lt=1)
    dropout: float = setting("dropout in the residual blocks", 0.1, ge=0, lt=1)
    class_dropout: float = setting("how often a label becomes 'no class', a condition 0: for guidance", 0.1, ge=0, lt=1)
    flip: bool = setting("mirror images at random", False)
    seed: int = setting("seed of weights, image order, timesteps, noise and dropout", 0, ge=0, le=2**63 - 1)
    schedule: str = setting("beta schedule: linear, cosine, sigmoid_jabri, ...", "linear")
    timesteps: int = setting("T, the number of diffusion steps", 1000)
    prediction: str = setting("what the network predicts: epsilon, v, or x_0 (also called sample)", "epsilon")
    variance: str = setting("sigma: fixed_small, fixed_large, or trained: learned_range, learned", "fixed_small")
    vlb_weight: float = setting("weight of the variational bound, which trains the variance", VLB_WEIGHT, ge=0)
    loss_weight: str = setting("weight of the timesteps: uniform, min-snr or p2", "uniform")
    gamma: float | None = setting("of --loss-weight; without it the paper's (min-snr: 5, p2: 1)", None, kind=float)
    resolution: int | None = setting("crop and resize a folder's images to this side", None, kind=int, ge=1)
    value_range: str | None = setting(
        "values of black and white, as LO,HI (--value-range=-1,1), of data that do not say it", None, kind=str
    )
    background: str | None = setting("colour behind a folder's transparent pixels: white, #ff0000, ...", None, kind=str)
    channels: str | None = setting("of an array whose shape does not say it: first or last", None, kind=str)
    dtype: str = setting("float32, or bfloat16 for autocast (weights and optimiser stay float32)", "float32")
    compile: bool | str = setting("torch.compile the network; auto: on CUDA", False, free=True)
    fsdp: bool = setting("under torchrun, divide weights and optimiser among the processes", False, free=True)
    device: str = setting("auto, cpu, cuda, cuda:1, ...", "auto", free=True)
    save_every: int = setting("steps between checkpoints, 0 for one at the end", 1000, free=True, ge=0)
    sample_every: int = setting("steps between sample grids and loss plots, 0 for none", 0, free=True, ge=0)
    log_every: int = setting("steps per line of log.jsonl, which holds their mean loss", 10, free=True, ge=1)
    tensorboard: bool = setting("write TensorBoard scalars too (needs tensorboard)", False, free=True)
    resume: bool = setting("continue the run in the folder, with its settings", False, free=True)
    overwrite: bool = setting("replace the run in the folder", False, free=True)

    def __post_init__(self) -> None:
        from fastddpm.tables.table import check_weighting

        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f, getattr(self, f.name)))
        checks.one_of("dtype", self.dtype, ("float32", "bfloat16"))
        checks.one_of("compile", self.compile, ("auto", True, False))
        if self.prediction == "sample":
            object.__setattr__(self, "prediction", "x_0")
        if self.accumulate > self.batch:
            raise ValueError(f"accumulate must be at most the batch of {self.batch}, got {self.accumulate}")
        self.diffusion()
        self.data_options()
        check_weighting(self.loss_weight, self.gamma)
        for one, other in (("resume", "overwrite"), ("init", "model"), ("fsdp", "compile")):
            if getattr(self, one) and getattr(self, other) not in (None, False, "auto"):
                raise ValueError(f"{one} and {other} exclude each other")

    def diffusion(self) -> DiffusionConfig:
        """The forward process and the target, as saved beside the weights."""
        from fastddpm.schedules.diffusion import DiffusionConfig

        return DiffusionConfig(
            beta_schedule=self.schedule,
            num_timesteps=self.timesteps,
            prediction_type=self.prediction,
            variance_type=self.variance,
        )

    def data_options(self) -> dict[str, Any]:
        """How to read the data, as keywords of `load_data`.

        Raises:
            ValueError: value_range is no pair of numbers, the first below the second.
        """
        from fastddpm.data.values import parse_range

        return {
            "resolution": self.resolution,
            "value_range": parse_range(self.value_range),
            "background": self.background,
            "channels": self.channels,
        }

    @property
    def learns_variance(self) -> bool:
        """Whether the network has twice the channels, the second half for the variance."""
        from fastddpm.schedules.diffusion import LEARNED

        return self.variance in LEARNED

    def loss_options(self) -> dict[str, Any]:
        """The loss, as keywords of `ddpm_loss`."""
        return {
            "prediction_type": self.prediction,
            "weighting": self.loss_weight,
            "gamma": self.gamma,
            "variance_type": self.variance if self.learns_variance else None,
            "vlb_weight": self.vlb_weight,
        }

    def resolved_device(self) -> torch.device:
        """The device that ``device`` names; of torchrun's processes on CUDA each has its own.

        Raises:
            ValueError: there is no such device.
        """
        from fastddpm.machine.ranks import device_of_rank

        return device_of_rank(self.device)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, which a resumed run must share."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What `identity` holds by default: so was a run made that is older than a setting."""
        known = {f.name: f.default for f in dataclasses.fields(cls) if not f.metadata["free"]}
        return {name: default for name, default in known.items() if default is not MISSING}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config from stored settings.

        Raises:
            ValueError: a setting is unknown, missing or of the wrong type.
        """
        for name in values:
            checks.one_of("training setting", name, [f.name for f in dataclasses.fields(cls)])
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"unusable training settings: {error}") from error


def _checked(f: dataclasses.Field[Any], value: Any) -> Any:
    kind, limits = f.metadata["kind"], f.metadata["limits"]
    if f.name == "compile" or (value is None and f.default is None):
        return value
    if kind is float:
        return checks.number(f.name, value, **limits)
    if kind is int:
        return checks.integer(f.name, value, limits.get("ge"), limits.get("le"))
    if not isinstance(value, kind):
        raise ValueError(f"{f.name} must be {'true or false' if kind is bool else 'text'}, got {checks.shown(value)}")
    return value
