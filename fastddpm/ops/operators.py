"""What the fused operations share: checks of arguments, how each becomes an operator, and which form of it runs.

An operator, ``torch.ops.fastddpm.*``, is opaque to torch.compile and torch.export. ``torch.library.custom_op`` would
make one too, but imports Dynamo at a process's first call, which takes as long as importing torch. Noise travels as a
list and a stream: [seed, sample_id, step] of a Counter, [z] of the caller's, or []; `define` packs and unpacks it. What
runs is the Triton kernel, or its twin in PyTorch.

The kernels take memory that is contiguous, or channels-last of any dimension, as it is, and read and write an element
once, in no fixed order. No check reads a tensor's value.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastddpm.checks import one_of
from fastddpm.errors import BackendUnavailable
from fastddpm.machine.torch_compile import NO_CPU, has_triton, why_not_triton
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins

logger = logging.getLogger("fastddpm")
_say_once = functools.cache(logger.info)

NOISE = "Tensor[] noise, int stream"
HOW = "str backend, bool compiled"
BACKENDS = ("auto", "triton", "torch")
# What states, network outputs and copies are stored in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("fastddpm", "FRAGMENT")

Noise = Counter | Tensor | None
Targets = tuple[Tensor | None, ...]
# Where a tensor lies: its device, the address of its first byte and the one after its last.
_Span = tuple[torch.device, int, int]


def define(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define an operator with one body for the CPU and CUDA, and return what calls it, with positional arguments.

    Args:
        schema: "name(arguments) -> result". Where it has `NOISE`, its caller, body and fake have a `Noise`.
        body: what runs; it chooses between kernel and twin.
        fake: the same on tensors without data.
        setup, backward: see ``torch.library.register_autograd``; they see noise as it travels.
    """
    name, _, arguments = schema.partition("(")
    k = arguments.split(", ").index("Tensor[] noise") if NOISE in schema else None

    def unpacked(run: Callable[..., Any]) -> Callable[..., Any]:
        return run if k is None else lambda *given: run(*given[:k], unpack(*given[k : k + 2]), *given[k + 2 :])

    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, unpacked(body), key)
    torch.library.register_fake(f"fastddpm::{name}", unpacked(fake), lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastddpm::{name}", backward, setup_context=setup, lib=_LIBRARY)
    operator = getattr(torch.ops.fastddpm, name).default
    return operator if k is None else lambda *given: operator(*given[:k], *pack(given[k]), *given[k + 1 :])


def pack(noise: Noise) -> tuple[list[Tensor], int]:
    """Noise as an operator's arguments."""
    if isinstance(noise, Counter):
        return [noise.seed, noise.sample_id, noise.step], noise.stream
    return [] if noise is None else [noise], 0


def unpack(noise: Sequence[Tensor], stream: int) -> Noise:
    """Undo `pack`."""
    if len(noise) == 3:
        return Counter(noise[0], noise[1], noise[2], stream)
    return noise[0] if noise else None


def execute(
    kernel: Callable[..., None],
    twin: Callable[..., tuple[Tensor, ...]],
    targets: Targets,
    arguments: tuple[Any, ...],
    backend: str,
    compiled: bool,
) -> None:
    """Fill the targets with the results of an operation, by its kernel or by its twin; None: not wanted."""
    first = targets[0]
    assert first is not None
    if use_triton(backend, first.device):
        kernel(targets, *arguments)
    else:
        twins.fill(twin, targets, arguments, compiled)
    # PyTorch sees neither what a kernel writes nor what is written below autograd.
    torch.autograd.graph.increment_version([t for t in targets if t is not None])


@functools.lru_cache(maxsize=256)
def use_triton(backend: str, device: torch.device) -> bool:
    """Decide between kernel and twin.

    "auto" takes the kernel for GPU tensors where it can run, and says once at INFO why it could not. "triton" takes
    the kernel or raises; on the CPU that needs Triton's interpreter (TRITON_INTERPRET=1 set before triton is imported).

    Args:
        backend: "auto", "triton" or "torch".
        device: the tensors' device, with its index.

    Raises:
        BackendUnavailable: "triton" was asked for and cannot run; the message has the reason and the fix.
        ValueError: no such backend.
    """
    one_of("backend", backend, BACKENDS)
    if backend == "torch":
        return False
    if backend == "auto" and device.type == "cpu":
        # Importing triton takes a second, and the answer does not depend on it.
        reason: str | None = NO_CPU if has_triton() else "Triton is not installed"
    else:
        reason = why_not_triton(device)
    if reason is None:
        return True
    if backend == "triton":
        raise BackendUnavailable(f"backend='triton' cannot run on {device}: {reason}; or use backend='torch'")
    _say_once("the fused operations run in PyTorch: %s", reason)
    return False


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError for what no operation stores."""
    if dtype not in DTYPES:
        hint = "; for float64 use fastddpm.reference" if dtype == torch.float64 else ""
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}{hint}")


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise unless a tensor has x's shape and device, and a dtype of its own that can be stored."""
    check_dtype(name, tensor.dtype)
    check_device(name, tensor, x.device)
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x has {tuple(x.shape)}; nothing is broadcast")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError for a tensor elsewhere."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but x is on {device}; move one of them")


def _check_indices(name: str, index: Tensor, batch: int, device: torch.device) -> None:
    check_device(name, index, device)
    if index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] not in (1, batch):
        raise ValueError(f"{name} must be int64 [1] or [{batch}], got {index.dtype} {list(index.shape)}")


def check_counter(counter: Counter, batch: int, device: torch.device) -> None:
    """Raise ValueError unless each word of a counter is int64, one for all samples or one each."""
    for name, tensor in (("seed", counter.seed), ("sample_id", counter.sample_id), ("step", counter.step)):
        _check_indices(name, tensor, batch, device)


def check_noise(noise: Noise, x: Tensor) -> None:
    """Raise unless noise is a counter of x's samples, or z of x's shape, or none."""
    if isinstance(noise, Tensor):
        check_like("noise", noise, x)
    elif noise is not None:
        check_counter(noise, x.shape[0], x.device)


def check_rows(rows: Tensor, row: Tensor, x: Tensor, columns: int) -> None:
    """Raise ValueError unless x has samples, rows is a table with that many columns, and row an index into it."""
    if x.dim() == 0:
        raise ValueError("x must be [B, ...], samples first, got a scalar")
    check_device("rows", rows, x.device)
    if rows.dtype != torch.float32 or rows.dim() != 2 or rows.shape[1] != columns or rows.shape[0] == 0:
        raise ValueError(f"rows must be float32 [R, {columns}] with R >= 1, got {rows.dtype} {list(rows.shape)}")
    _check_indices("row", row, x.shape[0], x.device)


def check_output(m: Tensor, x_t: Tensor, learned: bool, guided: bool = False) -> None:
    """Raise unless m is what a network of this kind returns for x_t."""
    check_dtype("m, the network's output,", m.dtype)
    check_device("m, the network's output,", m, x_t.device)
    expected = list(x_t.shape)
    if learned:
        if x_t.dim() < 2:
            raise ValueError(f"a learned variance needs x_t [B, C, ...], got {tuple(x_t.shape)}")
        expected[1] *= 2
    if guided:
        expected[0] *= 2
    if list(m.shape) == expected:
        return
    message = f"m, the network's output, has shape {tuple(m.shape)}; expected {tuple(expected)}, nothing is broadcast"
    if not learned and x_t.dim() > 1 and list(m.shape[1:]) == [2 * x_t.shape[1], *x_t.shape[2:]]:
        message += "; twice the channels need a table with variance_type 'learned' or 'learned_range' (learned=True)"
    raise ValueError(message)


def refuse_gradients(tensors: dict[str, Any]) -> None:
    """Raise RuntimeError where a gradient would be lost."""
    if not torch.is_grad_enabled():
        return
    names = [name for name, t in tensors.items() if isinstance(t, Tensor) and t.requires_grad]
    if names:
        raise RuntimeError(
            f"{', '.join(names)} requires a gradient, but what is written into given tensors has none; call it "
            "under torch.no_grad(), or without the tensors to write into"
        )


def is_channels_last(x: Tensor) -> bool:
    """Whether x [B, C, ...] is dense with its channels innermost, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def dense(value: Any) -> Any:
    """A tensor, or those of a counter, as contiguous memory; anything else as it is."""
    if isinstance(value, Counter):
        seed, sample_id, step, stream = value
        return Counter(seed.contiguous(), sample_id.contiguous(), step.contiguous(), stream)
    return value.contiguous() if isinstance(value, Tensor) else value


def dense_or_nhwc(m: Tensor) -> Tensor:
    """A network output as the kernels take it."""
    return m if is_channels_last(m) else m.contiguous()


def empty_as(x: Tensor) -> Tensor:
    """Return a new tensor of x's shape: channels-last where x is, else contiguous."""
    return torch.empty_like(x) if is_channels_last(x) else x.new_empty(x.shape)


def check_overlap(inputs: Mapping[str, Any], outputs: Mapping[str, Tensor | None]) -> None:
    """Refuse outputs that overlap themselves, each other, or an input other than element by element.

    Args:
        inputs, outputs: tensors by their argument's name; what is none is skipped.

    Raises:
        ValueError: naming the arguments.
    """
    read = [(name, x, _span(x)) for name, x in inputs.items() if isinstance(x, Tensor) and x.numel()]
    written: list[tuple[str, _Span]] = []
    for name, out in outputs.items():
        if out is None or out.numel() == 0:
            continue
        if overlaps_itself(out):
            raise ValueError(f"{name} overlaps itself (strides {out.stride()}); pass a tensor that owns its elements")
        span = _span(out)
        for other, x, other_span in read:
            if _meet(span, other_span) and not _same_elements(out, x):
                raise ValueError(f"{name} partly overlaps {other}; pass {other} itself or memory of its own")
        for other, other_span in written:
            if _meet(span, other_span):
                raise ValueError(f"{name} and {other} overlap; each output needs memory of its own")
        written.append((name, span))


def overlaps_itself(x: Tensor) -> bool:
    """Tell whether two indices may share an element, judged from sizes and strides (an odd stride may be refused)."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _span(x: Tensor) -> _Span:
    last = x.numel() - 1
    if not x.is_contiguous():
        last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    start = x.data_ptr()
    return x.device, start, start + (last + 1) * x.element_size()


def _meet(a: _Span, b: _Span) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _same_elements(out: Tensor, x: Tensor) -> bool:
    """Whether out is x, or the first part of x along the batch (of a guided network's two halves)."""
    same = out.data_ptr() == x.data_ptr() and out.dtype == x.dtype
    if not same or out.shape[1:] != x.shape[1:] or out.shape[0] > x.shape[0]:
        return False
    return all(i == j for i, j, size in zip(out.stride(), x.stride(), out.shape, strict=True) if size > 1)
