"""diffusers' DPM-Solver++, UniPC and Euler schedulers in fused operations, and the list of all that have a fast form.

What each adds to `LinearScheduler` is what its step is linear in, and what later steps need of it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastddpm.integrations.diffusers.ddim import FastDDIMScheduler
from fastddpm.integrations.diffusers.ddpm import FastDDPMScheduler
from fastddpm.integrations.diffusers.linear import OLDER, LinearScheduler, M, X, Z, one_row, unit, weights
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.shared import Draw
from fastddpm.tables.table import COLUMN, make_rows


class _MultistepScheduler(LinearScheduler):
    """What the two multistep solvers share: `model_outputs` holds older x_0, the newest last."""

    _output = SchedulerOutput

    @property
    def is_linear(self) -> bool:
        """Whether steps are what rows can express, which have three older x_0."""
        few = self.config.solver_order <= len(OLDER) and getattr(self, "solver_p", None) is None
        return few and super().is_linear

    def respond(self, timestep: Any) -> tuple[Tensor, Any]:
        """Return the rows of the next step, the corrector's before the predictor's, and a copy that has taken it."""
        e = {place: unit(place) for place in (X, M, *OLDER, Z)}
        x_0 = self.convert_model_output(e[M], sample=e[X])  # type: ignore[attr-defined]
        n = len(self.model_outputs)
        outputs = [None if m is None else e[OLDER[n - 1 - i]] for i, m in enumerate(self.model_outputs)]

        def take(last_sample: Tensor | None, **changes: Any) -> tuple[Any, Any]:
            changes |= {"model_outputs": list(outputs), "convert_model_output": lambda *_, **__: e[M]}
            if hasattr(self, "timestep_list"):
                changes |= {"timestep_list": list(self.timestep_list), "last_sample": last_sample}
            noise = {"variance_noise": e[Z]} if self._original is DPMSolverMultistepScheduler else {}
            return self.take(timestep, changes, e[M], e[X], **noise)

        (x_prev,), taken = take(None)
        if x_prev.isnan().any() and getattr(taken, "this_order", None) == 1:
            # Where the last sigma is 0, "bh1" multiplies an infinite B(h) by the 0 of order 1; "bh2" has a finite one.
            (x_prev,), taken = take(None, _internal_dict=_with(self.config, solver_type="bh2"))
        predictor = one_row(x_0, x_prev)
        if self.last_sample is None:
            return predictor, taken
        # The corrector makes x_t of the last x_t, which takes the place of noise; without one, x_t stays what it is.
        corrected = take(e[Z])[1].last_sample
        if corrected is e[X]:
            return predictor, taken
        predictor[0, COLUMN["a"]], predictor[0, COLUMN["b"]] = 0.0, 1.0
        return torch.cat([one_row(x_0, corrected), predictor]), taken

    def remember(self, timestep: Any, x_0: Tensor, x_t: Tensor) -> None:
        """Keep x_0."""
        self.model_outputs = [*self.model_outputs[1:], x_0]


def _with(config: Any, **changes: Any) -> Any:
    """Return a copy of a config in which settings, also those that were assigned as attributes, are changed."""
    changed = copy.copy(config)
    vars(changed).update({**vars(config), **changes})
    return changed


class FastDPMSolverMultistepScheduler(_MultistepScheduler, DPMSolverMultistepScheduler):
    """`diffusers.DPMSolverMultistepScheduler`, same arguments, configuration, files and numbers, on fused operations.

    `step` takes x_t to the next timestep (Lu et al. 2022) by every algorithm, order, spacing and final step of
    diffusers' class. Float64, gradients, dynamic thresholding and torch.compile take diffusers' own step.
    """

    _original = DPMSolverMultistepScheduler

    def draws(self, t: float) -> bool:
        """Whether the algorithm is one of the stochastic ones."""
        return self.config.algorithm_type.startswith("sde")

    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev and x_0; noise is float32."""
        return super().advance(model_output, timestep, x_t, lambda m: draw(m.float()).to(m.device).float())


class FastUniPCMultistepScheduler(_MultistepScheduler, UniPCMultistepScheduler):
    """`diffusers.UniPCMultistepScheduler`, as `FastDPMSolverMultistepScheduler`; orders 1 to 3, and no `solver_p`.

    `step` corrects x_t and takes it to the next timestep (Zhao et al. 2023).
    """

    _original = UniPCMultistepScheduler
    timestep_list: list[Any]

    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev in x_t's dtype, and x_0."""
        x_prev, x_0 = super().advance(model_output, timestep, x_t, draw)
        return x_prev.to(x_t.dtype), x_0

    def remember(self, timestep: Any, x_0: Tensor, x_t: Tensor) -> None:
        """Keep x_0 and the (corrected) x_t."""
        super().remember(timestep, x_0, x_t)
        self.timestep_list = [*self.timestep_list[1:], timestep]
        self.last_sample = x_t


class _EulerScheduler(LinearScheduler):
    """What the two Euler schedulers share: x_prev and x_0 are sums of x_t, the output and noise."""

    _use_m = True

    def respond(self, timestep: Any) -> tuple[Tensor, Any]:
        """Return the row of the next step, and a copy that has taken it."""
        e_x, e_m, zero = unit(X), unit(M), torch.zeros_like(unit(X))
        (x_prev, x_0), taken = self.take(timestep, {}, e_m, e_x, generator=torch.Generator().manual_seed(0))
        # What the step adds where there is nothing else is its deviation times this draw.
        (noise, _), _ = self.take(timestep, {}, zero, zero, generator=torch.Generator().manual_seed(0))
        z = draw_like(zero, torch.Generator().manual_seed(0))
        prev = weights(x_prev)
        (a, b, *_) = weights(x_0)
        row = make_rows(1, a=a, b=b, c_xt=prev[X], c_m=prev[M], sigma=float(noise[0, 0, 0] / z[0, 0, 0]))
        return row.float(), taken

    def is_fused(
        self, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float = 0.0, **options: Any
    ) -> bool:
        """Whether the fused operation takes the step; churn, and to refuse whole numbers, are diffusers'."""
        whole = isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))
        return s_churn <= 0 and not whole and super().is_fused(model_output, timestep, sample)

    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev in the output's dtype, and x_0."""
        x_prev, x_0 = super().advance(model_output, timestep, x_t, draw)
        return x_prev.to(model_output.dtype), x_0


class FastEulerDiscreteScheduler(_EulerScheduler, EulerDiscreteScheduler):
    """`diffusers.EulerDiscreteScheduler`, as `FastDPMSolverMultistepScheduler`; with churn it takes diffusers' step.

    `step` takes x_t to the next sigma (Karras et al. 2022).
    """

    _original, _output = EulerDiscreteScheduler, EulerDiscreteSchedulerOutput


class FastEulerAncestralDiscreteScheduler(_EulerScheduler, EulerAncestralDiscreteScheduler):
    """`diffusers.EulerAncestralDiscreteScheduler`, as `FastDPMSolverMultistepScheduler`.

    `step` takes x_t to the next sigma, with noise.
    """

    _original, _output = EulerAncestralDiscreteScheduler, EulerAncestralDiscreteSchedulerOutput

    def draws(self, t: float) -> bool:
        """Always, also where the deviation is 0."""
        return True


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
    vars(fast).update(vars(scheduler))
    return fast
