"""What samples are drawn for, checked: labels, the model's further arguments, and guidance with the null of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastddpm.checks import number, one_of
from fastddpm.sampling import network
from fastddpm.sampling.edits import as_tensor
from fastddpm.sampling.guidance import shift_of
from fastddpm.sampling.options import Options
from fastddpm.tables.table import Table

Labels = int | Sequence[int] | Tensor
Weight = float | Sequence[float] | Tensor
CondFn = Callable[..., Tensor]
CondForm = Literal["mean", "epsilon"]


class GuidanceArguments(TypedDict, total=False):
    """Keyword arguments of `Sampler.sample` that guide it, explained there."""

    guidance: Weight
    guidance_interval: Sequence[float] | None
    guidance_rescale: float
    cond_fn: CondFn | None
    cond_form: CondForm | None


class Guidance(NamedTuple):
    """What they come to: w (or float32 [R]) and phi of `rescaled`, the gradient and its form, `shift_of` for one."""

    w: float | Tensor
    phi: float
    cond_fn: CondFn | None = None
    cond_form: CondForm | None = None
    shift: Tensor | None = None


def resolve_guidance(
    table: Table,
    guidance: Weight = 1.0,
    guidance_interval: Sequence[float] | None = None,
    guidance_rescale: float = 0.0,
    cond_fn: CondFn | None = None,
    cond_form: CondForm | None = None,
) -> Guidance:
    """Check the arguments of `Sampler.sample` that guide it.

    Raises:
        ValueError: a number is out of range, or the table does not have what a form needs.
    """
    w, phi = _weight(guidance, guidance_interval, table), number("guidance_rescale", guidance_rescale, ge=0.0, le=1.0)
    if table.name == "tuned" and (guidance_interval is not None or phi or cond_fn is not None):
        raise ValueError(
            "a tuned table fits one weight of guidance, the same at every step: leave out guidance_interval, "
            "guidance_rescale and cond_fn, or take sampler='fast'"
        )
    if not is_guided(guidance) and (guidance_interval is not None or phi):
        # This line's, and so given once a process.
        warnings.warn("guidance is 1: guidance_interval and guidance_rescale have no effect", stacklevel=1)
    if cond_fn is None:
        return Guidance(w, phi)
    noisy = table.column("sigma") != 0
    form = cond_form or ("mean" if noisy.any() and noisy[:-1].all() else "epsilon")
    if one_of("cond_form", form, ("mean", "epsilon")) == "mean" and not noisy.any():
        raise ValueError(f"cond_form='mean' moves x by sigma^2, and table {table.name!r} has none; use 'epsilon'")
    return Guidance(w, phi, cond_fn, form, shift_of(table) if form == "epsilon" else None)


def is_guided(guidance: Weight) -> bool:
    """Whether a weight, or one per row, asks for a second prediction."""
    return bool((torch.as_tensor(guidance, device="cpu") != 1.0).any())


def _weight(guidance: Weight, interval: Sequence[float] | None, table: Table) -> float | Tensor:
    """The weight, 1 outside of an interval of t (Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 6, of sigma there)."""
    if interval is None and not isinstance(guidance, Sequence | Tensor):
        return number("guidance", guidance)
    w = torch.as_tensor(guidance, dtype=torch.float32, device="cpu")
    if tuple(w.shape) not in ((), (len(table),)) or not w.isfinite().all():
        raise ValueError(
            f"guidance must be finite, one weight or one for each of the {len(table)} steps, got shape {list(w.shape)}"
        )
    w = w.expand(len(table))
    if interval is None:
        return w
    low, high = (number("guidance_interval", t) for t in interval)
    if low > high:
        raise ValueError(f"guidance_interval is (low, high) in timesteps, got ({low:g}, {high:g})")
    return torch.where((table.timesteps >= low) & (table.timesteps <= high), w, 1.0)


def _resolve_labels(class_labels: Labels | None, B: int, num_labels: int | None) -> Tensor | None:
    """Return one label per sample, int64 [B]; raise unless they are integers in 0 .. num_labels - 1."""
    if class_labels is None:
        return None
    labels = as_tensor(class_labels)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() > 1:
        raise ValueError(
            f"class_labels must be integers, one per sample or one for all; got {labels.dtype} "
            f"of shape {list(labels.shape)}"
        )
    labels = labels.to(torch.int64)
    if labels.dim() == 1 and len(labels) != B:
        raise ValueError(f"class_labels holds {len(labels)} labels for {B} samples")
    labels = labels.expand(B)
    # An index outside the embedding is memory corruption or a device assert, far from here.
    bad = (labels < 0) if num_labels is None else (labels < 0) | (labels >= num_labels)
    if bad.any():
        known = "0 or more" if num_labels is None else f"0 to {num_labels - 1}"
        raise ValueError(f"class label {int(labels[bad][0])} is out of range; labels are {known}")
    return labels


def labels_for(model: network.Model, seeds: Sequence[int], class_labels: Labels | None) -> list[int] | None:
    """Return one label per seed: those given, or seed % classes for a class-conditional model, else None.

    Raises:
        ValueError: the number of labels is not that of the seeds.
    """
    if class_labels is None:
        classes = network.num_classes_of(model)
        return None if not classes else [seed % classes for seed in seeds]
    labels = np.asarray(class_labels.cpu() if isinstance(class_labels, Tensor) else class_labels).tolist()
    labels = [labels] * len(seeds) if isinstance(labels, int) else labels
    if len(labels) != len(seeds):
        raise ValueError(f"class_labels holds {len(labels)} labels for {len(seeds)} seeds")
    return labels


def rows_of(name: str, value: Any, indices: list[int], n: int) -> Any:
    """Return what a batch is given of an argument for n samples: its rows, or all where it has no row for each sample.

    Raises:
        ValueError: it has as many rows as the batch and not as the samples, so that every batch would repeat them.
    """
    if isinstance(value, Mapping):
        return {key: rows_of(key, part, indices, n) for key, part in value.items()}
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if len(value) == len(indices) > 1 and len(value) != n:
        raise ValueError(f"{name!r} has {len(value)} rows, as a batch has, for {n} samples; give a row for each")
    return value[indices] if len(value) == n else value


def aligned(null: Any, value: Any) -> Any:
    """Return the null of an argument with its dimensions: the first of one that broadcasts counts no samples."""
    if isinstance(null, Tensor) and isinstance(value, Tensor):
        return null[(None,) * (value.dim() - null.dim())]
    return null


def resolve_conditions(
    options: Options,
    B: int,
    guided: bool,
    class_labels: Labels | None,
    model_kwargs: Mapping[str, Any] | None,
    null_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the labels, int64 [B], and the model's further arguments; with guidance those of 2B rows.

    The unconditional half comes second: the null class, and the null of every argument that has one, a value, a tensor
    that broadcasts to its rows, or a function of its rows. Without a null, tensors of B rows are the same in both.

    Raises:
        ValueError: one does not fit, or nothing says what the unconditional half is.
    """
    kwargs, null_kwargs, null_class = dict(model_kwargs or {}), null_kwargs or {}, options.null_class
    if options.self_condition in kwargs:
        raise ValueError(f"{options.self_condition!r} is given the estimate of x_0; leave it out of model_kwargs")
    labels = _resolve_labels(class_labels, B, options.num_labels)
    if "class_labels" in kwargs:
        raise ValueError("pass class_labels= itself, not inside model_kwargs")
    for name in null_kwargs.keys() - kwargs:
        raise ValueError(f"null_kwargs has {name!r}, which model_kwargs has not; pass its value for each sample there")
    if not guided:
        return labels, kwargs
    if labels is None and not null_kwargs:
        raise ValueError(
            "guidance needs class_labels, or null_kwargs= with what arguments in model_kwargs are where there is no "
            "condition; pass them, or guidance=1.0"
        )
    if labels is not None and null_class is None and not null_kwargs:
        raise ValueError("guidance needs the label that means 'no class': pass null_class=")
    if labels is not None:
        labels = torch.cat([labels, labels if null_class is None else torch.full_like(labels, null_class)])
    for name, value in kwargs.items():
        if name in null_kwargs:
            kwargs[name] = _with_null(name, value, null_kwargs[name], B)
        elif isinstance(value, Tensor) and value.dim() > 0 and len(value) == B:
            kwargs[name] = torch.cat([value, value])
    return labels, kwargs


def _with_null(name: str, value: Any, null: Any, B: int) -> Tensor:
    if isinstance(value, Real):
        value = torch.as_tensor(value, dtype=None if isinstance(value, Integral) else torch.float32, device="cpu")
    if isinstance(value, Tensor) and value.dim() == 0:
        value = value.expand(B)
    if not isinstance(value, Tensor) or len(value) != B:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"model_kwargs[{name!r}] has a null: pass a number, or a tensor of {B} rows, got {got}")
    null = null(value) if callable(null) else null
    try:
        null = torch.as_tensor(null, dtype=value.dtype, device=value.device).expand_as(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"null_kwargs[{name!r}] does not broadcast to {list(value.shape)}: {error}") from error
    return torch.cat([value, null])


def split_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Buffers and values of a `StepKey`; refuses values that cannot be compared with another call's."""
    buffers, values = [], []
    for name, value in sorted(kwargs.items()):
        if isinstance(value, Tensor):
            buffers.append((name, tuple(value.shape), value.dtype))
        elif isinstance(value, Real) and not isinstance(value, Integral):
            buffers.append((name, (), torch.float32))
        else:
            values.append((name, value))
            try:
                hash(value)
            except TypeError:
                raise ValueError(
                    f"model_kwargs[{name!r}] is a {type(value).__name__}; pass tensors and hashable values only, or "
                    "compile=False and cuda_graph=False"
                ) from None
    return {"buffers": tuple(buffers), "values": tuple(values)}
