"""The PTX interpreter's float32 arithmetic against other authorities: Python's fractions, and NumPy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.snippets import evaluate, pairs

RNG = np.random.default_rng(0)


def float_bits(count: int = 4000) -> np.ndarray:
    """Every kind of float32: random patterns, zeros, infinities, NaN, subnormals, and ordinary magnitudes."""
    special = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x007FFFFF, 0x00800000]
    patterns = RNG.integers(0, 2**32, count, dtype=np.uint32)
    ordinary = RNG.normal(size=count).astype(np.float32).view(np.uint32)
    return np.concatenate([np.array(special, np.uint32), patterns, ordinary])


def floats(count: int = 4000) -> np.ndarray:
    return float_bits(count).view(np.float32)


def round_to_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a rational number, ties to even, by exact comparison with both neighbours."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = max(math.floor(math.log2(magnitude)) if magnitude < 2**1000 else 999, -126)
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    while exponent > -126 and Fraction(2) ** exponent > magnitude:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    rounded = round(magnitude / ulp) * ulp  # Python rounds a Fraction's ties to even
    result = np.float32(np.inf) if rounded >= Fraction(2) ** 128 else np.float32(float(rounded))
    return -result if value < 0 else result


def same_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bit for bit, any NaN equal to any NaN."""
    nan = np.isnan(expected)
    unsigned = f"u{expected.itemsize}"
    return np.array_equal(np.isnan(actual), nan) and np.array_equal(
        actual.view(unsigned)[~nan], expected.view(unsigned)[~nan]
    )


def test_setp_on_floats_is_false_for_nan_unless_unordered() -> None:
    a, b = pairs(floats(300))
    nan = np.array([math.isnan(x) or math.isnan(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    ordered = {"eq": a == b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "ne": (a != b) & ~nan}
    for name, expected in ordered.items():
        assert np.array_equal(evaluate(f"setp.{name}.f32 $0, $1, $2", [a, b], "bool"), expected & ~nan), name
        assert np.array_equal(evaluate(f"setp.{name}u.f32 $0, $1, $2", [a, b], "bool"), expected | nan), name
    assert np.array_equal(evaluate("setp.nan.f32 $0, $1, $2", [a, b], "bool"), nan)


@pytest.mark.parametrize("name", ["add.rn", "sub.rn", "mul.rn", "div.rn"])
def test_float_arithmetic_rounds_once_to_nearest_even(name: str) -> None:
    a, b = pairs(floats(2000))
    finite = np.isfinite(a) & np.isfinite(b) & ((b != 0) | (name != "div.rn"))
    a, b = a[finite], b[finite]
    oracle = {"add": Fraction.__add__, "sub": Fraction.__sub__, "mul": Fraction.__mul__, "div": Fraction.__truediv__}
    exact = [oracle[name[:3]](Fraction(float(x)), Fraction(float(y))) for x, y in zip(a, b, strict=True)]
    expected = np.array([round_to_float32(value) for value in exact])
    nonzero = np.array([value != 0 for value in exact])
    result = evaluate(f"{name}.f32 $0, $1, $2", [a, b], "float32")
    assert same_bits(result[nonzero], expected[nonzero])
    assert (result[~nonzero] == 0).all()


def test_fma_rounds_once() -> None:
    a, b = pairs(floats(2000))
    c = RNG.permutation(a)
    # A sum that cancels, and one that lands on a tie of the last rounding, are where two roundings show.
    with np.errstate(all="ignore"):
        c[: len(c) // 2] = (-(a.astype(np.float64) * b) * (1 + 2.0**-30)).astype(np.float32)[: len(c) // 2]
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    nonzero = np.array([value != 0 for value in exact])
    expected = np.array([round_to_float32(value) for value in exact])
    assert same_bits(evaluate("fma.rn.f32 $0, $1, $2, $3", [a, b, c], "float32")[nonzero], expected[nonzero])


@pytest.mark.parametrize("name", ["add.rn", "sub.rn", "mul.rn", "fma.rn"])
def test_packed_pairs_compute_each_half_alone(name: str) -> None:
    inputs = [RNG.permutation(floats(400))[:800] for _ in range(3 if name == "fma.rn" else 2)]
    operands = ", ".join(["$0", *(f"${i + 1}" for i in range(len(inputs)))])
    single = evaluate(f"{name}.f32 {operands}", inputs, "float32")
    packed = evaluate(f"{name}.f32x2 {operands}", [a.view(np.uint64) for a in inputs], "uint64")
    assert same_bits(packed.view(np.float32), single)


@pytest.mark.parametrize("name", ["add.rn", "sub.rn"])
def test_a_float16_operand_is_converted_first(name: str) -> None:
    half = np.arange(0, 2**16, 16, dtype=np.uint16).view(np.float16)
    b = floats(len(half))[: len(half)]
    whole = evaluate(f"{name}.f32 $0, $1, $2", [half.astype(np.float32), b], "float32")
    assert same_bits(evaluate(f"{name}.f32.f16 $0, $1, $2", [half, b], "float32"), whole)


def test_fma_is_not_a_product_and_a_sum() -> None:
    a, c = np.array([1 + 2.0**-12], np.float32), np.array([-1 - 2.0**-11], np.float32)
    assert evaluate("fma.rn.f32 $0, $1, $1, $2", [a, c], "float32")[0] == np.float32(2.0**-24)
    assert a * a + c == 0


def test_sqrt_is_the_nearest_float() -> None:
    a = np.abs(floats(1000))
    a = a[np.isfinite(a)]
    result = evaluate("sqrt.rn.f32 $0, $1", [a], "float32")
    for value, root in zip(a.tolist(), result, strict=True):
        below = (Fraction(float(np.nextafter(root, np.float32(-1)))) + Fraction(float(root))) / 2
        above = (Fraction(float(np.nextafter(root, np.float32(np.inf)))) + Fraction(float(root))) / 2
        assert value == root == 0 or below**2 < Fraction(value) < above**2


def test_invalid_operations_give_the_canonical_nan() -> None:
    infinity = np.array([np.inf], np.float32)
    assert evaluate("sub.rn.f32 $0, $1, $1", [infinity], "float32").view(np.uint32)[0] == 0x7FFFFFFF


def test_flush_to_zero_only_where_asked() -> None:
    tiny = np.array([2.0**-127, -(2.0**-140)], np.float32)
    assert np.array_equal(evaluate("add.rn.f32 $0, $1, $1", [tiny], "float32"), tiny * 2)
    flushed = evaluate("mul.ftz.f32 $0, $1, 0f3F800000", [tiny], "float32")
    assert np.array_equal(flushed.view(np.uint32), np.array([0, 0x80000000], np.uint32))


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes_order_zeros_and_treat_nan_as_told(name: str) -> None:
    a, b = pairs(floats(300))
    pick = {"min": min, "max": max}[name]
    rank = [(x, math.copysign(1, x)) for x in a.tolist()], [(y, math.copysign(1, y)) for y in b.tolist()]
    ordinary = np.array([pick(x, y)[0] for x, y in zip(*rank, strict=True)], np.float32)
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    quiet = np.where(nan_a, b, np.where(nan_b, a, ordinary))
    loud = np.where(nan_a | nan_b, np.float32(np.nan), ordinary)
    assert same_bits(evaluate(f"{name}.f32 $0, $1, $2", [a, b], "float32"), quiet)
    assert same_bits(evaluate(f"{name}.NaN.f32 $0, $1, $2", [a, b], "float32"), loud)


def test_neg_and_abs_touch_only_the_sign() -> None:
    a = floats(300)
    bits = a.view(np.uint32)
    assert np.array_equal(evaluate("neg.f32 $0, $1", [a], "uint32"), bits ^ np.uint32(0x80000000))
    assert np.array_equal(evaluate("abs.f32 $0, $1", [a], "uint32"), bits & np.uint32(0x7FFFFFFF))


def test_approximations_are_the_nearest_float_and_flush() -> None:
    a = np.array([0.0, -1.0, 0.5, 126.5, -127.0, 200.0, -1e-40, -np.inf, np.inf], np.float32)
    expected = [1.0, 0.5, np.sqrt(2.0), 2.0**126.5, 0.0, np.inf, 1.0, 0.0, np.inf]
    assert same_bits(evaluate("ex2.approx.ftz.f32 $0, $1", [a], "float32"), np.array(expected, np.float32))
    a = np.array([1.0, -3.0, -3.0, np.inf, 3.0, 1.0], np.float32)
    b = np.array([3.0, 2.0**126, 2.0**127, 2.0**127, np.inf, -0.5], np.float32)
    full = np.array([1 / 3, -3 * 2.0**-126, -3 * 2.0**-127, np.inf, 0.0, -2.0], np.float32)
    approx = np.array([1 / 3, -3 * 2.0**-126, -0.0, np.nan, 0.0, -2.0], np.float32)
    assert same_bits(evaluate("div.full.f32 $0, $1, $2", [a, b], "float32"), full)
    assert same_bits(evaluate("div.approx.f32 $0, $1, $2", [a, b], "float32"), approx)
