"""What the error of a failing step reads: where it failed, with what sizes, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from fastddpm.errors import FastDDPMError, ModelOutputError, SamplingError
from fastddpm.sampling.options import Options
from fastddpm.sampling.request import Request
from fastddpm.sampling.step_key import StepKey


def is_oom(error: BaseException) -> bool:
    """Tell whether memory ran out, on a GPU or on the CPU (where PyTorch raises a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


@contextlib.contextmanager
def explain(where: str, key: StepKey, options: Options) -> Iterator[None]:
    """Raise what goes wrong inside again with its place; the original is the cause.

    Raises:
        torch.OutOfMemoryError: memory ran out; the message has the sizes.
        ModelOutputError: the model returned no prediction.
        SamplingError: anything else but the library's own errors, which pass as they are.
    """
    try:
        yield
    except ModelOutputError as error:
        raise ModelOutputError(f"{where}: {error}") from error
    except FastDDPMError:
        raise
    except Exception as error:
        if is_oom(error):
            size = f"network input [{key.network_batch}, {', '.join(map(str, options.shape))}] in {options.dtype}"
            raise torch.OutOfMemoryError(
                f"out of memory at {where}, {size}; use a smaller batch or dtype=torch.bfloat16 ({error})"
            ) from error
        raise SamplingError(f"{where} failed: {type(error).__name__}: {error}{_advice(error)}") from error


@contextlib.contextmanager
def explain_cuda() -> Iterator[None]:
    """Say what an error of CUDA means for the process, where `explain` has not.

    Raises:
        SamplingError: CUDA failed; other errors pass as they are.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FastDDPMError) or is_oom(error) or not _advice(error):
            raise
        raise SamplingError(f"{error}{_advice(error)}") from error


def _advice(error: Exception) -> str:
    if "CUDA error" in str(error):
        return " (this process may not be able to use CUDA any more: start a new one)"
    return ""


def raise_if_bad(first_bad: Sequence[int], timesteps: Sequence[float], request: Request) -> None:
    """Raise SamplingError when a sample's first non-finite step is recorded (-1: none)."""
    bad = [(step, i) for i, step in enumerate(first_bad) if step >= 0]
    if bad:
        step, i = min(bad)
        others = f" ({len(bad)} of {len(first_bad)} samples affected)" if len(bad) > 1 else ""
        raise SamplingError(
            f"x_t is not finite after step {step} (t = {timesteps[step]}) for {request.name(i)}{others}; look at the "
            "model's output there, or run it in float32"
        )
