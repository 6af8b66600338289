"""A request for samples, checked: the arguments of `Sampler.sample` in the form that a step loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from fastddpm.checks import integer, nearest
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.sampling.conditions import (
    CondFn,
    CondForm,
    Guidance,
    GuidanceArguments,
    Labels,
    is_guided,
    resolve_conditions,
    resolve_guidance,
    split_kwargs,
)
from fastddpm.sampling.edits import as_tensor, for_batch, in_range, refuse_without_levels, resolve_known, samples
from fastddpm.sampling.options import Options
from fastddpm.tables.table import COLUMN, Table

Noise = Tensor | Callable[[int], Tensor]
Generators = torch.Generator | Sequence[torch.Generator]

COUNTER, GIVEN, NONE = "counter", "given", "none"


@dataclass(frozen=True)
class StepKey:
    """What a step is found again by: everything about a request that is not in a buffer.

    Attributes:
        noise: where z comes from: "counter" (seeds), "given" (a buffer that the caller fills) or "none".
        guided: two predictions per sample, and m = m_u + w (m_c - m_u).
        rescaled: m keeps the spread of m_c.
        cond_fn, cond_form: of `Sampler.sample`.
        masked: known data take their place in x_t after each step.
        x0_out: the estimate of x_0 is kept.
        check_finite: each sample's first step with a NaN or Inf is recorded.
        buffers: name, shape and dtype of the tensors and floats among the model's further keyword arguments, where code
            is compiled or captured with them.
        values: name and value of the others.
        settings: PyTorch's global ones that a graph keeps from its capture: autocast, determinism, precision.
    """

    batch: int
    noise: str = COUNTER
    guided: bool = False
    rescaled: bool = False
    cond_fn: CondFn | None = None
    cond_form: CondForm | None = None
    masked: bool = False
    labels: bool = False
    x0_out: bool = False
    check_finite: bool = False
    buffers: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    values: tuple[tuple[str, Any], ...] = ()
    settings: tuple[Any, ...] = ()

    @classmethod
    def of(cls, request: Request, table: Table, options: Options) -> StepKey:
        """Return what the step of a request is found by."""
        guidance = request.guidance
        guided = is_guided(guidance.w)
        return cls(
            batch=len(request.seed),
            noise=NONE if not is_stochastic(table) else COUNTER if request.seeded else GIVEN,
            guided=guided,
            rescaled=guided and guidance.phi > 0.0,
            cond_fn=guidance.cond_fn,
            cond_form=guidance.cond_form,
            masked=request.known is not None,
            labels=request.class_labels is not None,
            x0_out=request.x0_out,
            check_finite=options.check_finite,
            **split_kwargs(request.kwargs if options.bakes_values else {}),
            settings=options.global_settings(),
        )

    @property
    def network_batch(self) -> int:
        """Rows of the network's input: 2B with guidance, the conditional half first."""
        return 2 * self.batch if self.guided else self.batch


@dataclass(frozen=True)
class Request:
    """One call's data.

    Attributes:
        seed: int64 [B], keys of the noise (0 where it comes from elsewhere).
        sample_id: int64 [B].
        x_T: [B, ...] where the call brings it, else None: drawn from the seeds.
        known: data [B, ...] and bool of that shape that is true where samples are drawn, not those data.
        init: [B, ...], data that are noised to the first row's level, with `x_T` as the noise where that is given.
        draw: returns z of a step [B, ...], where the caller provides it.
        class_labels: int64, [B], or [2B] with guidance, see `conditions.resolve_conditions`.
        kwargs: further keyword arguments of the model, as the labels.
        seeded: x_T or the noise comes from `seed` and `sample_id`.
        x0_out: the estimate of x_0 is asked for.
    """

    seed: Tensor
    sample_id: Tensor
    x_T: Tensor | None  # noqa: N815
    init: Tensor | None
    known: tuple[Tensor, Tensor] | None
    draw: Callable[[int], Tensor] | None
    class_labels: Tensor | None
    guidance: Guidance
    kwargs: dict[str, Any]
    seeded: bool
    x0_out: bool = False

    def name(self, i: int) -> str:
        """Name sample i for a message."""
        if not self.seeded:
            return f"sample {i}"
        return f"sample {i} (seed {int(self.seed[i]) % 2**64}, sample id {int(self.sample_id[i])})"


class Conditions(GuidanceArguments, total=False):
    """Keyword arguments of `Sampler.sample` that `fastddpm.sample` hands on: one value for all samples, or rows."""

    x_T: Tensor | None  # noqa: N815
    init: Tensor | None
    mask: Tensor | None
    known: Tensor | None
    model_kwargs: Mapping[str, Any] | None
    null_kwargs: Mapping[str, Any] | None


class RequestArguments(Conditions, total=False):
    """Keyword arguments of `Sampler.sample`, `steps` and `warmup`, explained in `Sampler.sample`."""

    seeds: int | Sequence[int] | Tensor | None
    seed: int | None
    sample_ids: Sequence[int] | Tensor | None
    generator: Generators | None
    noise: Noise | None
    batch_size: int | None
    class_labels: Labels | None


def refuse_unknown(function: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for a keyword argument that a function does not have, and name the nearest one that it has."""
    for name in given.keys() - known:
        near = nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else "; see model_kwargs and sampler_options"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def resolve_request(
    table: Table,
    options: Options,
    *,
    x0_out: bool = False,
    seeds: int | Sequence[int] | Tensor | None = None,
    seed: int | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    generator: Generators | None = None,
    noise: Noise | None = None,
    x_T: Tensor | None = None,
    init: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int | None = None,
    class_labels: Labels | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    null_kwargs: Mapping[str, Any] | None = None,
    **guiding: Unpack[GuidanceArguments],
) -> Request:
    """Check the arguments of `Sampler.sample` and complete them.

    Raises:
        ValueError: two sources of noise, or none; a size, label, seed or weight that does not fit.
    """
    batch_size = None if batch_size is None else integer("batch_size", batch_size, 0)
    shape = options.shape
    if (x0_out or options.self_condition) and table.estimate != "x_0":
        raise ValueError(
            f"sampler {table.name!r} keeps {table.estimate} and has no estimate of x_0 to give; sample without "
            "return_x0, steps() and self-conditioning, or choose a sampler that keeps x_0, such as unipc"
        )
    stochastic = is_stochastic(table)
    source = _only_source(seeds, seed, generator, noise)
    x_T, init, mask, known = (None if data is None else as_tensor(data) for data in (x_T, init, mask, known))
    if x_T is not None and tuple(x_T.shape[1:]) != shape:
        raise ValueError(f"x_T must have shape [B, {', '.join(map(str, shape))}], got {list(x_T.shape)}")
    if init is not None:
        if x_T is not None:
            raise ValueError("init= and x_T= are two starts; give x_T alone, which may be a noised init of your own")
        refuse_without_levels("init", table)
        init = in_range("init", samples("init", init, shape), table)
    start = x_T if init is None else init
    draw: Callable[[int], Tensor] | None = None
    if source == "seeds":
        batch = batch_size
        if start is not None and batch is None and seeds is None and sample_ids is None:
            batch = len(start)
        many = seeds if seeds is None or isinstance(seeds, Iterable) else [seeds]
        seed_of, sample_id = resolve_seeds(seeds=many, seed=seed, sample_ids=sample_ids, batch=batch)
    else:
        if source is None and (stochastic or x_T is None):
            raise ValueError("no noise: pass seeds=, seed= with sample_ids=, generator=, or noise= with x_T=")
        B = given_batch(generator, noise, start, batch_size, class_labels)
        seed_of = sample_id = torch.zeros(B, dtype=torch.int64, device="cpu")
        draw = _drawer(generator, noise, B, shape, len(table))
        if x_T is None:
            if generator is None:
                raise ValueError("noise= is the noise of the steps only; pass x_T= too")
            assert draw is not None
            # The generator's first numbers are x_T, as in diffusers' pipelines.
            x_T = draw(-1)
    B = len(seed_of)
    if x_T is not None and len(x_T) != B:
        raise ValueError(f"x_T holds {len(x_T)} samples, and the noise is for {B}")
    if init is not None:
        init = for_batch("init", init, B)
    pair = None
    if mask is not None or known is not None:
        pair = resolve_known(table, (B, *shape), mask, known, init, source)
    guidance = resolve_guidance(table, **guiding)
    guided = is_guided(guidance.w)
    labels, kwargs = resolve_conditions(options, B, guided, class_labels, model_kwargs, null_kwargs)
    draw = draw if stochastic else None
    return Request(seed_of, sample_id, x_T, init, pair, draw, labels, guidance, kwargs, source == "seeds", x0_out)


def is_stochastic(table: Table) -> bool:
    """Whether a row adds noise."""
    return bool((table.rows[:, COLUMN["sigma"]] != 0).any())


def _only_source(seeds: Any, seed: Any, generator: Any, noise: Any) -> str | None:
    given = {"seeds": seeds, "seed": seed, "generator": generator, "noise": noise}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"noise comes from one source, got {' and '.join(names)}; pass one of them")
    if not names:
        return None
    return "seeds" if names[0] == "seed" else names[0]


def given_batch(generator: Any, noise: Any, x_T: Any, batch_size: Any, class_labels: Any, default: Any = None) -> int:
    """Return B where there are no seeds: from the first of the arguments that has one entry per sample.

    Raises:
        ValueError: none has, and there is no default.
    """
    if isinstance(generator, Sequence):
        return len(generator)
    if isinstance(noise, Tensor) and noise.dim() > 1:
        return noise.shape[1]
    if x_T is not None:
        return len(x_T)
    if batch_size is not None:
        return integer("batch_size", batch_size, 0)
    if class_labels is not None and np.ndim(class_labels) == 1:
        return len(class_labels)
    if default is not None:
        return default
    raise ValueError("how many samples? pass batch_size= (or x_T=, a list of class_labels, one generator per sample)")


def _drawer(
    generator: Generators | None, noise: Noise | None, B: int, shape: tuple[int, ...], steps: int
) -> Callable[[int], Tensor] | None:
    expected = (B, *shape)
    if generator is not None:
        # One call of randn per sample for a list, one for all otherwise: what diffusers' randn_tensor draws.
        parts = [(g, (1, *shape)) for g in generator] if isinstance(generator, Sequence) else [(generator, expected)]
        return lambda i: torch.cat(
            [torch.randn(size, generator=g, device=g.device, dtype=torch.float32) for g, size in parts]
        )
    if isinstance(noise, Tensor):
        if tuple(noise.shape) != (steps, *expected):
            raise ValueError(f"noise must have shape {[steps, *expected]} (one z per step), got {list(noise.shape)}")
        return noise.__getitem__
    if noise is None:
        return None

    def checked(i: int) -> Tensor:
        z = noise(i)
        if not isinstance(z, Tensor) or tuple(z.shape) != expected:
            got = list(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"noise({i}) must return a tensor of shape {list(expected)}, got {got}")
        return z

    return checked
