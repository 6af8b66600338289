"""Whether a model is still what it was: its structure by identity, and where weights were copied, their bytes too."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[..., Any]

_WORDS = 1024
_SUM_BYTES = 8 * _WORDS
# Memory below this size is copied together first: an operation on each would cost more.
_SMALL = 1 << 16
# The most that is copied at a time.
_GROUP_BYTES = 1 << 26


def weight_sums(model: Model) -> list[Tensor]:
    """Return sums over the memory of a model's tensors, see `checksum`."""
    return checksum(tensor for module in modules_of(model) for tensor in _own_tensors(module))


def structure(model: Model) -> tuple[Any, ...]:
    """Return what changes when a layer, tensor, hook, method or processor of a model is replaced, or its mode switched.

    Writes into a tensor leave a trace only where PyTorch counts them: `.data` and `detach()` do not.
    """
    return tuple(part for module in modules_of(model) for part in _parts(module))


def _parts(module: nn.Module) -> Iterator[Any]:
    yield type(module)
    yield getattr(type(module), "forward", None)  # a script's has none
    yield module.training
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        yield from hooks.values()
    # A replaced forward, an attention processor, an activation (layers come with the modules); and settings such as
    # padding_mode and eps, of layers that are known not to count their calls.
    kinds = (bool, int, float, str, tuple) if type(module).__module__.startswith(("torch.nn.", "fastddpm.")) else ()
    yield from (value for value in vars(module).values() if callable(value) or isinstance(value, kinds))
    for tensor in _own_tensors(module):
        version = 0 if tensor.is_inference() else tensor._version
        yield (id(tensor), _address(tensor), version, tensor.dtype, tensor.device, tuple(tensor.shape))


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            yield from plain(tensor)


def plain(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor with memory of its own, or those that a quantised tensor consists of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain(getattr(tensor, name))


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr() + tensor.storage_offset() * tensor.element_size())


def modules_of(model: Model) -> list[nn.Module]:
    """Return a model's modules: its own, or those that a function, method, partial or wrapping object refers to."""
    return list({id(module): module for module in _modules_within(model, depth=3)}.values())


def _modules_within(part: Any, depth: int) -> Iterator[nn.Module]:
    if isinstance(part, nn.Module):
        yield from part.modules()
        return
    if depth == 0 or isinstance(part, (type, types.ModuleType)):
        return
    if isinstance(part, functools.partial):
        inner = [part.func, *part.args, *part.keywords.values()]
    elif inspect.ismethod(part):
        inner = [part.__self__, part.__func__]
    elif inspect.isfunction(part):
        variables = inspect.getclosurevars(part)
        inner = [*variables.nonlocals.values(), *variables.globals.values()]
    else:
        inner = list(getattr(part, "__dict__", {}).values())
    for value in inner:
        yield from _modules_within(value, depth - 1)


def checksum(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return sums over the memory of tensors, int64, a few thousandths of its size; compare them with `torch.equal`.

    A sum has `_WORDS` words, each times a constant random odd number, modulo 2^64: a changed word always changes its
    sum, several words that changed leave it equal by chance, once in 2^32. On a GPU words are 32 bits wide. On a CPU,
    where only sums of equal width run at the speed of memory, they are 64 bits wide; an even number of words with
    nothing but the top bit flipped (the sign of every second float32) would cancel, so these sums go with sums of the
    same memory as floating-point numbers, where signs count.
    """
    whole: list[Tensor] = []
    small: dict[torch.device, list[Tensor]] = {}
    for memory in _memory(tensors):
        size = len(memory) // _SUM_BYTES * _SUM_BYTES if memory.device.type == "cpu" and len(memory) > _SMALL else 0
        if size:
            whole.append(memory[:size])
        small.setdefault(memory.device, []).append(memory[size:])
    whole += [group for pieces in small.values() for group in _groups(pieces)]
    # A sum of integers runs on one thread.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return [total for totals in threads.map(_sums, whole) for total in totals]


def _memory(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The bytes of every storage, once."""
    storages = {s.data_ptr(): (s, t.device) for t in tensors if (s := t.untyped_storage()).nbytes() and not t.is_meta}
    return [torch.empty(0, dtype=torch.uint8, device=device).set_(s) for s, device in storages.values()]  # type: ignore[arg-type]


def _groups(pieces: list[Tensor]) -> Iterator[Tensor]:
    """Pieces joined to groups of some `_GROUP_BYTES`, each filled up with zeros to whole sums."""
    group: list[Tensor] = []
    size = 0
    for piece in [*pieces, None]:
        if group and (piece is None or size >= _GROUP_BYTES):
            yield torch.cat([*group, group[0].new_zeros(-size % _SUM_BYTES)])
            group, size = [], 0
        if piece is not None:
            group.append(piece)
            size += len(piece)


def _sums(memory: Tensor) -> list[Tensor]:
    if memory.device.type != "cpu":
        return [_wide_sums(memory)]
    floats = memory.view(torch.float32).view(-1, 2 * _WORDS)
    # Compared as bits: a NaN equals itself.
    return [
        torch.mv(memory.view(torch.int64).view(-1, _WORDS), _factors(memory.device)),
        torch.mv(floats, floats.new_ones(2 * _WORDS)).view(torch.int32),
    ]


def _wide_sums(memory: Tensor) -> Tensor:
    words = memory.view(torch.int32).view(-1, _WORDS)
    return (words.to(torch.int64) * _factors(memory.device)).sum(dim=1)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator, device="cpu") | 1).to(device)
