"""`accelerate` for objects of diffusers."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, SchedulerMixin

from fastddpm.integrations.diffusers.fast import NamedAsOriginal
from fastddpm.integrations.diffusers.pipelines import FastDDIMPipeline, FastDDPMPipeline, WholeLoop
from fastddpm.integrations.diffusers.schedulers import FAST_FORM, fast_scheduler
from fastddpm.integrations.shared import check_options


def accelerate(target: Any, **options: Any) -> Any:
    """Return the fast form of a pipeline or scheduler of diffusers; `target` itself stays as it is.

    A DDPMPipeline or DDIMPipeline becomes one that runs its whole loop in a `Sampler`. Any other pipeline (conditional
    ones, custom subclasses) becomes a shallow copy with its scheduler in the fast form. Networks are shared.

    Args:
        **options: further arguments of `Sampler`, for the first kind: compile, cuda_graph, backend, check_finite, ...

    Raises:
        TypeError: there is nothing to accelerate in the target, or options were given for something without a sampler.
    """
    if isinstance(target, WholeLoop):
        return copy.copy(target).configure(**options)
    if type(target) in (DDPMPipeline, DDIMPipeline):
        fast_class: Any = FastDDPMPipeline if type(target) is DDPMPipeline else FastDDIMPipeline
        fast = fast_class(unet=target.unet, scheduler=_fast_or_raise(target.scheduler))
        for name in vars(target).keys() - vars(fast).keys():
            setattr(fast, name, vars(target)[name])
        return fast.configure(**options)
    if isinstance(target, SchedulerMixin):
        _refuse_options(target, options, "they are for whole pipelines")
        return _fast_or_raise(target)
    if isinstance(target, DiffusionPipeline) and hasattr(target, "scheduler"):
        network = next((name for name in ("unet", "transformer") if hasattr(target, name)), "unet")
        _refuse_options(
            target,
            options,
            f"its loop stays diffusers' own, with a fast scheduler. To compile its network, set pipe.{network} = "
            f"torch.compile(pipe.{network}); to convert it, use pipe.to(dtype=...)",
        )
        fast = copy.copy(target)
        fast.scheduler = _fast_or_raise(target.scheduler)
        return fast
    raise TypeError(f"cannot accelerate {type(target).__name__}; pass a pipeline or a scheduler")


def _refuse_options(target: Any, options: dict[str, Any], reason: str) -> None:
    check_options(options)
    if options:
        raise TypeError(f"{type(target).__name__} takes no options, got {', '.join(options)}: {reason}")


def _fast_or_raise(scheduler: Any) -> Any:
    fast = fast_scheduler(scheduler)
    if not isinstance(fast, NamedAsOriginal):
        raise TypeError(
            f"{type(scheduler).__name__} has no fast form; {', '.join(kind.__name__ for kind in FAST_FORM)} have one, "
            "e.g. DPMSolverMultistepScheduler.from_config(scheduler.config)"
        )
    return fast
