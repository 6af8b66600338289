"""When to run a model through torch.compile: always on CUDA, on a CPU when the work ahead repays the compilation."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil

import torch
from torch import nn

from fastddpm.errors import BackendUnavailable
from fastddpm.machine.caches import inductor
from fastddpm.sampling.model import Model

logger = logging.getLogger("fastddpm")

# Parameters x pixels x network calls after which compilation has repaid itself on a CPU. On two Zen 3 cores compiling
# 35.7 M parameters takes some 45 s (220 s where Winograd's transforms come in, at batch 16) and saves 40 (34) ms per
# 32x32 sample and step: 1,100 to 6,400 of them, 4e13 to 2.4e14. Counting operations exactly would itself take seconds.
REPAYS_AFTER = 2e14


def decide_compile(
    choice: bool | str, device: torch.device, model: Model, shape: tuple[int, ...], calls_ahead: int
) -> bool:
    """Resolve compile="auto", and say so at INFO.

    The decision depends on the model, the amount of work and what is installed, not on measured time, so that the same
    run decides the same again.

    Args:
        choice: "auto", True or False.
        device: where the model runs.
        model: the network.
        shape: one sample's shape.
        calls_ahead: samples to be drawn, times steps.

    Raises:
        BackendUnavailable: compile=True, and compiled code could not be kept anywhere.
        ValueError: choice is none of "auto", True, False.
    """
    if choice is True and (reason := inductor().why_unusable()) is not None:
        raise BackendUnavailable(f"compile=True: {reason}")
    if isinstance(choice, bool):
        return choice
    if choice != "auto":
        raise ValueError(f"compile must be 'auto', True or False, got {choice!r}")
    decision, reason = _weigh(device, model, shape, calls_ahead)
    logger.info("compile='auto': the model runs %s (%s)", "compiled" if decision else "uncompiled", reason)
    return decision


def _weigh(device: torch.device, model: Model, shape: tuple[int, ...], calls_ahead: int) -> tuple[bool, str]:
    if (reason := inductor().why_unusable()) is not None:
        return False, reason
    if device.type == "cuda":
        return (True, "Triton is installed") if has_triton() else (False, "Triton is not installed")
    if device.type != "cpu" or not has_cpp_compiler():
        return False, f"no C++ compiler was found for {device}"
    work = calls_ahead * weight_uses(model, shape)
    return work >= REPAYS_AFTER, f"{work:.1e} parameters x pixels ahead, repaid after about {REPAYS_AFTER:.0e}"


def weight_uses(model: Model, shape: tuple[int, ...]) -> int:
    """Return parameters x pixels of a sample, a measure of one call's work; 0 for a plain callable."""
    if not isinstance(model, nn.Module):
        return 0
    return sum(p.numel() for p in model.parameters()) * math.prod(shape[1:])


def has_triton() -> bool:
    """Tell whether Triton, which torch.compile needs on CUDA, is installed."""
    return importlib.util.find_spec("triton") is not None


def has_cpp_compiler() -> bool:
    """Tell whether a C++ compiler, which torch.compile needs on a CPU, is there."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return any(name and shutil.which(name.split()[0]) for name in names)
