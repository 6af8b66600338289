"""What a network was trained for: the schedule, the target and the variance, as one frozen record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from fastddpm.checks import number, one_of, shown
from fastddpm.schedules.betas import SCHEDULES, check_ends, check_num_timesteps, named_betas
from fastddpm.schedules.schedule import Schedule, warn_unless_gaussian_end

_FLOAT32 = torch.finfo(torch.float32)
PREDICTION_TYPES = ("epsilon", "x_0", "v")
LEARNED = ("learned", "learned_range")
VARIANCE_TYPES = ("fixed_small", "fixed_large", *LEARNED)

# The schedules that take the ends of beta; the others have a fixed shape.
_SCHEDULES_WITH_ENDS = ("linear", "linear_rescaled", "scaled_linear", "sigmoid_geodiff")

# diffusers' names on the left; whatever else a scheduler calls by these names means the same.
_BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid_geodiff",
    "laplace": "laplace",
}
_PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "v"}
# fixed_small_log has the same standard deviation; diffusers' own fixed_large_log gives NaN, and means fixed_large.
_VARIANCE_TYPES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
# Solvers for networks trained by the same processes, which only choose how to sample: all their other keys are skipped.
_SOLVERS = (
    *("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler"),
    *("DPMSolverSDEScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "RePaintScheduler"),
)
# Keys of theirs that ask for another process, with the only value that does not.
_SAME_PROCESS = {"use_flow_sigmas": False, "timestep_type": "discrete"}
_BOOLEANS = ("clip_sample", "thresholding", "rescale_betas_zero_snr")
# Marks a "learned" variance as OpenAI's log-variance; diffusers skips keys that begin with an underscore.
_LOG_VARIANCE_KEY = "_fastddpm_learned_is_log_variance"
# How a run visits the timesteps is the sampler's choice, not a property of the network.
_SAMPLING_KEYS = ("timestep_spacing", "steps_offset", "set_alpha_to_one", "skip_prk_steps", "variance_type")
# Fields that diffusers has too, and what it calls them; then the other keys that are read.
_SAME_FIELDS = {
    "num_timesteps": "num_train_timesteps",
    **{name: name for name in ("beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")},
}
_READ_KEYS = (
    *(*_SAME_FIELDS.values(), "beta_schedule", "clip_sample", "clip_sample_range", "prediction_type", "thresholding"),
    *("dynamic_thresholding_ratio", "sample_max_value"),
)


@dataclass(frozen=True)
class DiffusionConfig:
    """Record the forward process and what the network predicts.

    Args:
        beta_schedule: a name of `fastddpm.schedules.betas.SCHEDULES`.
        num_timesteps: T.
        beta_start: first beta, for the schedules that take one.
        beta_end: last beta, for the schedules that take one.
        trained_betas: explicit betas [T], which replace the four above.
        rescale_betas_zero_snr: apply `Schedule.zero_terminal_snr`.
        prediction_type: "epsilon", "x_0" or "v".
        variance_type: "fixed_small", "fixed_large", "learned" (log-variance output) or "learned_range".
        clip_range: bound on |x_0| while sampling; None for no clipping.

    Raises:
        ValueError: a value is unknown, of the wrong type or out of range.
    """

    beta_schedule: str = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    variance_type: str = "fixed_small"
    clip_range: float | None = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_timesteps", check_num_timesteps(self.num_timesteps))
        check_ends(self.beta_start, self.beta_end)
        check_clip_range(self.clip_range)
        one_of("beta_schedule", self.beta_schedule, SCHEDULES)
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        one_of("variance_type", self.variance_type, VARIANCE_TYPES)
        one_of("rescale_betas_zero_snr", self.rescale_betas_zero_snr, (True, False))
        if self.trained_betas is not None:
            object.__setattr__(self, "trained_betas", self._checked_betas(self.trained_betas))

    def _checked_betas(self, trained_betas: Any) -> tuple[float, ...]:
        if not isinstance(trained_betas, (list, tuple)):
            raise ValueError(f"trained_betas must be a list of numbers, got {type(trained_betas).__name__}")
        if len(trained_betas) != self.num_timesteps:
            raise ValueError(
                f"trained_betas has {len(trained_betas)} values, but num_timesteps is {self.num_timesteps}"
            )
        return tuple(number(f"trained_betas[{t}]", beta) for t, beta in enumerate(trained_betas))

    def schedule(self) -> Schedule:
        """Build the schedule; warn when it does not end near a Gaussian.

        Raises:
            ValueError: the betas leave (0, 1), or alphas_cumprod reaches 0 before the last step.
        """
        schedule = Schedule(self._betas())
        if self.rescale_betas_zero_snr:
            schedule = schedule.zero_terminal_snr()
        warn_unless_gaussian_end(schedule)
        return schedule

    def _betas(self) -> torch.Tensor:
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64, device="cpu")
        ends = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        options = ends if self.beta_schedule in _SCHEDULES_WITH_ENDS else {}
        return named_betas(self.beta_schedule, self.num_timesteps, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON types."""
        trained_betas = self.trained_betas
        return {**asdict(self), "trained_betas": None if trained_betas is None else list(trained_betas)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiffusionConfig:
        """Rebuild a config from `to_dict`'s result; missing fields take their defaults.

        Raises:
            ValueError: a key is unknown, or a value out of range.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in the diffusion config: {', '.join(unknown)}")
        return cls(**values)

    def to_scheduler_config(self) -> dict[str, Any]:
        """Return diffusers' scheduler_config.json, such that DDPMScheduler.from_config rebuilds this process."""
        by_value = {ours: theirs for theirs, ours in _BETA_SCHEDULES.items()}
        values = self.to_dict()
        if self.trained_betas is None and self.beta_schedule not in by_value:
            values["trained_betas"] = self._betas().tolist()
        config: dict[str, Any] = {
            "_class_name": "DDPMScheduler",
            **{theirs: values[ours] for ours, theirs in _SAME_FIELDS.items()},
            "beta_schedule": by_value.get(self.beta_schedule, "linear"),
            "variance_type": self.variance_type,
            "clip_sample": self.clip_range is not None,
            "clip_sample_range": 1.0 if self.clip_range is None else self.clip_range,
            "prediction_type": {ours: theirs for theirs, ours in _PREDICTION_TYPES.items()}[self.prediction_type],
            "timestep_spacing": "linspace",
        }
        if self.variance_type == "learned":
            config[_LOG_VARIANCE_KEY] = True
        return config

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> DiffusionConfig:
        """Read diffusers' scheduler_config.json: of DDPMScheduler, DDIMScheduler and their kin, or of a solver.

        Keys that begin with an underscore and those that only choose the timesteps visited are ignored.

        Raises:
            ValueError: a key or value is unknown, or names a feature that has no equivalent.
        """
        public = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(set(public) - set(_READ_KEYS) - set(_SAMPLING_KEYS))
        if unknown and config.get("_class_name") not in _SOLVERS:
            raise ValueError(f"unknown keys in the scheduler config: {', '.join(map(shown, unknown))}")
        for key, same in _SAME_PROCESS.items():
            if public.get(key, same) != same:
                raise ValueError(
                    f"{key} is {shown(public[key])} in the scheduler config: another process than a DDPM's"
                )
        for key in set(_READ_KEYS) & set(public):
            if public[key] in (math.inf, -math.inf) or (key in _BOOLEANS and not isinstance(public[key], bool)):
                raise ValueError(
                    f"{key} must be {'true or false' if key in _BOOLEANS else 'finite'} in the scheduler config, got "
                    f"{shown(public[key])}"
                )
        if public.get("thresholding"):
            raise ValueError("thresholding is true in the scheduler config, and dynamic thresholding is not supported")
        # Some solvers write null, where the network has no variance for them.
        variance_type = public.get("variance_type") or "fixed_small"
        if variance_type == "learned" and not config.get(_LOG_VARIANCE_KEY):
            raise ValueError(
                "variance_type 'learned' of diffusers takes the output as the variance itself, which has no equivalent "
                "here; use 'learned_range', or a fixed variance"
            )
        clip = public.get("clip_sample", True)
        return cls(
            beta_schedule=_translate("beta_schedule", public.get("beta_schedule", "linear"), _BETA_SCHEDULES),
            **{name: public[key] for name, key in _SAME_FIELDS.items() if key in public},
            prediction_type=_translate("prediction_type", public.get("prediction_type", "epsilon"), _PREDICTION_TYPES),
            variance_type=_translate("variance_type", variance_type, _VARIANCE_TYPES | {"learned": "learned"}),
            clip_range=public.get("clip_sample_range", 1.0) if clip else None,
        )


def _translate(field: str, value: Any, names: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"unknown {field} {value!r} in the scheduler config; known: {', '.join(names)}")
    return names[value]


def check_clip_range(clip_range: float | None) -> None:
    """Raise unless clip_range is None (no clipping) or a positive finite number."""
    if clip_range is None:
        return
    try:
        # A float32 of the rows holds it.
        number("clip_range", clip_range, ge=_FLOAT32.tiny, le=_FLOAT32.max)
    except ValueError:
        raise ValueError(
            f"clip_range must be positive and finite in float32, or None for no clipping; got {shown(clip_range)}"
        ) from None
