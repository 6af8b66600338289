"""The settings of a training run, checked, and which of them decide its result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastddpm.machine.devices import resolve_device
from fastddpm.schedules.diffusion import LEARNED, DiffusionConfig
from fastddpm.tables.table import check_weighting
from fastddpm.training.bound import VLB_WEIGHT

DTYPES = ("float32", "bfloat16")

# What may differ when a run is resumed: where, how long, how often; none of them changes a step that was taken.
FREE_ON_RESUME = (
    *("out", "steps", "save_every", "sample_every", "log_every", "tensorboard"),
    *("compile", "device", "resume", "overwrite"),
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        data: "mnist", "digits8x8", an image folder, or a .npy/.npz file.
        out: the folder that receives checkpoints, log and model.
        model: a UNet configuration (JSON file); default: one that suits the images' size.
        init: a model to start from instead of fresh weights: a folder, or the name of a shipped one.
        steps: gradient steps in all.
        batch: images per gradient step.
        accumulate: forward/backward passes a step's batch is divided among.
        lr: AdamW's learning rate between warm-up and descent.
        warmup: steps over which the rate rises from 0.
        decay: last fraction of the steps, over which the rate falls to 0.
        weight_decay: AdamW's.
        grad_clip: largest norm of the gradient; 0 for no bound.
        ema: decay of the weights' moving average.
        dropout: in the residual blocks.
        class_dropout: how often a label becomes "no class" (for classifier-free guidance).
        flip: mirror images at random.
        seed: of weights, image order, timesteps, noise and dropout; 0 <= seed < 2^63.
        schedule: beta schedule, a name of `Schedule.named`.
        timesteps: T.
        prediction: what the network learns to predict: "epsilon", "x_0" or "v".
        variance: sigma while sampling: "fixed_small", "fixed_large", or one that the network learns in further channels
            by L_hybrid: "learned_range", "learned".
        vlb_weight: lambda of L_hybrid.
        loss_weight: of the timesteps: "uniform", "min-snr" or "p2".
        gamma: of the weighting; default: its paper's.
        resolution: side that a folder's images are cropped and resized to.
        dtype: "float32", or "bfloat16" for autocast (weights and optimiser stay float32).
        compile: compile the network with torch.compile.
        device: "auto", "cpu" or "cuda[:i]".
        save_every: steps between checkpoints; 0 for one at the end.
        sample_every: steps between sample grids and loss plots; 0 for none.
        log_every: steps per line of the log, which holds their mean loss.
        tensorboard: write the log's scalars for TensorBoard too.
        resume: continue the run in ``out``, if there is one.
        overwrite: replace the run in ``out``.

    Raises:
        ValueError: a value is out of range.
    """

    data: str
    out: str
    model: str | None = None
    init: str | None = None
    steps: int = 10_000
    batch: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 500
    decay: float = 0.3
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999
    dropout: float = 0.1
    class_dropout: float = 0.1
    flip: bool = False
    seed: int = 0
    schedule: str = "linear"
    timesteps: int = 1000
    prediction: str = "epsilon"
    variance: str = "fixed_small"
    vlb_weight: float = VLB_WEIGHT
    loss_weight: str = "uniform"
    gamma: float | None = None
    resolution: int | None = None
    dtype: str = "float32"
    compile: bool = False
    device: str = "auto"
    save_every: int = 1000
    sample_every: int = 0
    log_every: int = 10
    tensorboard: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("accumulate", 1), ("log_every", 1), ("warmup", 0)):
            self._require(name, getattr(self, name) >= low, f"at least {low}")
        for name in ("save_every", "sample_every"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("lr", "weight_decay", "grad_clip", "vlb_weight"):
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= 0, "finite and at least 0")
        for name in ("ema", "dropout", "class_dropout"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("decay", 0 <= self.decay <= 1, "in [0, 1]")
        self._require("seed", 0 <= self.seed < 2**63, "in 0..2^63-1")
        self._require("accumulate", self.accumulate <= self.batch, f"at most the batch of {self.batch}")
        self._require("resolution", self.resolution is None or self.resolution >= 1, "at least 1")
        self._require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self.diffusion()
        check_weighting(self.loss_weight, self.gamma)
        for one, other in (("resume", "overwrite"), ("init", "model")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"{one} and {other} exclude each other")

    def _require(self, name: str, ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def diffusion(self) -> DiffusionConfig:
        """The forward process and the target, as saved beside the weights."""
        return DiffusionConfig(
            beta_schedule=self.schedule,
            num_timesteps=self.timesteps,
            prediction_type=self.prediction,
            variance_type=self.variance,
        )

    @property
    def learns_variance(self) -> bool:
        """Whether the network has twice the channels, the second half for the variance."""
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
        """The device that ``device`` names.

        Raises:
            ValueError: there is no such device.
        """
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return resolve_device(name)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result, which a resumed run must share."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE_ON_RESUME}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What `identity` holds by default: so was a run made that is older than a setting."""
        known = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
        return {k: v for k, v in known.items() if k not in FREE_ON_RESUME}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Rebuild a config from stored settings.

        Raises:
            ValueError: a setting is unknown, missing or of the wrong type.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"unusable training settings: {error}") from error
