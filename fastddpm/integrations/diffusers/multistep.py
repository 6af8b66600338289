"""diffusers' DPMSolverMultistepScheduler and UniPCMultistepScheduler with their arithmetic in fused operations."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.linear import OLDER, LinearScheduler, M, X, Z, one_row, unit
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.shared import Draw
from fastddpm.schedules.diffusion import LEARNED
from fastddpm.tables.table import COLUMN


class _MultistepScheduler(LinearScheduler):
    """What the two multistep solvers share: `model_outputs` holds older x_0, the newest last."""

    model_outputs: list[Tensor | None]
    timestep_list: list[Any]
    last_sample: Tensor | None

    @property
    def is_linear(self) -> bool:
        """Whether steps are what rows can express, which have three older x_0."""
        few = self.config.solver_order <= len(OLDER) and getattr(self, "solver_p", None) is None
        return few and super().is_linear

    def draws(self, t: float) -> bool:
        """Whether the algorithm is one of the stochastic ones."""
        return str(getattr(self.config, "algorithm_type", "")).startswith("sde")

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
        if getattr(self, "last_sample", None) is None:
            return predictor, taken
        # The corrector makes x_t of the last x_t, which takes the place of noise; without one, x_t stays what it is.
        corrected = take(e[Z])[1].last_sample
        if corrected is e[X]:
            return predictor, taken
        predictor[0, COLUMN["a"]], predictor[0, COLUMN["b"]] = 0.0, 1.0
        return torch.cat([one_row(x_0, corrected), predictor]), taken

    def advance(self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return x_prev and x_0; `draw` makes z, and is called where diffusers draws."""
        if getattr(self.config, "variance_type", None) in LEARNED:
            model_output = model_output[:, :3]
        step = self.next_step(timestep, x_t.device)
        dtype = torch.promote_types(model_output.dtype, x_t.dtype)
        x, m, x_0 = x_t.to(dtype), model_output, x_t.new_empty(x_t.shape, dtype=dtype)
        older = [x_0 for x_0 in self.model_outputs if x_0 is not None]
        z = draw(m) if self.draws(0) else None
        if len(step.rows) == 2:
            x = self._execute(step.rows[:1], step.first, m, x, self.last_sample, older, x_0)
            m = x_0
        x_prev = self._execute(step.rows[-1:], step.first, m, x, z, older, x_0 if m is model_output else None)
        self.remember(timestep, x_0, x)
        vars(self).update(step.after)
        return x_prev, x_0

    def remember(self, timestep: Any, x_0: Tensor, x_t: Tensor) -> None:
        """Keep x_0, and for UniPC the (corrected) x_t."""
        self.model_outputs = [*self.model_outputs[1:], x_0]
        if hasattr(self, "timestep_list"):
            self.timestep_list = [*self.timestep_list[1:], timestep]
            self.last_sample = x_t

    def _execute(
        self,
        rows: Tensor,
        row: Tensor,
        m: Tensor,
        x: Tensor,
        z: Tensor | None,
        older: Sequence[Tensor],
        x_0: Tensor | None,
    ) -> Tensor:
        # The ring's slot of age k is -k mod H in row 0: the oldest first.
        history = torch.stack([x_0.to(x.dtype) for x_0 in older]) if older else None
        return ops.p_sample(x, m, rows, row, z, clip=False, history=history, x0_out=x_0)


def _with(config: Any, **changes: Any) -> Any:
    """Return a copy of a config in which settings, also those that were assigned as attributes, are changed."""
    changed = copy.copy(config)
    vars(changed).update({**vars(config), **changes})
    return changed


class FastDPMSolverMultistepScheduler(_MultistepScheduler, DPMSolverMultistepScheduler):
    """`diffusers.DPMSolverMultistepScheduler`, same arguments, configuration, files and numbers, on fused operations.

    Every algorithm, order, spacing and final step of diffusers' class. Float64, gradients, dynamic thresholding and
    torch.compile take diffusers' own step.
    """

    _original = DPMSolverMultistepScheduler

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take x_t to the next timestep (Lu et al. 2022); see `diffusers.DPMSolverMultistepScheduler.step`."""
        if not self.is_fused(model_output, sample):
            return super().step(model_output, timestep, sample, generator, variance_noise, return_dict)

        def draw(m: Tensor) -> Tensor:
            return draw_like(m.float(), generator) if variance_noise is None else variance_noise.to(m.device).float()

        x_prev, x_0 = self.advance(model_output, timestep, sample, draw)
        x_prev = x_prev.to(x_0.dtype)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)


class FastUniPCMultistepScheduler(_MultistepScheduler, UniPCMultistepScheduler):
    """`diffusers.UniPCMultistepScheduler`, as `FastDPMSolverMultistepScheduler`; orders 1 to 3, and no `solver_p`."""

    _original = UniPCMultistepScheduler

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Correct x_t and take it to the next timestep (Zhao et al. 2023); see `diffusers.UniPCMultistepScheduler`."""
        if not self.is_fused(model_output, sample):
            return super().step(model_output, timestep, sample, return_dict)
        x_prev = self.advance(model_output, timestep, sample, draw_like)[0].to(sample.dtype)
        return SchedulerOutput(prev_sample=x_prev) if return_dict else (x_prev,)
