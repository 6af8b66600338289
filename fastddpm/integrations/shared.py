"""What the drop-ins share: seeds as arguments, the source of a call's noise, and the replay of a whole table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeGuard

import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.checks import one_of
from fastddpm.errors import SamplingError
from fastddpm.noise.v1 import STREAM_REVERSE, STREAM_X_T, resolve_seeds
from fastddpm.ops.operators import DTYPES
from fastddpm.sampling.options import SamplerArguments
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.tables.table import COLUMN

Seeds = int | Sequence[int] | Tensor
Draw = Callable[[Tensor], Tensor]


class Seeding(TypedDict, total=False):
    """Keyword arguments that make noise a function of seeds.

    Attributes:
        seeds: one per sample; equal seeds give equal noise. An int is one sample.
        seed: or one for all, told apart by
        sample_ids: one id per sample.
    """

    seeds: Seeds | None
    seed: int | None
    sample_ids: Sequence[int] | Tensor | None


def check_options(options: Mapping[str, Any]) -> None:
    """Raise TypeError unless every option is an argument of `Sampler` that a drop-in leaves to its caller."""
    for name in options:
        one_of("option", name, sorted(SamplerArguments.__annotations__.keys() - {"device"}), error=TypeError)


class InvalidArgumentError(ValueError, AssertionError):
    """A bad argument. Also an AssertionError, which is what the originals raise."""


def require(condition: bool, message: str) -> None:
    """Raise InvalidArgumentError unless the condition holds."""
    if not condition:
        raise InvalidArgumentError(message)


def _randn_like(x: Tensor) -> Tensor:
    return torch.randn_like(x)


@dataclass(frozen=True)
class NoiseSource:
    """Where a call's noise comes from: noise-v1 where seeds are given, else what the original draws from.

    Attributes:
        randn: the original's draw: noise of a tensor's shape, dtype and device.
        key: (seed, sample_id), int64 [B] each; None where the original's draw is used.
        arguments: the seeds as arguments of `Sampler.sample`.
    """

    randn: Draw = _randn_like
    key: tuple[Tensor, Tensor] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(cls, batch: int | None, randn: Draw = _randn_like, **seeding: Any) -> NoiseSource:
        """Check the `Seeding` of a call for `batch` samples (None: as many as there are seeds).

        Raises:
            TypeError: an argument is not one of `Seeding`.
            ValueError: both seeds and seed are given, an id without a seed, a value out of range, or a wrong count.
        """
        if unknown := seeding.keys() - Seeding.__annotations__.keys():
            raise TypeError(f"unexpected keyword argument {min(unknown)!r}; noise takes seeds, or seed and sample_ids")
        seeds, seed, sample_ids = (seeding.get(name) for name in ("seeds", "seed", "sample_ids"))
        if seeds is None and seed is None:
            if sample_ids is not None:
                raise ValueError("sample_ids tell the samples of one seed apart; pass seed= too")
            return cls(randn)
        if seeds is not None and not isinstance(seeds, Iterable):
            seeds = [seeds]
        key, sample_id = resolve_seeds(seeds=seeds, seed=seed, sample_ids=sample_ids, batch=batch)
        require(batch is None or len(key) == batch, f"got {len(key)} seeds for a batch of {batch}; give one per sample")
        arguments = {"seeds": seeds} if seeds is not None else {"seed": seed, "sample_ids": sample_ids}
        return cls(randn, (key, sample_id.expand(len(key))), arguments)

    @property
    def batch(self) -> int | None:
        """How many samples the seeds are for; None without seeds."""
        return None if self.key is None else len(self.key[0])

    def start(self, like: Tensor) -> Tensor:
        """Draw x_T ~ N(0, I) of a tensor's shape: in its dtype, or in float32 from seeds."""
        if self.key is None:
            return self.randn(like)
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        return ops.randn(self._counter(first, STREAM_X_T, like.device), like.shape[1:], device=like.device)

    def at(self, step: Tensor, x: Tensor) -> ops.Counter | Tensor:
        """Return z of `step` (int64 [B] or [1]) for `ops.p_sample`: a counter, or noise like x."""
        return self.randn(x) if self.key is None else self._counter(step, STREAM_REVERSE, x.device)

    def z(self, step: Tensor, x: Tensor) -> Tensor:
        """Return z of `step` as a tensor like x."""
        noise = self.at(step, x)
        return noise if isinstance(noise, Tensor) else ops.randn(noise, x.shape[1:], device=x.device).to(x.dtype)

    def _counter(self, step: Tensor, stream: int, device: torch.device) -> ops.Counter:
        assert self.key is not None
        seed, sample_id = self.key
        return ops.Counter(seed.to(device), sample_id.to(device), step.to(device), stream)


def replay(
    sampler: Sampler,
    source: NoiseSource,
    x_T: Tensor,
    draws: Sequence[bool],
    on_step: Callable[[StepResult], None] | None = None,
    **call: Any,
) -> Any:
    """Run a whole table, drawing exactly where the original draws; return what `Sampler.sample` does.

    Args:
        x_T: the start, [B, ...], in the dtype that the original draws in.
        draws: per row, whether the original draws z there, used or not.
        on_step: called after each step with live tensors.
        call: further arguments of `Sampler.sample`.

    Raises:
        Exception: what the model raised, as it raised it.
    """
    noisy = (sampler.table.rows[:, COLUMN["sigma"]] != 0).tolist()

    def after(result: StepResult) -> None:
        # Drawn and thrown away, so that the next call finds the generator where the original leaves it.
        if source.key is None and draws[result.index] and not noisy[result.index]:
            source.randn(x_T)
        if on_step is not None:
            on_step(result)

    z = source.arguments if source.key is not None else {"noise": lambda i: source.randn(x_T)}
    try:
        return sampler.sample(x_T=x_T, callback=after, **z, **call)
    except SamplingError as error:
        # Callers of the original catch what their model raises.
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def fits_rows(x: Tensor, output: Any) -> TypeGuard[Tensor]:
    """Tell whether the fused step may replace the original's arithmetic: a float32 state and no gradient to keep."""
    return isinstance(output, Tensor) and x.dtype == torch.float32 and fuses(x, output)


def look_through(model: Any) -> Any:
    """Return the network inside DataParallel or DistributedDataParallel, compiled or not; others as they are."""
    inner = getattr(model, "_orig_mod", model)
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return look_through(inner.module) if isinstance(inner, parallel) else model


def fuses(*tensors: Tensor) -> bool:
    """Tell whether fused operations take these tensors; float64 and gradients go through the original's own."""
    # A step that returns x_0 as well cannot be differentiated.
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not differentiated and all(tensor.dtype in DTYPES for tensor in tensors)


def draws_randomly(model: nn.Module) -> bool:
    """Tell whether the model itself uses the global generator (dropout in training mode), whose order then matters."""
    return any(
        module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in model.modules()
    )


def overrides(instance: object, names: Sequence[str]) -> bool:
    """Tell whether a subclass replaces one of `names` of a class of this package, so that the fast path bypasses it."""
    ours = next(kind for kind in type(instance).__mro__ if kind.__module__.startswith("fastddpm."))
    return any(getattr(type(instance), name) is not getattr(ours, name) for name in names)
