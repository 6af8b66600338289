"""What both schedulers do with a row: execute it, or the whole run as a `Table`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.integrations.diffusers.noising import Noising
from fastddpm.tables.table import COLUMN, Table


class FusedScheduler(Noising):
    """Mixin before one of diffusers' scheduler classes."""

    @property
    def clips(self) -> bool:
        """Whether x_0 is clipped to a fixed range; dynamic thresholding takes precedence, as in diffusers."""
        return bool(self.config.clip_sample) and not self.config.thresholding

    @property
    def bound(self) -> float:
        """The clipping range, inf for none."""
        return float(self.config.clip_sample_range) if self.clips else float("inf")

    @property
    def fits_a_table(self) -> bool:
        """Whether rows that are the same for all samples express a run; dynamic thresholding makes them per sample."""
        return not self.config.thresholding

    def tabulate(self, options: dict[str, Any], *, quiet_end: bool, **flags: bool) -> Table:
        """Write the run that set_timesteps chose as a `Table`; quiet_end leaves out the last step's noise.

        Raises:
            IndexError: a timestep is out of range.
        """
        for t in self.visited():
            self.check_timestep(t)
        rows64 = self.step_rows(**options)[self.listed()].double()
        if quiet_end:
            rows64[-1, COLUMN["sigma"]] = 0.0
        return Table(rows64, self.listed(), name=f"diffusers' {self._original.__name__}", clip=self.clips, **flags)

    def execute(
        self,
        rows: Tensor,
        row: Tensor,
        output: Tensor,
        x_t: Tensor,
        z: Tensor | None,
        *,
        learned: bool = False,
        use_m: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run one row of a table; return x_prev and x_0, both in the dtype that x_t and the output promote to."""
        dtype = torch.promote_types(output.dtype, x_t.dtype)
        x_t = x_t.to(dtype)
        scale = None
        if self.config.thresholding:
            m = output[:, : x_t.shape[1]] if learned else output
            scale, rows = self._dynamic_rows(rows[row], x_t, m)
            row = torch.arange(len(rows), device=rows.device)
        # Divided by s before its only rounding, so float32 until then.
        x_0 = x_t.new_empty(x_t.shape, dtype=dtype if scale is None else torch.float32)
        x_prev = ops.p_sample(
            x_t,
            output,
            rows,
            row,
            z,
            clip=self.clips or scale is not None,
            learned=learned,
            use_m=use_m,
            x0_out=x_0,
        )
        return x_prev, x_0 if scale is None else (x_0 / scale).to(dtype)

    def _dynamic_rows(self, row: Tensor, x_t: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Return s [B, 1, ...] and one row per sample that clips x_0 to [-s, s] and divides it by s.

        s is a quantile of |x_0| of the sample, at least 1 and at most sample_max_value (Saharia et al. 2022, section
        2.3); where that is below 1, it wins, as in diffusers.
        """
        x_0 = row[:, COLUMN["a"], None] * x_t.float().flatten(1) + row[:, COLUMN["b"], None] * m.float().flatten(1)
        s = torch.quantile(x_0.abs(), self.config.dynamic_thresholding_ratio, dim=1)
        s = torch.clamp(s, min=1, max=self.config.sample_max_value)
        rows = row.repeat(len(s), 1)
        rows[:, COLUMN["lo"]], rows[:, COLUMN["hi"]] = -s, s
        rows[:, COLUMN["c_x0"]] /= s
        return s.view(-1, *[1] * (x_t.dim() - 1)), rows
