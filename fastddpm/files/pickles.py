"""The pickle inside torch's checkpoints, read as records: a storage is dtype, key and length, a tensor a view of one.

Names in a pickle stand for what it would call. The few that torch.save writes for tensors stand here for functions that
make records, and no other name is resolved, so nothing from outside is imported or called, and nothing is allocated
that the pickle itself does not hold: neither a storage nor a memo of a length that it merely claims.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastddpm.checks import shown

MAX_PICKLE_BYTES = 64 << 20


class RefusedObjectError(ValueError):
    """The pickle needs something that is neither a tensor nor a plain value."""


@dataclass(frozen=True)
class Storage:
    """Where a tensor's numbers lie: `length` of them under `key`."""

    dtype: torch.dtype
    key: str
    length: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.length * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that is no strided view of a storage: sparse, quantised, nested, without data, of a class of its own."""

    kind: str


def unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle and stop behind its end.

    Returns:
        What it holds: dicts, lists, tuples and plain values, with `StoredTensor` and `OtherTensor` in the place of
        tensors. The storages that it names, by their keys.

    Raises:
        RefusedObjectError: it needs a name that is not one of torch.save's for tensors and plain values.
        ValueError: it is damaged, or does what torch.save never does.
    """
    records = _Records(stream)
    records.storages = {}
    try:
        return records.load(), records.storages
    except RefusedObjectError:
        raise
    except Exception as error:
        raise ValueError(f"not a pickle that torch.save writes: {type(error).__name__}: {shown(str(error))}") from None


def _ordered_dict(pairs: Iterable[Any] = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in pairs:
        _put(result, key, value)
    return result


def _put(target: Any, key: Any, value: Any) -> None:
    # The hash of a deeply nested tuple overflows the C stack.
    if type(target) is not dict or not isinstance(key, str | bytes | int | float | None):
        raise ValueError(f"a key of type {type(key).__name__} in a {type(target).__name__}")
    target[key] = value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any, dtype: Any = None) -> StoredTensor:
    if not isinstance(storage, Storage) or not all(map(are_sizes, ((offset,), shape, stride))):
        raise ValueError("a tensor that is no view of a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or len(shape) != len(stride):
        raise ValueError(f"a tensor of dtype {shown(dtype)} with {len(shape)} sizes and {len(stride)} strides")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(
            f"a tensor claims shape {shown(shape)}, more than the {storage.nbytes} bytes that are stored for it"
        )
    return StoredTensor(storage, offset, tuple(shape), tuple(stride), dtype)


def are_sizes(values: Any, kind: Any = tuple) -> bool:
    """Tell whether a value is a tuple (or another ``kind`` of sequence) of integers from 0."""
    return isinstance(values, kind) and all(type(value) is int and value >= 0 for value in values)


def _untyped_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    return _tensor(storage, offset, shape, stride, dtype=dtype)


def _same(value: Any = None, *rest: Any) -> Any:
    return value


def _from_type(rebuild: Callable[..., Any], _kind: Any, arguments: Any, *rest: Any) -> Any:
    return rebuild(*arguments)


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64},
    **{"ComplexDoubleStorage": torch.complex128, "QUInt8Storage": torch.quint8, "QInt8Storage": torch.qint8},
    **{"QInt32Storage": torch.qint32},
}
_NAMES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _same,
    "torch.Size": tuple,
    "torch.device": _same,
    "torch.Tensor": _same,
    "torch.nn.parameter.Parameter": _same,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _untyped_tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.serialization._get_layout": _same,
    **{f"{module}.set": _same for module in ("builtins", "__builtin__")},
    **{f"numpy.{name}": _same for name in ("dtype", "core.multiarray.scalar", "_core.multiarray.scalar")},
    "_codecs.encode": _same,
}
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.DUP),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.INT, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT, pickle.BINSTRING),
    *(pickle.SHORT_BINSTRING, pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1),
    *(pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BINPERSID),
)
# The unpickler in Python: that in C takes memory for as many memo slots as a file of ten bytes claims.
_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Records(_Unpickler):
    storages: dict[str, Storage]
    dispatch = {code[0]: _Unpickler.dispatch[code[0]] for code in _OPCODES}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _NAMES:
            return _NAMES[full_name]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout | torch.qscheme):
            return _DTYPES.get(name)
        if module == "torch._utils" and name.startswith("_rebuild_"):
            return lambda *arguments: OtherTensor(name)
        raise RefusedObjectError(shown(full_name, 80))

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise ValueError("a storage in another form than torch's")
        _, dtype, key, _, length = pid[:5]
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str | int) or not are_sizes((length,)):
            raise ValueError(f"a storage of {shown(dtype)} with {shown(length)} numbers")
        storage = Storage(dtype, str(key), length)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {shown(key)} is described in two ways")
        return storage

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            _put(self.stack[-1], key, value)

    def load_build(self) -> None:
        # Attributes of an object (a state_dict's _metadata), which no record has.
        self.stack.pop()

    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.BUILD[0]: load_build}
