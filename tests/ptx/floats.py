"""Floating-point arithmetic with IEEE 754 results only: what PTX leaves approximate is refused."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.ptx.parser import PtxError
from tests.ptx.scalars import TYPES, Operation

_CANONICAL_NAN = {"f16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
_FLOATS = ("f32", "f64")


def canonical(values: np.ndarray, kind: str) -> np.ndarray:
    """Give every NaN the bit pattern that the hardware gives it."""
    nans = np.isnan(values)
    if not nans.any():
        return values
    bits = np.array(values).view(f"u{values.dtype.itemsize}")
    bits[nans] = _CANONICAL_NAN[kind]
    return bits.view(values.dtype)


def flush(values: np.ndarray) -> np.ndarray:
    """``.ftz``: subnormal float32 values become zero of the same sign."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd in float64 (its error comes from Knuth's
    two-sum), and 53 bits rounded to odd are enough for the last rounding to float32 to be the only one (Boldo and
    Melquiond 2008).
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, towards), total).astype(np.float32)


def _rounded(modifiers: tuple[str, ...]) -> tuple[str, bool]:
    """The type and ``.ftz`` of an instruction that rounds to nearest even."""
    *flags, kind = modifiers
    unknown = set(flags) - {"rn", "ftz"}
    if unknown or kind not in _FLOATS:
        raise PtxError(f"no bit-exact definition here for the modifiers .{'.'.join(modifiers)}")
    return kind, "ftz" in flags


def _arithmetic(function: Callable[..., np.ndarray], sources: int) -> Callable[[tuple[str, ...]], Operation]:
    def build(modifiers: tuple[str, ...]) -> Operation:
        kind, ftz = _rounded(modifiers)

        def compute(*values: np.ndarray) -> np.ndarray:
            inputs = [flush(value) for value in values] if ftz else values
            result = canonical(function(*inputs).astype(TYPES[kind], copy=False), kind)
            return flush(result) if ftz else result

        return Operation(kind, (kind,) * sources, compute)

    return build


def _explicitly_rounded(function: Callable[..., np.ndarray], sources: int) -> Callable[[tuple[str, ...]], Operation]:
    """Instructions whose form without ``.rn`` is an approximation."""
    arithmetic = _arithmetic(function, sources)

    def build(modifiers: tuple[str, ...]) -> Operation:
        if "rn" not in modifiers:
            raise PtxError(f".{'.'.join(modifiers)} is approximate: no bit-exact definition exists")
        return arithmetic(modifiers)

    return build


def _extreme(
    pick_left: Callable[..., np.ndarray], zero_bits: Callable[..., np.ndarray]
) -> Callable[[tuple[str, ...]], Operation]:
    """min or max: -0 is below +0, and NaN loses to a number unless ``.NaN`` asks for it."""

    def build(modifiers: tuple[str, ...]) -> Operation:
        *flags, kind = modifiers
        if set(flags) - {"ftz", "NaN"} or kind not in _FLOATS:
            raise PtxError(f"min/max.{'.'.join(modifiers)} is not defined here")

        def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            if "ftz" in flags:
                a, b = flush(a), flush(b)
            unsigned = f"u{a.dtype.itemsize}"
            both_zero = (a == 0) & (b == 0)
            zeros = zero_bits(a.view(unsigned), b.view(unsigned)).view(a.dtype)
            picked = np.where(both_zero, zeros, np.where(pick_left(a, b), a, b))
            a_nan, b_nan = np.isnan(a), np.isnan(b)
            if "NaN" in flags:
                picked = np.where(a_nan | b_nan, a.dtype.type(np.nan), picked)
            else:
                picked = np.where(a_nan, b, np.where(b_nan, a, picked))
            return canonical(picked, kind)

        return Operation(kind, (kind, kind), compute)

    return build


def _sign(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[[tuple[str, ...]], Operation]:
    """neg and abs change the sign bit and nothing else."""

    def build(modifiers: tuple[str, ...]) -> Operation:
        kind = modifiers[-1]
        if modifiers[:-1] or kind not in _FLOATS:
            raise PtxError(f"neg/abs.{'.'.join(modifiers)} is not defined here")

        def compute(a: np.ndarray) -> np.ndarray:
            bits = a.view(f"u{a.dtype.itemsize}")
            sign = bits.dtype.type(1 << (a.dtype.itemsize * 8 - 1))
            return change(bits, sign).view(a.dtype)

        return Operation(kind, (kind,), compute)

    return build


def _fma(modifiers: tuple[str, ...]) -> Operation:
    if modifiers[-1] != "f32":
        raise PtxError(f"fma.{'.'.join(modifiers)} is not defined here")
    return _explicitly_rounded(fused_multiply_add, 3)(modifiers)


def _ex2(modifiers: tuple[str, ...]) -> Operation:
    """The nearest float32 stands for what the processor gives, which is within 2 ulp."""
    if modifiers != ("approx", "ftz", "f32"):
        raise PtxError(f"ex2.{'.'.join(modifiers)} is not defined here")
    return Operation("f32", ("f32",), lambda a: flush(np.exp2(flush(a).astype(np.float64)).astype(np.float32)))


def _div(modifiers: tuple[str, ...]) -> Operation:
    """``full`` of Triton 3.8, and ``approx`` of 3.9, which is 0 for divisors beyond 2^126 (PTX ISA, div).

    The nearest float32 stands for what the processor gives, which is within 2 ulp.
    """
    nearest = _explicitly_rounded(np.divide, 2)
    if modifiers == ("full", "f32"):
        return nearest(("rn", "f32"))
    if modifiers != ("approx", "f32"):
        return nearest(modifiers)

    def compute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        huge = np.where(np.isinf(a), np.float32(np.nan), np.copysign(np.float32(0), a) * np.sign(b))
        return canonical(np.where(np.abs(b) > np.float32(2.0**126), huge, a / b), "f32")

    return Operation("f32", ("f32", "f32"), compute)


def _half_too(build: Callable[[tuple[str, ...]], Operation]) -> Callable[[tuple[str, ...]], Operation]:
    """Add the form whose first operand is a float16, converted to float32 first, which is exact."""

    def build_either(modifiers: tuple[str, ...]) -> Operation:
        if modifiers[-2:] != ("f32", "f16"):
            return build(modifiers)
        single = build(modifiers[:-1])
        return Operation("f32", ("f16", "f32"), lambda a, b: single.compute(a.astype(np.float32), b))

    return build_either


def _pairs_too(build: Callable[[tuple[str, ...]], Operation]) -> Callable[[tuple[str, ...]], Operation]:
    """Add the form for two float32 in one register, which compute capability 10.0 brought."""

    def build_either(modifiers: tuple[str, ...]) -> Operation:
        if modifiers[-1] != "f32x2":
            return build(modifiers)
        single = build((*modifiers[:-1], "f32"))

        def compute(*values: np.ndarray) -> np.ndarray:
            halves = [np.ascontiguousarray(value).view(np.float32).reshape(-1, 2) for value in values]
            return np.ascontiguousarray(single.compute(*halves)).view(np.uint64).reshape(-1)

        return Operation("f32x2", ("f32x2",) * len(single.sources), compute)

    return build_either


BUILDERS: dict[str, Callable[[tuple[str, ...]], Operation]] = {
    "add": _half_too(_pairs_too(_arithmetic(operator.add, 2))),
    "sub": _half_too(_pairs_too(_arithmetic(operator.sub, 2))),
    "mul": _pairs_too(_arithmetic(operator.mul, 2)),
    "div": _div,
    "ex2": _ex2,
    "sqrt": _explicitly_rounded(np.sqrt, 1),
    "fma": _pairs_too(_fma),
    "min": _extreme(operator.lt, operator.or_),
    "max": _extreme(operator.gt, operator.and_),
    "neg": _sign(operator.xor),
    "abs": _sign(lambda bits, sign: bits & ~sign),
}
