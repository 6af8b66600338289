"""A call through torch.compile, whose failure is a warning and not the end."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("fastddpm")


class Compiled:
    """Compiles a function as one graph at its first call.

    Args:
        function: the function or module.
        strict: let an error of torch.compile through; else warn once and go on uncompiled.
        constant: the function's weights and the sizes of its arguments never change. On a CPU oneDNN then packs the
            weights once (Inductor's `freezing`, the only way to ask for it).
    """

    def __init__(self, function: Callable[..., Any], *, strict: bool, constant: bool = False) -> None:
        self._eager = function
        options: dict[str, Any] = {"dynamic": False} if constant else {}
        self._call: Callable[..., Any] = torch.compile(function, fullgraph=True, **options)
        self._strict, self._freeze = strict, constant

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._strict or self._call is self._eager:
            return self._compile_and_call(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._compile_and_call(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("torch.compile failed, the model runs uncompiled (compile=True raises instead): %s", reason)
            self._call, self._freeze = self._eager, False
            return self._eager(*args, **kwargs)

    def _compile_and_call(self, *args: Any, **kwargs: Any) -> Any:
        with _freezing() if self._freeze else contextlib.nullcontext():
            result = self._call(*args, **kwargs)
        self._freeze = False
        return result


def _freezing() -> contextlib.AbstractContextManager[Any]:
    """Treat the weights of what compiles inside as constants.

    Setting it as an option of torch.compile is too late: Dynamo asks for it as well.
    """
    from torch._inductor import config

    if not hasattr(config, "freezing"):
        raise RuntimeError(f"torch {torch.__version__} has no Inductor setting `freezing`; use torch 2.10 to 2.14")
    return config.patch(freezing=True)
