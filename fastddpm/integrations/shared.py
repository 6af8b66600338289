"""What the drop-ins for denoising-diffusion-pytorch and OpenAI's packages share: arguments, noise and the fast loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastddpm import ops
from fastddpm.errors import SamplingError
from fastddpm.noise.v1 import STREAM_REVERSE, STREAM_X_T, resolve_seeds
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.tables.table import COLUMN

Seeds = int | Sequence[int] | Tensor
_NETWORK_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class InvalidArgumentError(ValueError, AssertionError):
    """A bad argument. Also an AssertionError, which is what the originals raise."""


def require(condition: bool, message: str) -> None:
    """Raise InvalidArgumentError unless the condition holds."""
    if not condition:
        raise InvalidArgumentError(message)


@dataclass(frozen=True)
class NoiseSource:
    """Where a call's noise comes from: noise-v1 where seeds are given, else torch's global generator.

    Attributes:
        key: (seed, sample_id), int64 [B] each; None for the global generator.
        arguments: the same as arguments of `Sampler.sample`.
    """

    key: tuple[Tensor, Tensor] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seeded(self) -> bool:
        """Whether noise is a function of seeds."""
        return self.key is not None

    @property
    def batch(self) -> int | None:
        """How many samples the seeds are for; None for the global generator."""
        return None if self.key is None else len(self.key[0])

    @classmethod
    def resolve(
        cls, batch: int | None, seeds: Seeds | None = None, seed: int | None = None, sample_ids: Any = None
    ) -> NoiseSource:
        """Check the seed arguments of a call for `batch` samples (None: as many as there are seeds).

        Raises:
            ValueError: both seeds and seed are given, an id without a seed, a value out of range, or a wrong count.
        """
        if seeds is None and seed is None:
            if sample_ids is not None:
                raise ValueError("sample_ids tell the samples of one seed apart; pass seed= too")
            return cls()
        if isinstance(seeds, int):
            seeds = [seeds]
        key, sample_id = resolve_seeds(seeds=seeds, seed=seed, sample_ids=sample_ids, batch=batch)
        require(batch is None or len(key) == batch, f"got {len(key)} seeds for a batch of {batch}; give one per sample")
        arguments = {"seeds": seeds} if seeds is not None else {"seed": seed, "sample_ids": sample_ids}
        return cls((key, sample_id.expand(len(key))), arguments)

    def start(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Draw x_T ~ N(0, I), float32 of `shape`."""
        if self.key is None:
            return torch.randn(*shape, device=device)
        counter = self._counter(torch.zeros(1, dtype=torch.int64), STREAM_X_T, torch.device(device))
        return ops.randn(counter, tuple(shape[1:]), torch.float32, torch.device(device))

    def at(self, step: Tensor, x: Tensor) -> ops.Counter | Tensor:
        """Return z of `step` (int64 [B] or [1]) for `ops.p_sample`: a counter, or randn_like(x)."""
        return torch.randn_like(x) if self.key is None else self._counter(step, STREAM_REVERSE, x.device)

    def draw(self, step: Tensor, x: Tensor) -> Tensor:
        """Return z of `step` as a tensor like x."""
        noise = self.at(step, x)
        if isinstance(noise, Tensor):
            return noise
        return ops.randn(noise, tuple(x.shape[1:]), torch.float32, x.device).to(x.dtype)

    def _counter(self, step: Tensor, stream: int, device: torch.device) -> ops.Counter:
        assert self.key is not None
        seed, sample_id = self.key
        return ops.Counter(seed.to(device), sample_id.to(device), step.to(device), stream)


def run_table(
    sampler: Sampler,
    source: NoiseSource,
    x_T: Tensor,
    draws: Sequence[bool],
    on_step: Callable[[StepResult], None] | None = None,
    **call: Any,
) -> Tensor:
    """Run a whole table, drawing from the global generator exactly where the original draws.

    Args:
        sampler: the table and its model.
        source: where noise comes from.
        x_T: the start, [B, ...].
        draws: per row, whether the original draws z there, used or not.
        on_step: called after each step with live tensors.
        call: further arguments of `Sampler.sample`.
    """
    noisy = (sampler.table.rows[:, COLUMN["sigma"]] != 0).tolist()

    def after(result: StepResult) -> None:
        # Drawn and thrown away, so that the next call finds the generator where the original leaves it.
        if not source.seeded and draws[result.index] and not noisy[result.index]:
            torch.randn_like(x_T)
        if on_step is not None:
            on_step(result)

    z = source.arguments if source.seeded else {"noise": lambda i: torch.randn_like(x_T)}
    try:
        return sampler.sample(x_T=x_T, callback=after, **z, **call)
    except SamplingError as error:
        # Callers of the original catch what their model raises.
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def fits_rows(x: Tensor, output: Any) -> TypeGuard[Tensor]:
    """Tell whether the fused step may replace the original's arithmetic: a float32 state and no gradient to keep."""
    if not isinstance(output, Tensor) or x.dtype != torch.float32 or output.dtype not in _NETWORK_DTYPES:
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or output.requires_grad))


def draws_randomly(model: nn.Module) -> bool:
    """Tell whether the model itself uses the global generator (dropout in training mode), whose order then matters."""
    return any(
        module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in model.modules()
    )


def overrides(instance: object, base: type, names: Sequence[str]) -> bool:
    """Tell whether a subclass replaces one of `names` of `base`, so that the fast path would bypass it."""
    return any(getattr(type(instance), name) is not getattr(base, name) for name in names)
