"""A call through torch.compile, whose failure is a warning and not the end."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch

from fastddpm.errors import BackendUnavailable
from fastddpm.machine.caches import inductor

logger = logging.getLogger("fastddpm")


def compile_call(
    function: Callable[..., Any], *, strict: bool, dynamic: bool | None = None, name: str = "the model"
) -> Callable[..., Any]:
    """Return a function that is compiled as one graph at its first call.

    Args:
        function: a function or module.
        strict: raise where torch.compile fails (BackendUnavailable); else warn once and go on uncompiled.
        dynamic: whether sizes are left open, see torch.compile.
        name: what the function is, for the warning.
    """
    if isinstance(function, types.FunctionType):
        # Dynamo keeps what it compiles with the code object, and gives up on one after eight compilations.
        code = function.__code__.replace(co_name=function.__name__)
        function = types.FunctionType(code, function.__globals__, function.__name__, closure=function.__closure__)
    call: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=dynamic)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        if call is function:
            return function(*args, **kwargs)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return call(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit, BackendUnavailable) as error:
            reason = f"torch.compile failed: {_explain(error)}"
            if strict:
                raise BackendUnavailable(reason) from error
            logger.warning("%s runs uncompiled: %s", name, reason)
            call = function
            return function(*args, **kwargs)

    return run


def _explain(error: Exception) -> str:
    """The gist of an error, and the cache to look at where generated code could not be built or loaded."""
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    found = error.__cause__ if isinstance(error, FailOnRecompileLimitHit) else error
    lines = str(found).strip().splitlines()
    if not isinstance(error, BackendCompilerFailed):
        return lines[0]
    # The first line says who raised, the second what.
    cache = inductor()
    return f"{' '.join(lines[:2])}; if {cache.path} is damaged, remove it or set {cache.variable} to another folder"


def named_kernels() -> contextlib.AbstractContextManager[Any]:
    """Have what compiles inside for a CPU name each of its kernels to profilers, where this torch can."""
    from torch._inductor import config

    name = "enable_kernel_profile"
    return config.patch({f"cpp.{name}": True}) if hasattr(config.cpp, name) else contextlib.nullcontext()


def has_triton() -> bool:
    """Tell whether Triton, which torch.compile needs on CUDA, is installed."""
    return importlib.util.find_spec("triton") is not None


def has_cpp_compiler() -> bool:
    """Tell whether a C++ compiler, which torch.compile needs on a CPU, is there."""
    names = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return any(name and shutil.which(name.split()[0]) for name in names)
