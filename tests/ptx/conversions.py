"""``cvt``: between integers, between floats, and from integers to floats (PTX ISA section 9.7.9.21)."""

from __future__ import annotations

import numpy as np

from tests.ptx.floats import canonical
from tests.ptx.parser import PtxError
from tests.ptx.scalars import TYPES, Operation


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits: exact."""
    return canonical((bits.astype(np.uint32) << np.uint32(16)).view(np.float32), "f32")


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits, to nearest even; NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    """Round float32 to float16, to nearest even, subnormals included."""
    return canonical(values.astype(np.float16), "f16")


def build(modifiers: tuple[str, ...]) -> Operation:
    """Read ``cvt{.rounding}{.sat}.destination.source``."""
    *flags, result, source = modifiers
    if result in ("f16x2", "bf16x2"):
        return _pack(result, source, flags)
    if _is_float(source):
        return _float_to_float(result, source, flags)
    return (_integer_to_float if _is_float(result) else _integer_to_integer)(result, source, flags)


def _is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


def _require(flags: list[str], allowed: set[str], what: str) -> None:
    if set(flags) - allowed:
        raise PtxError(f"{what} with .{'.'.join(flags)} is not defined here")


def _pack(result: str, source: str, flags: list[str]) -> Operation:
    """Two float32 into one register; the first operand goes to the upper half."""
    _require(flags, {"rn"}, f"cvt.{result}")
    narrow = f32_to_bf16 if result == "bf16x2" else (lambda x: f32_to_f16(x).view(np.uint16))

    def compute(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)

    return Operation("b32", (source, source), compute)


def _integer_to_integer(result: str, source: str, flags: list[str]) -> Operation:
    _require(flags, set(), f"cvt.{result}.{source}")
    return Operation(result, (source,), lambda a: a.astype(TYPES[result]))


def _integer_to_float(result: str, source: str, flags: list[str]) -> Operation:
    _require(flags, {"rn"}, f"cvt.{result}.{source}")
    if result not in ("f32", "f64"):
        raise PtxError(f"cvt.{result}.{source} is not defined here")
    return Operation(result, (source,), lambda a: a.astype(TYPES[result]))


def _float_to_float(result: str, source: str, flags: list[str]) -> Operation:
    _require(flags, {"rn"}, f"cvt.{result}.{source}")
    pair = (result, source)
    if pair == ("f32", "bf16"):
        return Operation(result, (source,), bf16_to_f32)
    if pair == ("bf16", "f32"):
        return Operation(result, (source,), f32_to_bf16)
    if pair == ("f16", "f32"):
        return Operation(result, (source,), f32_to_f16)
    if "bf16" in pair or result == source or not _is_float(result):
        raise PtxError(f"cvt.{result}.{source} is not defined here")
    return Operation(result, (source,), lambda a: canonical(a.astype(TYPES[result]), result))
