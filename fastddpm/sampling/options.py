"""A sampler's options: checked, resolved and written down in one place."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from fastddpm.checks import integer, one_of
from fastddpm.errors import BackendUnavailable
from fastddpm.machine import hardware, torch_compile
from fastddpm.machine.allocator import keep_freed_memory
from fastddpm.machine.building import Want
from fastddpm.machine.devices import resolve_device
from fastddpm.ops.operators import DTYPES, use_triton
from fastddpm.sampling.changes import modules_of
from fastddpm.sampling.network import Model, device_of, dtype_of, null_class_of, num_labels_of
from fastddpm.tables.table import Table

logger = logging.getLogger("fastddpm")

# Parameters x pixels x network calls after which compilation has repaid itself on a CPU. On two Zen 3 cores compiling
# 35.7 M parameters takes some 45 s (220 s where Winograd's transforms come in, at batch 16) and saves 40 (34) ms per
# 32x32 sample and step: 1,100 to 6,400 of them, 4e13 to 2.4e14. Counting operations exactly would itself take seconds.
REPAYS_AFTER = 2e14
# After half a minute of work on such a processor a caller will probably do the same again: compile in the background.
BACKGROUND_AFTER = 1e13
# Work of a second, which is what finding compiled code takes.
LOOKS_AFTER = 3e11

_HOW = {
    Want.NEVER: "uncompiled",
    Want.IF_FOUND: "uncompiled, unless its code was kept",
    Want.FOR_LATER: "uncompiled until its code is there, which is built for later calls",
    Want.NOW: "compiled",
}


class SamplerArguments(TypedDict, total=False):
    """Keyword arguments of `Sampler`, explained there."""

    device: torch.device | str | None
    dtype: torch.dtype | None
    compile: bool | str
    cuda_graph: bool | str
    backend: str
    null_class: int | None
    self_condition: str | None
    check_finite: bool
    frozen: bool
    samples_ahead: int
    compiled: str | os.PathLike[str] | None
    norm: str


@dataclass(frozen=True)
class Options:
    """What a sampler was told, see `Sampler`, completed from its model; and what it decided.

    Attributes:
        device: where to sample, with its index.
        dtype: what the network is given.
        convert_to: what its weights are converted to, None where nothing was asked for.
        uses_triton: what `backend` comes to on this device.
        strict_compile: raise where it is wanted now and cannot be had, instead of running uncompiled.
        compiled: a package to take it from.
        strict_graph: raise where a step cannot be captured, instead of running it in the loop.
        num_labels: how many labels the model knows, None where it does not say.
    """

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    convert_to: torch.dtype | None
    backend: str
    uses_triton: bool
    want: Want
    strict_compile: bool
    compiled: Path | None
    uses_graph: bool
    strict_graph: bool
    check_finite: bool
    frozen: bool
    null_class: int | None
    self_condition: str | None
    num_labels: int | None
    norm: str

    @property
    def compiles(self) -> bool:
        """Whether a model that is compiled in this process is."""
        return self.want is Want.NOW

    @property
    def bakes_values(self) -> bool:
        """Whether what the model is called with from Python becomes a part of compiled code or of a graph."""
        return self.compiles or self.uses_graph

    def global_settings(self) -> tuple[Any, ...]:
        """Return what a graph keeps of PyTorch's global settings: autocast's dtype, determinism, precision."""
        if not self.uses_graph:
            return ()
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        precision = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
        return (autocast, torch.are_deterministic_algorithms_enabled(), *precision)


def resolve_options(model: Model, table: Table, shape: Sequence[int], **given: Unpack[SamplerArguments]) -> Options:
    """Check the arguments of `Sampler` and decide what they leave open.

    Args:
        given: all of them, as in `Sampler`.

    Raises:
        TypeError: the model cannot be called, or the table is none.
        ValueError: an option is unknown, or does not fit the device.
        BackendUnavailable: what was asked for cannot run there.
    """
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"the model must be a module or function, called as model(x, t); got {what}")
    if not isinstance(table, Table):
        raise TypeError(
            f"table must be one of fastddpm.ddpm_table, ddim_table, ...; got {type(table).__name__}; "
            "fastddpm.sample takes samplers by name"
        )
    compile, compiled, null_class = given["compile"], given["compiled"], given["null_class"]
    if compile is False and compiled is not None:
        raise ValueError(f"compile=False and compiled={os.fspath(compiled)!r} contradict each other; leave out one")
    sizes = check_shape(shape)
    device = resolve_device(device_of(model) if given["device"] is None else given["device"])
    dtype = dtype_of(model) if given["dtype"] is None else given["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}; pass dtype=torch.float32")
    note_emulation(dtype, device)
    one_of("norm", given["norm"], ("torch", "fused"))
    if device.type == "cpu":
        keep_freed_memory()
    return Options(
        shape=sizes,
        device=device,
        dtype=dtype,
        convert_to=given["dtype"],
        backend=given["backend"],
        uses_triton=use_triton(given["backend"], device),
        want=decide_compile(compile, device, model, sizes, given["samples_ahead"] * len(table)),
        strict_compile=compile is True,
        compiled=None if compiled is None else Path(compiled),
        uses_graph=decide_graph(given["cuda_graph"], device, model),
        strict_graph=given["cuda_graph"] is True,
        check_finite=given["check_finite"],
        frozen=given["frozen"],
        null_class=null_class_of(model) if null_class is None else null_class,
        # As denoising-diffusion-pytorch's networks say it.
        self_condition=given["self_condition"]
        or ("x_self_cond" if getattr(model, "self_condition", False) is True else None),
        num_labels=num_labels_of(model),
        norm=given["norm"],
    )


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return one sample's shape as a tuple.

    Raises:
        ValueError: it is empty, or has a size that is no positive integer.
    """
    try:
        sizes = tuple(integer("shape", size, 1) for size in shape)
    except (TypeError, ValueError):
        sizes = ()
    if not sizes:
        raise ValueError(f"shape must be one sample's shape, (C, H, W) or (D,), of positive integers; got {shape!r}")
    return sizes


def decide_graph(choice: bool | str, device: torch.device, model: Model) -> bool:
    """Resolve cuda_graph="auto": on CUDA, unless the model replays graphs of its own.

    Raises:
        ValueError: choice is none of "auto", True, False, or True on another device.
    """
    one_of("cuda_graph", choice, ("auto", True, False))
    if not isinstance(choice, bool):
        return device.type == "cuda" and not _replays_graphs(model)
    if choice and device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device, got {device}; use cuda_graph='auto'")
    return choice


def _replays_graphs(model: Model) -> bool:
    """Whether torch.compile(mode="reduce-overhead"), or another mode with CUDA graphs, was applied to a part of it."""
    compiled = [part for part in (model, *modules_of(model)) if hasattr(part, "get_compiler_config")]
    return any((part.get_compiler_config() or {}).get("triton.cudagraphs") for part in compiled)


def decide_compile(
    choice: bool | str, device: torch.device, model: Model, shape: tuple[int, ...], calls_ahead: int
) -> Want:
    """Resolve compile="auto": always on CUDA, on a CPU as the work ahead repays it; logged at INFO.

    The decision depends on the model, the amount of work and what is installed, not on measured time, so that the same
    run decides the same again.

    Args:
        choice: "auto", True or False.
        device: where the model runs.
        calls_ahead: samples to be drawn, times steps.

    Raises:
        BackendUnavailable: compile=True, and compiled code could not be kept anywhere.
        ValueError: choice is none of "auto", True, False.
    """
    if choice is True and (reason := torch_compile.inductor_cache().why_unusable()) is not None:
        raise BackendUnavailable(f"compile=True: {reason}")
    one_of("compile", choice, ("auto", True, False))
    if isinstance(choice, bool):
        return Want.NOW if choice else Want.NEVER
    want, reason = weigh(device, model, shape, calls_ahead)
    logger.info("compile='auto': the model runs %s (%s)", _HOW[want], reason)
    return want


def weigh(device: torch.device, model: Model, shape: tuple[int, ...], calls_ahead: int) -> tuple[Want, str]:
    """Decide how much to compile for an amount of work, arguments as in `decide_compile`; return that and the reason.

    On a CPU nobody waits longer for compiled code than for what it saves.
    """
    if device.type == "cuda":
        missing = None if torch_compile.has_triton() else "Triton is not installed"
        reason = torch_compile.inductor_cache().why_unusable() or missing
        return (Want.NOW, "on CUDA") if reason is None else (Want.NEVER, reason)
    if device.type != "cpu":
        return Want.NEVER, f"nothing is compiled for {device}"
    work = calls_ahead * weight_uses(model, shape)
    steps = ((REPAYS_AFTER, Want.NOW), (BACKGROUND_AFTER, Want.FOR_LATER), (LOOKS_AFTER, Want.IF_FOUND))
    want = next((want for least, want in steps if work >= least), Want.NEVER)
    reason = f"{work:.1e} parameters x pixels ahead, repaid after about {REPAYS_AFTER:.0e}"
    if want is Want.NOW and (missing := torch_compile.inductor_cache().why_unusable()) is not None:
        return Want.IF_FOUND, missing
    if want > Want.IF_FOUND and not torch_compile.has_cpp_compiler():
        return Want.IF_FOUND, f"no C++ compiler was found for {device}"
    return want, reason


def weight_uses(model: Model, shape: tuple[int, ...]) -> int:
    """Return parameters x pixels of a sample, a measure of one call's work; 0 for a plain callable."""
    if not isinstance(model, nn.Module):
        return 0
    return sum(p.numel() for p in model.parameters()) * math.prod(shape[1:])


@functools.cache
def note_emulation(dtype: torch.dtype, device: torch.device) -> None:
    """Warn once where bfloat16 is asked of what emulates it: a CPU without it, a GPU before compute capability 8.0."""
    if dtype != torch.bfloat16 or torch.version.hip is not None:
        return
    if device.type == "cpu" and hardware.cpu()["flags"] and not hardware.cpu()["native_bfloat16"]:
        logger.warning("this processor emulates bfloat16, slowly: use dtype=torch.float32")
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        found = f"{device} has compute capability {capability[0]}.{capability[1]}"
        logger.warning("%s, which emulates bfloat16, slowly: use dtype=torch.float16", found)
