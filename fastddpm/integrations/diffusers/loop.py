"""Noise as diffusers draws it, and the loop of one scheduler step after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastddpm.integrations.shared import NoiseSource
from fastddpm.sampling.network import unwrap
from fastddpm.sampling.sampler import StepResult

Generators = torch.Generator | list[torch.Generator]


@torch.library.custom_op("fastddpm::randn_of_torch", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _randn_of_torch(like: Tensor, shape: list[int]) -> Tensor:
    """Draw from torch's global generator: opaque, because Inductor's own generator draws other numbers than eager."""
    return torch.randn(shape, device=like.device, dtype=like.dtype)


@_randn_of_torch.register_fake
def _(like: Tensor, shape: list[int]) -> Tensor:
    return like.new_empty(shape)


def draw_like(output: Tensor, generator: Any = None) -> Tensor:
    """Draw z for the network's output as diffusers does: its shape, dtype and device; a list is one generator each."""
    if generator is None and torch.compiler.is_compiling():
        return _randn_of_torch(output, list(output.shape))
    return randn_tensor(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def step_by_step(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    source: NoiseSource,
    x_T: Tensor,
    generator: Generators | None,
    after: Callable[[StepResult], None],
    step_options: Mapping[str, Any],
) -> Tensor:
    """Call network and scheduler in turn; return x_0 [B, ...] in the dtype that the scheduler's steps have.

    Args:
        predict: a `predictor`.
        scheduler: steps from its own `timesteps`.
        source: where noise comes from; without seeds, the scheduler's step draws from `generator` itself.
        x_T: the start, [B, ...], in the network's dtype.
        after: called after each step.
        step_options: further arguments of the scheduler's step.
    """
    seeded_options = step_options
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options = {**step_options, "generator": generator}
    x, last = x_T, len(scheduler.timesteps) - 1
    for i, t in enumerate(scheduler.timesteps):
        m = predict(x, t)
        if source.key is None:
            # Some schedulers return no estimate of x_0.
            x, x_0 = (*scheduler.step(m, t, x, return_dict=False, **step_options), None)[:2]
        else:
            z = torch.zeros_like if i == last else lambda output, i=i: source.z(torch.tensor([i], device="cpu"), output)
            x, x_0 = scheduler.advance(m, t, x, z, **seeded_options)
        after(StepResult(i, float(t), x, x_0))
    return x


def predictor(
    unet: Any,
    x_T: Tensor,
    class_labels: int | Sequence[int] | Tensor | None,
    guidance: float,
    null_class: int | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return x_t, t -> m, with m = m_u + w (m_c - m_u) where there is guidance (Ho & Salimans 2022).

    Args:
        class_labels: one label for all images or one each; None for an unconditional network.
        guidance: the weight w, as in `Sampler.sample`; 1.0 means none.
        null_class: the label that means "no class".
    """
    if class_labels is None:
        return lambda x, t: unwrap(unet(x, t))
    labels = torch.as_tensor(class_labels, device=x_T.device)
    labels = labels.expand(len(x_T), *labels.shape[1:])
    if guidance == 1.0 or null_class is None:
        return lambda x, t: unwrap(unet(x, t, class_labels=labels))
    both = torch.cat([labels, torch.full_like(labels, null_class)])
    C = x_T.shape[1]

    def guided(x: Tensor, t: Tensor) -> Tensor:
        m_c, m_u = unwrap(unet(torch.cat([x, x]), t, class_labels=both)).chunk(2)
        # A learned variance is the conditional one.
        return torch.cat([m_u[:, :C] + guidance * (m_c[:, :C] - m_u[:, :C]), m_c[:, C:]], dim=1)

    return guided
