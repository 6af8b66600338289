"""What a step leaves behind, and a run between two steps: all that it needs to go on, in memory or as a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastddpm.checks import integer
from fastddpm.files.atomic import write_files
from fastddpm.files.run_folder import differences
from fastddpm.files.safejson import parse_object
from fastddpm.files.tensors import SafetensorsFile
from fastddpm.noise.v1 import NOISE_VERSION
from fastddpm.sampling import changes
from fastddpm.sampling.conditions import Guidance
from fastddpm.sampling.network import Model
from fastddpm.sampling.options import Options
from fastddpm.sampling.request import Request
from fastddpm.sampling.step import StaticStep
from fastddpm.tables.table import Table

FORMAT = "fastddpm-state-1"
X0 = TypeVar("X0")
# Buffers of a step that the next one reads.
_BUFFERS = ("x_t", "history", "x0_in")
# Of a request, what only its first step reads. All else is held, whatever fields a request has.
_START = ("x_T", "init")
# No keyword argument is called so.
_TENSOR = "a tensor"


@dataclass(frozen=True)
class State:
    """A run that stopped between two steps, see `Sampler.resume`.

    Attributes:
        row: the next row of the table.
        buffers: x_t, and what else the next step reads of earlier ones.
        request: what was asked for.
        origin: what made them: noise version, digests of table and weights, the network's dtype, the sample's shape.
    """

    row: int
    buffers: dict[str, Tensor]
    request: Request
    origin: dict[str, Any]

    @classmethod
    def of(cls, step: StaticStep, request: Request, row: int, origin: Callable[[], dict[str, Any]]) -> State:
        """Copy it from the buffers of a step that has gone on to a row."""
        held = {name: getattr(step, name) for name in _BUFFERS}
        return cls(row, {name: x.clone() for name, x in held.items() if x is not None}, request, origin())

    def itself(self) -> State:
        """Return it: the state of a `StepResult` that was copied."""
        return self

    def restore(self, step: StaticStep) -> int:
        """Write it into the buffers of a step that has loaded its request; return the next row."""
        for name, x in self.buffers.items():
            getattr(step, name).copy_(x)
        step.rewind(self.row)
        step.feed_network()
        return self.row

    def refuse_unless(self, origin: dict[str, Any]) -> None:
        """Raise ValueError unless it is of that origin."""
        if changed := differences(self.origin, origin):
            raise ValueError(f"the state is of another run than this sampler's: {'; '.join(changed)}")

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            ValueError: the run depends on what no file can hold: a generator, a function or another object.
        """
        request = {name: value for name, value in vars(self.request).items() if name not in _START}
        held = {"row": self.row, "buffers": self.buffers, "request": request}
        tensors: dict[str, Tensor] = {}
        state = {"format": FORMAT, "origin": self.origin, **_packed("state", held, tensors)}
        write_files({Path(path): save(tensors, {"state": json.dumps(state, allow_nan=False)})})

    @classmethod
    def load(cls, path: Path | str) -> State:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is damaged, or another file.
        """
        path = Path(path)
        file = SafetensorsFile(path)
        state = parse_object(file.metadata.get("state", "{}").encode(), source=f"{path}: its state")
        if state.get("format") != FORMAT:
            raise ValueError(f"{path} is no {FORMAT} file")
        try:
            with safe_open(path, framework="pt") as opened:
                held = _unpacked(state, {name: opened.get_tensor(name) for name in file.tensors})
            row, buffers, given = integer("row", held["row"], 0), held["buffers"], held["request"]
            fields: dict[str, Any] = {**given, **dict.fromkeys(_START), "guidance": Guidance(*given["guidance"])}
            request = Request(**fields)
            size = [len(request.seed), *state["origin"]["shape"]]
            if list(buffers["x_t"].shape) != size:
                raise ValueError(f"x_t has shape {list(buffers['x_t'].shape)} for samples of {size}")
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return cls(row, buffers, request, state["origin"])


def _packed(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON, and add its tensors, which stand there by their names."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _packed(f"{name}.{key}", part, tensors) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_packed(f"{name}.{i}", part, tensors) for i, part in enumerate(value)]
    if not isinstance(value, int | float | str | None):
        raise ValueError(f"{name} is a {type(value).__name__}: generator=, noise= and cond_fn= cannot be saved")
    return value


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_unpacked(part, tensors) for part in value)
    if isinstance(value, dict):
        return tensors[value[_TENSOR]] if _TENSOR in value else {k: _unpacked(v, tensors) for k, v in value.items()}
    return value


def _no_state() -> State:
    raise ValueError("only steps of a Sampler have a state to save")


class StepResult(NamedTuple, Generic[X0]):
    """What a step leaves behind.

    Attributes:
        index: row of the table that was executed, 0 first.
        t: the timestep that the network was given there.
        x_t: the state after the step (x_{t-1} of Algorithm 2), float32 [B, ...].
        x0: the estimate of x_0 that the step used, after clipping; None where it was not asked for.
        state: returns the run as a `State`, from which `Sampler.resume` goes on.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, of no use here
    t: float
    x_t: Tensor
    x0: X0
    state: Callable[[], State] = _no_state


def origin_of(model: Model, table: Table, options: Options) -> dict[str, Any]:
    """Return what a state has to be of, as JSON types; reads every weight."""
    return {
        "noise": NOISE_VERSION,
        "table": table_digest(table),
        "weights": weights_of(model),
        "dtype": str(options.dtype).removeprefix("torch."),
        "shape": list(options.shape),
        "self_condition": options.self_condition,
    }


def weights_of(model: Model) -> str:
    """Return the SHA-256 of a model's weights, by module and name: the same in every process."""
    sha = hashlib.sha256()
    for module in changes.modules_of(model):
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            for tensor in () if held is None else changes.plain(held):
                sha.update(f"{type(module).__name__} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def table_digest(table: Table) -> str:
    """Return the SHA-256 of a table: its rows, timesteps and flags."""
    flags = f"{table.name} {table.clip} {table.learned} {table.use_m} {table.history} {table.timesteps.dtype}\n"
    raw = raw_bytes(table.rows) + raw_bytes(table.timesteps)
    return hashlib.sha256(flags.encode() + raw).hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the values of a tensor as bytes, in C order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
