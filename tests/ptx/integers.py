"""Integer, logic, shift, compare and select instructions (PTX ISA sections 9.7.1, 9.7.2, 9.7.6 to 9.7.8)."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.ptx.parser import PtxError
from tests.ptx.scalars import TYPES, Operation, type_bits

_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_WIDER = {"u32": "u64", "s32": "s64"}


def _compare(name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """One comparison; the suffix ``u`` of a float comparison is true when either side is NaN."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in _COMPARE:
        return _COMPARE[name]
    if name.endswith("u") and name[:-1] in _COMPARE:
        ordered = _COMPARE[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    raise PtxError(f"unknown comparison .{name}")


def _setp(modifiers: tuple[str, ...]) -> Operation:
    name, kind = modifiers
    return Operation("pred", (kind, kind), _compare(name))


def _arithmetic(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[tuple[str, ...]], Operation]:
    def build(modifiers: tuple[str, ...]) -> Operation:
        (kind,) = modifiers
        return Operation(kind, (kind, kind), function)

    return build


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.any(b == 0):
        raise PtxError("integer division by zero has no defined result")
    floor = a // b
    inexact = (floor * b != a) & ((a < 0) != (b < 0))
    return floor + inexact.astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product."""
    kind = a.dtype
    if kind.itemsize == 4:
        wide = np.uint64 if kind.kind == "u" else np.int64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(kind)
    if kind.itemsize == 8:
        high = _multiply_high_u64(a.view(np.uint64), b.view(np.uint64))
        if kind.kind == "i":
            high = high - np.where(a < 0, b, 0).view(np.uint64) - np.where(b < 0, a, 0).view(np.uint64)
        return high.view(kind)
    raise PtxError(f"mul.hi on {kind} is not defined here")


def _multiply_high_u64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_high, a_low, b_high, b_low = a >> half, a & low, b >> half, b & low
    middle = a_high * b_low + ((a_low * b_low) >> half)
    carry = (middle & low) + a_low * b_high
    return a_high * b_high + (middle >> half) + (carry >> half)


def _multiply_wide(kind: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    wide = TYPES[_WIDER[kind]]
    return lambda a, b: a.astype(wide) * b.astype(wide)


def _multiply(modifiers: tuple[str, ...]) -> Operation:
    part, kind = modifiers
    if part == "wide":
        return Operation(_WIDER[kind], (kind, kind), _multiply_wide(kind))
    return Operation(kind, (kind, kind), {"lo": operator.mul, "hi": _multiply_high}[part])


def _multiply_add(modifiers: tuple[str, ...]) -> Operation:
    product = _multiply(modifiers)
    return Operation(product.result, (*product.sources, product.result), lambda a, b, c: product.compute(a, b) + c)


def _shift(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[tuple[str, ...]], Operation]:
    """Shifts clamp the amount at the width; a right shift of a signed value fills with the sign."""

    def build(modifiers: tuple[str, ...]) -> Operation:
        (kind,) = modifiers
        width = type_bits(kind)

        def compute(a: np.ndarray, amount: np.ndarray) -> np.ndarray:
            legal = np.minimum(amount, np.uint32(width - 1)).astype(a.dtype)
            shifted = function(a, legal)
            if kind[0] == "s":
                return shifted
            return np.where(amount >= width, a.dtype.type(0), shifted)

        return Operation(kind, (kind, "u32"), compute)

    return build


def _funnel_shift(modifiers: tuple[str, ...]) -> Operation:
    if modifiers != ("l", "wrap", "b32"):
        raise PtxError(f"shf.{'.'.join(modifiers)} is not defined here")

    def compute(low: np.ndarray, high: np.ndarray, amount: np.ndarray) -> np.ndarray:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << (amount & np.uint32(31)).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)

    return Operation("b32", ("b32", "b32", "u32"), compute)


def _permute(modifiers: tuple[str, ...]) -> Operation:
    """``prmt.b32`` in its default mode: four bytes chosen from eight."""
    if modifiers != ("b32",):
        raise PtxError(f"prmt mode {modifiers} is not defined here")

    def compute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
        for position in range(4):
            choice = (selector >> np.uint32(4 * position)) & np.uint32(15)
            amount = ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = ((both >> amount) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * position)
        return result

    return Operation("b32", ("b32", "b32", "b32"), compute)


def _field_extract(modifiers: tuple[str, ...]) -> Operation:
    (kind,) = modifiers
    if kind not in ("u32", "s32"):
        raise PtxError(f"bfe.{kind} is not defined here")

    def compute(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (np.minimum(x & np.uint32(255), np.uint32(32)).astype(np.int64) for x in (position, length))
        field = (a.astype(np.int64) >> position) & ((np.int64(1) << length) - 1)
        if kind == "s32":
            # The field's highest bit is its sign; a shift to the top and back repeats it.
            field = np.where(length == 0, 0, field << (63 - length) << 1 >> (63 - length) >> 1)
        return field.astype(a.dtype)

    return Operation(kind, (kind, "u32", "u32"), compute)


def _select(modifiers: tuple[str, ...]) -> Operation:
    (kind,) = modifiers
    return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


def _unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tuple[str, ...]], Operation]:
    def build(modifiers: tuple[str, ...]) -> Operation:
        (kind,) = modifiers
        return Operation(kind, (kind,), function)

    return build


BUILDERS: dict[str, Callable[[tuple[str, ...]], Operation]] = {
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "min": _arithmetic(np.minimum),
    "max": _arithmetic(np.maximum),
    "div": _arithmetic(_divide),
    "rem": _arithmetic(_remainder),
    "mul": _multiply,
    "mad": _multiply_add,
    "neg": _unary(operator.neg),
    "not": _unary(operator.invert),
    "and": _arithmetic(operator.and_),
    "or": _arithmetic(operator.or_),
    "xor": _arithmetic(operator.xor),
    "shl": _shift(operator.lshift),
    "shr": _shift(operator.rshift),
    "shf": _funnel_shift,
    "prmt": _permute,
    "bfe": _field_extract,
    "setp": _setp,
    "selp": _select,
}
