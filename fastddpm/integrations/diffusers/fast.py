"""What the fast classes share: files that name diffusers' own, and `step` and `set_timesteps` with its signatures."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from fastddpm.checks import integer
from fastddpm.integrations.diffusers.loop import draw_like
from fastddpm.integrations.shared import Draw, fuses


class NamedAsOriginal:
    """Mixin before a class of diffusers: saved files name the original, and load where there is no fastddpm.

    They name a class by its __name__, and a scheduler also by its instance's __module__. The class itself is still
    found, and pickled, by its __qualname__ and its own __module__.
    """

    _original: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__name__ = getattr(cls, "_original", cls).__name__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__new__(cls)
        object.__setattr__(instance, "__module__", cls._original.__module__)
        return instance


class FastScheduler(NamedAsOriginal, ABC):
    """Mixin before a scheduler of diffusers, whose `step` it executes by fused operations.

    Attributes:
        _output: what `step` returns an instance of: x_prev, and x_0 where it has a second field.
    """

    _output: ClassVar[Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_original" in vars(cls):
            named: Any = cls
            named.step, named.set_timesteps = _fused_step(cls), _checked_set_timesteps(cls)

    @abstractmethod
    def advance(
        self, model_output: Tensor, timestep: Any, x_t: Tensor, draw: Draw, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return x_prev and x_0; `draw` makes z, and is called where diffusers draws."""

    def is_fused(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> bool:
        """Whether fused operations take the step with these arguments; diffusers' own takes the others."""
        return fuses(model_output, sample)

    def choose_timesteps(self, **arguments: Any) -> None:
        """Do what `set_timesteps` does."""
        self._original.set_timesteps(self, **arguments)


def _fused_step(fast: type[FastScheduler]) -> Any:
    original, n_results = fast._original.step, len(dataclasses.fields(fast._output))
    _, *parameters = inspect.signature(original).parameters.values()
    names = [parameter.name for parameter in parameters]
    expected = set(names)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    @functools.wraps(original)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        # By hand, since `inspect.Signature.bind` takes a tenth of a step's time.
        by_place = dict(zip(names, args, strict=False))
        options = {**defaults, **by_place, **kwargs}
        if len(args) > len(names) or set(options) != expected or any(name in by_place for name in kwargs):
            return original(self, *args, **kwargs)  # which says what is wrong
        model_output, timestep, sample = (options.pop(name) for name in names[:3])
        return_dict, generator = options.pop("return_dict"), options.pop("generator", None)
        noise = options.pop("variance_noise", None)
        # Which of two sources counts is diffusers' to say.
        one_source = generator is None or noise is None
        if not one_source or not self.is_fused(model_output, timestep, sample, **options):
            return original(self, *args, **kwargs)

        def draw(output: Tensor) -> Tensor:
            return draw_like(output, generator) if noise is None else noise

        result = self.advance(model_output, timestep, sample, draw, **options)[:n_results]
        return self._output(*result) if return_dict else result

    return step


def _checked_set_timesteps(fast: type[FastScheduler]) -> Any:
    original = fast._original.set_timesteps
    signature = inspect.signature(original)

    @functools.wraps(original)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        _, *given = signature.bind(self, *args, **kwargs).arguments.items()
        arguments = dict(given)
        if arguments.get("num_inference_steps") is not None:
            integer("num_inference_steps", arguments["num_inference_steps"], 1)
        self.choose_timesteps(**arguments)

    return set_timesteps
