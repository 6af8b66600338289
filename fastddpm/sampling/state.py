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

from fastddpm.checks import integer, number
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

    def save(self, path: Path | str) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            ValueError: the run depends on what no file can hold: a generator, a function or another object.
        """
        request, guidance = self.request, self.request.guidance
        if request.draw is not None or guidance.cond_fn is not None:
            raise ValueError("a run with generator=, noise= or cond_fn= cannot be saved; draw its noise by seeds=")
        tensors = {**self.buffers, "seed": request.seed, "sample_id": request.sample_id}
        optional = {"class_labels": request.class_labels, "w": guidance.w}
        optional |= dict(zip(("known", "drawn"), request.known or (), strict=False))
        optional |= {f"kwargs.{name}": value for name, value in request.kwargs.items()}
        tensors |= {name: value for name, value in optional.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in request.kwargs.items() if not isinstance(value, Tensor)}
        for name, value in plain.items():
            if not isinstance(value, int | float | str | None):
                raise ValueError(f"model_kwargs[{name!r}] is a {type(value).__name__}, which a state cannot hold")
        w = None if isinstance(guidance.w, Tensor) else guidance.w
        state = {"format": FORMAT, "row": self.row, "w": w, "phi": guidance.phi, "kwargs": plain, **self.origin}
        on_disk = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
        write_files({Path(path): save(on_disk, {"state": json.dumps(state, allow_nan=False)})})

    @classmethod
    def load(cls, path: Path | str, table: Table, options: Options, origin: dict[str, Any]) -> State:
        """Read a file that `save` wrote, for a sampler of that origin.

        Raises:
            ValueError: the file is damaged, or of another model, table, noise version, dtype or shape.
        """
        path = Path(path)
        file = SafetensorsFile(path)
        state = parse_object(file.metadata.get("state", "{}").encode(), source=f"{path}: its state")
        if state.get("format") != FORMAT:
            raise ValueError(f"{path} is no {FORMAT} file")
        refuse_other({name: state.get(name) for name in origin}, origin)
        try:
            with safe_open(path, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in file.tensors}
            row = integer("row", state["row"], 0, len(table))
            size = (len(tensors["seed"]), *options.shape)
            if tuple(tensors["x_t"].shape) != size:
                raise ValueError(f"x_t has shape {list(tensors['x_t'].shape)} for samples of {list(size)}")
            w = tensors["w"] if "w" in tensors else number("w", state["w"])
            guidance = Guidance(w, number("phi", state["phi"]), None, None)
            kwargs = dict(state["kwargs"])
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        kwargs |= {name.removeprefix("kwargs."): x for name, x in tensors.items() if name.startswith("kwargs.")}
        known = (tensors["known"], tensors["drawn"]) if "known" in tensors else None
        labels = tensors.get("class_labels")
        seed, ids = tensors["seed"], tensors["sample_id"]
        request = Request(seed, ids, None, None, known, None, labels, guidance, kwargs, seeded=True)
        return cls(row, {name: tensors[name] for name in _BUFFERS if name in tensors}, request, origin)


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


def refuse_other(found: dict[str, Any], origin: dict[str, Any]) -> None:
    """Raise ValueError unless a state has a sampler's origin."""
    changed = differences(found, origin)
    if changed:
        raise ValueError(f"the state is of another run than this sampler's: {'; '.join(changed)}")


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
