"""Schedulers whose step is linear: the row of a step is what diffusers' own step makes of unit vectors.

Once its scalars are known, a step of DPM-Solver++, UniPC or Euler is a weighted sum of x_t, the network's output, what
earlier steps left behind and noise. Given unit vectors for these, diffusers' code returns the weights: in its own
arithmetic, for every option that it has, and with no formula written twice. The fused operation then executes them.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.fast import FastScheduler
from fastddpm.integrations.shared import Draw
from fastddpm.schedules.diffusion import LEARNED
from fastddpm.tables.table import COLUMN, HISTORY, Table, make_rows

# Places of a unit vector: x_t, the output (or what it was converted to), older x_0 from the newest on, and what noise
# is (or another tensor that takes its place).
X, M, OLDER, Z = 0, 1, (2, 3, 4), 5
# So long that noise which a step draws by itself is lost in rounding beside it; a power of two loses nothing else.
_LENGTH = 2.0**60
_MAX_STEPS = 1024
# Columns of a row that stand for x_t, x_0 and older x_0.
_STATE = [COLUMN[name] for name in ("c_xt", "c_x0", *HISTORY)]
_SCALARS = (int, float, str, bool, type(None))


class LinearStep(NamedTuple):
    """One step of a scheduler, written as rows.

    Attributes:
        rows: float32 [R, K]: one that makes x_prev, after one that corrects x_t where there is a corrector.
        first: int64 [1], the index 0, on the same device.
        after: the scheduler's scalar attributes that the step changes, and what they become.
    """

    rows: Tensor
    first: Tensor
    after: Mapping[str, Any]


def unit(place: int) -> Tensor:
    """Return a unit vector as a state [1, 1, 6]."""
    e = torch.zeros(1, 1, Z + 1, dtype=torch.float32, device="cpu")
    e[..., place] = _LENGTH
    return e


def weights(response: Tensor) -> list[float]:
    """Return the weights that a response to unit vectors holds."""
    return (response.double().flatten() / _LENGTH).tolist()


def one_row(x_0: Tensor, x_prev: Tensor) -> Tensor:
    """Return the row [1, K] float32 that makes x_0 of (x_t, m), and x_prev of (x_t, x_0, older x_0, z)."""
    (a, b, *_), prev = weights(x_0), weights(x_prev)
    older = {name: prev[place] for name, place in zip(HISTORY, OLDER, strict=True)}
    return make_rows(1, a=a, b=b, c_x0=prev[M], c_xt=prev[X], sigma=prev[Z], **older).float()


class LinearScheduler(FastScheduler):
    """Mixin before a scheduler of diffusers that counts its steps in `step_index`."""

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    num_inference_steps: int | None
    step_index: int | None
    # What some solvers keep between steps: older x_0 with the newest last, and the last x_t.
    model_outputs: Sequence[Tensor | None] = ()
    last_sample: Tensor | None = None
    # Whether x_prev is made of the output too, not of x_0 alone.
    _use_m: ClassVar[bool] = False

    @abstractmethod
    def respond(self, timestep: Any) -> tuple[Tensor, Any]:
        """Return the rows of the next step, and a copy of this scheduler that has taken it."""

    @property
    def is_linear(self) -> bool:
        """Whether steps are what rows can express, made where the sigmas are; dynamic thresholding is not."""
        return not getattr(self.config, "thresholding", False) and self.sigmas.device.type == "cpu"

    def is_fused(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> bool:
        """Whether the fused operation takes the step; it waits for set_timesteps, and cannot be traced."""
        ready = self.is_linear and self.num_inference_steps is not None and not torch.compiler.is_compiling()
        return ready and super().is_fused(model_output, timestep, sample)

    @property
    def visited(self) -> list[float]:
        """`timesteps` as Python numbers."""
        return self.timesteps.tolist()

    def draws(self, t: float) -> bool:
        """Whether diffusers draws noise at timestep t, used or not: at all or at none."""
        return False

    @property
    def fits_a_table(self) -> bool:
        """Whether rows express a run; of an output with a variance, only steps take the half that they need."""
        return self.is_linear and getattr(self.config, "variance_type", None) not in LEARNED

    def remember(self, timestep: Any, x_0: Tensor, x_t: Tensor) -> None:
        """Keep what later steps need of this one."""

    def as_table(self, *, quiet_end: bool = False) -> Table:
        """Write the run that set_timesteps chose as a `Table`; quiet_end leaves out the last step's noise."""
        run, rows64 = copy.copy(self), []
        # The state that the corrector replaced, in terms of (x_t, x_0, older x_0) of the step.
        last = torch.zeros(len(_STATE), dtype=torch.float64, device="cpu")
        for t in self.timesteps:
            step = run.next_step(t, torch.device("cpu"))
            rows = step.rows.double()
            first, predictor = rows[0].clone(), rows[-1, _STATE]
            x_t, others = torch.zeros_like(predictor), predictor.clone()
            x_t[0], others[0] = 1.0, 0.0
            if len(rows) == 2:
                x_t = first[_STATE] + first[COLUMN["sigma"]] * last
                first[COLUMN["sigma"]] = 0.0
            first[_STATE] = predictor[0] * x_t + others
            # x_prev = w x_t + others, solved for x_t; in the next step's terms, where every x_0 is one step older.
            last = torch.cat([predictor.new_tensor([1.0, 0.0]), -predictor[1:-1]]) / predictor[0]
            rows64.append(first)
            run.remember(t, unit(M), unit(X))
            vars(run).update(step.after)
        table = torch.stack(rows64)
        if quiet_end:
            table[-1, COLUMN["sigma"]] = 0.0
        history = max((k for k, name in enumerate(HISTORY, start=1) if table[:, COLUMN[name]].any()), default=0)
        return Table(
            table,
            self.timesteps.cpu().to(torch.int64 if self.timesteps.dtype == torch.int64 else torch.float32),
            name=f"diffusers' {self._original.__name__}",
            clip=False,
            use_m=self._use_m,
            history=history,
        )

    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev and x_0; `draw` makes z, and is called where diffusers draws."""
        if getattr(self.config, "variance_type", None) in LEARNED:
            model_output = model_output[:, :3]
        step = self.next_step(timestep, x_t.device)
        dtype = torch.promote_types(model_output.dtype, x_t.dtype)
        x, x_0 = x_t.to(dtype), x_t.new_empty(x_t.shape, dtype=dtype)
        older = [x_0.to(dtype) for x_0 in self.model_outputs if x_0 is not None]

        def run(m: Tensor, rows: Tensor, z: Tensor | None, x0_out: Tensor | None) -> Tensor:
            # The ring's slot of age k is -k mod H in row 0: the oldest first. It is written into.
            history = torch.stack(older) if older else None
            return ops.p_sample(
                x, m, rows, step.first, z, clip=False, use_m=self._use_m, history=history, x0_out=x0_out
            )

        z = draw(model_output) if self.draws(0) else None
        if len(step.rows) == 2:
            x = run(model_output, step.rows[:1], self.last_sample, x_0)
            x_prev = run(x_0, step.rows[1:], z, None)
        else:
            x_prev = run(model_output, step.rows, z, x_0)
        self.remember(timestep, x_0, x)
        vars(self).update(step.after)
        return x_prev, x_0

    def next_step(self, timestep: Any, device: torch.device) -> LinearStep:
        """Return the step that is next, as rows on `device`; made once for all steps of equal settings.

        Raises:
            ValueError: it is not linear.
        """
        if not self.is_linear:
            raise ValueError(
                f"noise cannot come from seeds here: {type(self).__name__} takes diffusers' own step (for dynamic "
                "thresholding, an order above 3 or solver_p); pass a generator instead"
            )
        if self.step_index is None:
            self._init_step_index(timestep)  # type: ignore[attr-defined]
        steps: dict[Any, LinearStep] = vars(self).setdefault("_steps", {})
        # Whatever diffusers' step may read: config, scalar attributes, which tensors there are, and the sigmas.
        read = [*vars(self.config).items(), *vars(self).items()]
        settings = [(name, _plain(value)) for name, value in read]
        key = (str(device), self.sigmas.numpy().tobytes(), len(self.timesteps), *settings)
        step = steps.get(key)
        if step is None:
            with torch.inference_mode(False), torch.no_grad():
                rows, taken = self.respond(timestep)
            scalars = {name: value for name, value in vars(taken).items() if isinstance(value, _SCALARS)}
            after = {name: value for name, value in scalars.items() if value != vars(self).get(name)}
            step = LinearStep(rows.to(device), torch.zeros(1, dtype=torch.int64, device=device), after)
            if len(steps) >= _MAX_STEPS:
                steps.clear()
            steps[key] = step
        return step

    def take(self, timestep: Any, changes: Mapping[str, Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        """Let a changed copy of this scheduler take diffusers' own step; return the result and the copy."""
        taken = copy.copy(self)
        vars(taken).update(changes)
        model_output, sample = arguments
        return self._original.step(taken, model_output, timestep, sample, **options, return_dict=False), taken  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """Return what tells settings apart: scalars by value, also in lists; of everything else whether it is there."""
    if isinstance(value, _SCALARS):
        return value
    return tuple(v if isinstance(v, _SCALARS) else True for v in value) if isinstance(value, (list, tuple)) else True
