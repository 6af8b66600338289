"""PTX's scalar types as NumPy ones, and the shape that every arithmetic instruction has here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.parser import PtxError

TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
}
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class Operation:
    """An instruction without memory or control flow: ``compute`` maps typed arrays to one typed array each."""

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., np.ndarray]


def type_bits(name: str) -> int:
    """Width in bits of a PTX type."""
    if name not in TYPES:
        raise PtxError(f"unknown type .{name}")
    return 1 if name == "pred" else np.dtype(TYPES[name]).itemsize * 8


def decode(bits: np.ndarray, name: str) -> np.ndarray:
    """See a register's bits (unsigned) as a value of the named type; a wider register is truncated."""
    width = type_bits(name)
    if bits.dtype.itemsize * 8 > width > 1:
        bits = bits.astype(UNSIGNED[width])
    return bits.view(TYPES[name])


def encode(values: np.ndarray, name: str, register_bits: int) -> np.ndarray:
    """Turn a value of the named type into a register's bits; signed values are sign-extended."""
    width = type_bits(name)
    if register_bits == width:
        return np.ascontiguousarray(values).view(UNSIGNED[width])
    if name[0] == "s":
        return values.astype(SIGNED[register_bits]).view(UNSIGNED[register_bits])
    return np.ascontiguousarray(values).view(UNSIGNED[width]).astype(UNSIGNED[register_bits])


def literal(value: int, name: str) -> np.ndarray:
    """A literal of the named type, one element long; floats come as their bit pattern."""
    width = type_bits(name)
    return np.array([value & ((1 << width) - 1)], dtype=UNSIGNED[width]).view(TYPES[name])
