"""The two ways through a sampling loop: replayed by a `Sampler`, or one scheduler step after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddpm.errors import SamplingError
from fastddpm.noise import v1 as noise_v1
from fastddpm.sampling.model import unwrap
from fastddpm.sampling.sampler import Sampler, StepResult
from fastddpm.tables.table import COLUMN

Generators = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Noise:
    """Where a call's noise comes from: noise-v1 where seeds are given, else torch's generators in diffusers' order.

    Attributes:
        shape: [B, C, H, W].
        device: where the images are made.
        dtype: what diffusers draws in: the UNet's.
        generator: one for all, one per image, or None for torch's global one.
        seeds: one per image, or None.
    """

    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    generator: Generators | None
    seeds: Sequence[int] | Tensor | None

    @classmethod
    def resolve(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        generator: Generators | None,
        seeds: int | Sequence[int] | Tensor | None,
    ) -> Noise:
        """Check the arguments of a pipeline call.

        Raises:
            ValueError: seeds and a generator are both given, or the number of seeds is not the batch size.
        """
        if seeds is None:
            return cls((batch_size, *shape), device, dtype, generator, None)
        if generator is not None:
            raise ValueError("noise comes from one source, got seeds and generator; pass one of them")
        if isinstance(seeds, int):
            seeds = [seeds]
        if batch_size not in (1, len(seeds)):
            raise ValueError(f"got {len(seeds)} seeds for a batch size of {batch_size}; leave batch_size out")
        return cls((len(seeds), *shape), device, dtype, None, seeds)

    @property
    def seeded(self) -> bool:
        """Whether the noise is a function of seeds."""
        return self.seeds is not None

    def x_T(self) -> Tensor:
        """Draw x_T ~ N(0, I)."""
        if self.seeds is not None:
            return noise_v1.randn(self.shape, seeds=self.seeds, stream=noise_v1.STREAM_X_T, device=self.device)
        return self._draw()

    def z(self, step: int) -> Tensor:
        """Draw the noise of a step."""
        if self.seeds is not None:
            return noise_v1.randn(self.shape, seeds=self.seeds, step=step, device=self.device)
        return self._draw()

    def _draw(self) -> Tensor:
        return randn_tensor(self.shape, generator=self.generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Request:
    """One call of a pipeline.

    Attributes:
        noise: where noise comes from.
        class_labels: one label for all images or one each; None for an unconditional network.
        draws: for each step, whether diffusers draws noise there, used or not.
        after: called after each step.
        wants_x0: `after` is to be given the estimate of x_0.
    """

    noise: Noise
    class_labels: int | Sequence[int] | Tensor | None
    draws: Sequence[bool]
    after: Callable[[StepResult], None]
    wants_x0: bool = False


def whole_loop(sampler: Sampler, request: Request) -> Tensor:
    """Run the sampler's table; return x_0, float32 [B, ...].

    Raises:
        Exception: what the network raised, as it raised it.
    """
    noise = request.noise
    call: dict[str, Any] = {"class_labels": request.class_labels, "return_x0": request.wants_x0}
    after = request.after
    if noise.seeds is not None:
        call["seeds"] = noise.seeds
    else:
        call["x_T"], call["noise"] = noise.x_T(), noise.z
        used = (sampler.table.rows[:, COLUMN["sigma"]] != 0).tolist()

        def after(result: StepResult) -> None:
            # Drawn and thrown away, so that the next call finds the generator where diffusers leaves it.
            if request.draws[result.index] and not used[result.index]:
                noise.z(result.index)
            request.after(result)

    try:
        result = sampler.sample(callback=after, **call)
    except SamplingError as error:
        # Callers catch what their network raises.
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
    return result[0] if request.wants_x0 else result


def step_by_step(unet: Any, scheduler: Any, request: Request, step_options: Mapping[str, Any]) -> Tensor:
    """Call network and scheduler in turn; return x_0 [B, ...] in the dtype that the scheduler's steps have."""
    noise, labels = request.noise, _labels(request)
    x = noise.x_T().to(noise.dtype)
    for i, t in enumerate(scheduler.timesteps):
        m = unwrap(unet(x, t, **labels))
        if noise.seeded:
            last = i == len(scheduler.timesteps) - 1
            z = torch.zeros_like if last else lambda output, i=i: noise.z(i).to(output.dtype)
            x, x_0 = scheduler.advance(m, t, x, z, **step_options)
        else:
            x, x_0 = scheduler.step(m, t, x, generator=noise.generator, return_dict=False, **step_options)
        request.after(StepResult(i, int(t), x, x_0 if request.wants_x0 else None))
    return x


def _labels(request: Request) -> dict[str, Tensor]:
    if request.class_labels is None:
        return {}
    labels = torch.as_tensor(request.class_labels, device=request.noise.device)
    return {"class_labels": labels.expand(request.noise.shape[0], *labels.shape[1:])}
