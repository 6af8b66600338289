"""Tables that were fitted to one model: their file beside its weights, and the choice among them.

Such a table is the "fast" solver's at levels of its own, with other coefficients and told timesteps. It fits one set of
weights, one diffusion and one guidance weight; for any other it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastddpm.checks import number, printable, shown
from fastddpm.files.safejson import read_object, to_json
from fastddpm.files.tensors import refuse_escape
from fastddpm.machine.packages import weights_digest
from fastddpm.sampling.conditions import Weight
from fastddpm.schedules.diffusion import DiffusionConfig
from fastddpm.tables.by_name import make_table
from fastddpm.tables.table import COLUMN, HISTORY, Table

TUNED = "tuned.json"
# Far above the coefficients of any solver that is stable.
_LARGEST = 1e3


@dataclass(frozen=True)
class Tuned:
    """A fitted table.

    Attributes:
        guidance: the weight it is for.
        levels: timesteps of the noise levels that the state passes, descending.
        timesteps: what the network is told at each.
        coefficients: c_xt, c_x0, c_1 ... of each row.
        error_before: of the solver, on samples that were held out of the fit: root mean square distance to the result
            of many steps from the same x_T, over the samples' standard deviation.
        error_after: that of this table.
        samples: how many were held out.
    """

    guidance: float
    levels: Sequence[float]
    timesteps: Sequence[float]
    coefficients: Sequence[Sequence[float]]
    error_before: float
    error_after: float
    samples: int

    def table(self, config: DiffusionConfig) -> Table:
        """Build the table.

        Raises:
            ValueError: the numbers do not fit each other or the schedule.
        """
        n, last = len(self.levels), config.num_timesteps - 1.0
        width = len(self.coefficients[0]) if self.coefficients else 0
        lengths = {len(self.timesteps), len(self.coefficients)}
        if lengths != {n} or {len(row) for row in self.coefficients} != {width} or width - 2 not in range(4):
            raise ValueError("levels, timesteps and coefficients of 2 to 5 columns must have a row for each step")
        told = [number("timesteps", t, ge=0.0, le=last) for t in self.timesteps]
        values = [[number("coefficients", c, ge=-_LARGEST, le=_LARGEST) for c in row] for row in self.coefficients]
        levels = [number("levels", t, ge=0.0, le=last) for t in self.levels]
        solver = make_table("fast", config, timesteps=levels, guided=self.guidance != 1.0)
        rows64 = solver.rows64.clone()
        rows64[:, [COLUMN[name] for name in ("c_xt", "c_x0", *HISTORY)]] = 0.0
        rows64[:, [COLUMN[name] for name in columns(width - 2)]] = rows64.new_tensor(values)
        timesteps = torch.tensor(told, dtype=torch.float32, device="cpu")
        return replace(solver, rows64=rows64, timesteps=timesteps, name="tuned", history=width - 2)


def columns(history: int) -> tuple[str, ...]:
    """Return the fitted columns of rows that read so many older x_0."""
    return ("c_xt", "c_x0", *HISTORY[:history])


def read_tuned(path: Path, model: nn.Module, config: DiffusionConfig) -> list[Tuned]:
    """Read a model's tables.

    Raises:
        ValueError: it is damaged, or its tables were fitted to other weights or to another diffusion.
    """
    found = read_object(path)
    try:
        _expect_keys("the file", found, ("diffusion", "tables", "weights"))
        if found["weights"] != weights_digest(model):
            raise ValueError("its tables were fitted to other weights; fit them again with: fastddpm tune --overwrite")
        if found["diffusion"] != config.to_dict():
            raise ValueError("its tables were fitted under another diffusion: schedule, prediction type or clipping")
        if not isinstance(found["tables"], list):
            raise ValueError(f"tables must be a list, got {shown(found['tables'])}")
        tables = [_parse(entry) for entry in found["tables"]]
        for tuned in tables:
            tuned.table(config)
    except (ValueError, TypeError) as error:
        raise ValueError(printable(f"{path}: {error}")) from None
    return tables


def tuned_bytes(tables: Sequence[Tuned], model: nn.Module, config: DiffusionConfig) -> bytes:
    """Return what the file of a model's tables holds."""
    entries = [asdict(tuned) for tuned in tables]
    return to_json({"weights": weights_digest(model), "diffusion": config.to_dict(), "tables": entries})


def tuned_table(model: Any, config: DiffusionConfig, guidance: Weight = 1.0, steps: int | None = None) -> Table:
    """Build a table that was fitted to a model.

    Args:
        model: a network from `fastddpm.load`.
        config: what it was trained for.
        guidance: the weight that the table was fitted with.
        steps: how many; by default the fewest that there are.

    Raises:
        FileNotFoundError: the model has none.
        ValueError: none is for these steps and this guidance, or they are not the model's.
    """
    folder = getattr(model, "folder", None)
    if folder is None or not (folder / TUNED).exists():
        raise FileNotFoundError(f"{folder or 'the model'}: no {TUNED}; fit one with: fastddpm tune --model FOLDER")
    refuse_escape(folder / TUNED, folder)
    tables = read_tuned(folder / TUNED, model, config)
    one = guidance if isinstance(guidance, (int, float)) else None
    fitting = {len(tuned.levels): tuned for tuned in tables if tuned.guidance == one}
    if not fitting or (steps is not None and steps not in fitting):
        known = ", ".join(f"{len(tuned.levels)} (guidance {tuned.guidance:g})" for tuned in tables) or "none"
        raise ValueError(
            f"no tuned table of {'any' if steps is None else steps} steps for guidance {guidance}; there are: {known}"
        )
    return fitting[min(fitting) if steps is None else steps].table(config)


def _parse(entry: Any) -> Tuned:
    if not isinstance(entry, dict):
        raise ValueError(f"a table must be an object, got {shown(entry)}")
    _expect_keys("a table", entry, [field.name for field in fields(Tuned)])
    for name in ("levels", "timesteps", "coefficients"):
        if not isinstance(entry[name], list):
            raise ValueError(f"{name} must be a list, got {shown(entry[name])}")
    if not all(isinstance(row, list) for row in entry["coefficients"]):
        raise ValueError("coefficients must be a list of lists")
    for name in ("guidance", "error_before", "error_after", "samples"):
        number(name, entry[name])
    return Tuned(**entry)


def _expect_keys(what: str, found: dict[str, Any], names: Sequence[str]) -> None:
    if set(found) != set(names):
        raise ValueError(f"{what} must have the keys {', '.join(names)}, got {shown(sorted(found))}")
