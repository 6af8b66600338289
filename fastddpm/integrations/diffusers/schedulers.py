"""The schedulers of diffusers that have a fast form."""

from __future__ import annotations

from typing import Any

from fastddpm.integrations.diffusers.ddim import FastDDIMScheduler
from fastddpm.integrations.diffusers.ddpm import FastDDPMScheduler
from fastddpm.integrations.diffusers.euler import FastEulerAncestralDiscreteScheduler, FastEulerDiscreteScheduler
from fastddpm.integrations.diffusers.multistep import FastDPMSolverMultistepScheduler, FastUniPCMultistepScheduler

_FAST: tuple[Any, ...] = (
    FastDDPMScheduler,
    FastDDIMScheduler,
    FastDPMSolverMultistepScheduler,
    FastUniPCMultistepScheduler,
    FastEulerDiscreteScheduler,
    FastEulerAncestralDiscreteScheduler,
)
FAST_FORM: dict[type, Any] = {fast._original: fast for fast in _FAST}


def fast_scheduler(scheduler: Any) -> Any:
    """Return a scheduler in its fast form, its present state included, where it has one; others as they are."""
    fast_class = FAST_FORM.get(type(scheduler))
    if fast_class is None:
        return scheduler
    fast = fast_class.from_config(scheduler.config)
    for name, value in vars(scheduler).items():
        setattr(fast, name, value)
    return fast
