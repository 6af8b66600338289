"""The PTX interpreter's arithmetic against other authorities: Python's integers and fractions, and NumPy."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.snippets import evaluate

RNG = np.random.default_rng(0)


def integers(kind: str, count: int = 200) -> np.ndarray:
    """Edge values, all their neighbours, and random ones."""
    limits = np.iinfo(kind)
    edges = [limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 2, 3, limits.max // 2, limits.max // 2 + 1]
    random = RNG.integers(limits.min, limits.max, count, dtype=kind, endpoint=True)
    return np.concatenate([np.array(edges, kind), random])


def float_bits(count: int = 4000) -> np.ndarray:
    """Every kind of float32: random patterns, zeros, infinities, NaN, subnormals, and ordinary magnitudes."""
    special = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x007FFFFF, 0x00800000]
    patterns = RNG.integers(0, 2**32, count, dtype=np.uint32)
    ordinary = RNG.normal(size=count).astype(np.float32).view(np.uint32)
    return np.concatenate([np.array(special, np.uint32), patterns, ordinary])


def floats(count: int = 4000) -> np.ndarray:
    return float_bits(count).view(np.float32)


def pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values against a shuffled copy, and against themselves."""
    shuffled = RNG.permutation(values)
    return np.concatenate([values, values]), np.concatenate([shuffled, values])


def wrapped(values: list[int], kind: str) -> np.ndarray:
    """Python's integers reduced to the width of a NumPy type."""
    width = np.dtype(kind).itemsize * 8
    unsigned = np.array([v & ((1 << width) - 1) for v in values], f"u{width // 8}")
    return unsigned.view(kind)


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


KINDS = {"u16": "uint16", "s16": "int16", "u32": "uint32", "s32": "int32", "u64": "uint64", "s64": "int64"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul.lo", "min", "max"])
def test_integer_arithmetic_matches_python(name: str, kind: str) -> None:
    oracle = {"add": int.__add__, "sub": int.__sub__, "mul.lo": int.__mul__, "min": min, "max": max}[name]
    a, b = pairs(integers(KINDS[kind]))
    expected = wrapped([oracle(int(x), int(y)) for x, y in zip(a, b, strict=True)], KINDS[kind])
    assert np.array_equal(evaluate(f"{name}.{kind} $0, $1, $2", [a, b], KINDS[kind]), expected)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_mul_hi_is_the_upper_half_of_the_product(kind: str) -> None:
    a, b = pairs(integers(KINDS[kind]))
    width = np.dtype(KINDS[kind]).itemsize * 8
    expected = wrapped([(int(x) * int(y)) >> width for x, y in zip(a, b, strict=True)], KINDS[kind])
    assert np.array_equal(evaluate(f"mul.hi.{kind} $0, $1, $2", [a, b], KINDS[kind]), expected)


@pytest.mark.parametrize(("kind", "wide"), [("u16", "uint32"), ("s16", "int32"), ("u32", "uint64"), ("s32", "int64")])
def test_mul_wide_and_mad_wide_keep_the_whole_product(kind: str, wide: str) -> None:
    a, b = pairs(integers(KINDS[kind]))
    c = RNG.permutation(np.resize(integers(wide), a.shape))
    product = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    total = [p + int(z) for p, z in zip(product, c, strict=True)]
    assert np.array_equal(evaluate(f"mul.wide.{kind} $0, $1, $2", [a, b], wide), wrapped(product, wide))
    assert np.array_equal(evaluate(f"mad.wide.{kind} $0, $1, $2, $3", [a, b, c], wide), wrapped(total, wide))


@pytest.mark.parametrize("kind", ["u32", "s32", "s64"])
def test_division_truncates_towards_zero(kind: str) -> None:
    a, b = pairs(integers(KINDS[kind]))
    b = np.where(b == 0, 7, b).astype(KINDS[kind])
    quotient = [abs(int(x)) // abs(int(y)) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)]
    rest = [int(x) - q * int(y) for x, y, q in zip(a, b, quotient, strict=True)]
    assert np.array_equal(evaluate(f"div.{kind} $0, $1, $2", [a, b], KINDS[kind]), wrapped(quotient, KINDS[kind]))
    assert np.array_equal(evaluate(f"rem.{kind} $0, $1, $2", [a, b], KINDS[kind]), wrapped(rest, KINDS[kind]))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_clamp_their_amount(width: int) -> None:
    a = np.repeat(integers(f"int{width}", 20), 8)
    amount = np.resize(np.array([0, 1, 7, width - 1, width, width + 1, 200, 2**32 - 1], np.uint32), a.shape)
    left = wrapped([int(x) << int(n) if n < width else 0 for x, n in zip(a, amount, strict=True)], f"uint{width}")
    signed = [int(x) >> min(int(n), width) for x, n in zip(a, amount, strict=True)]
    unsigned = [int(x) >> int(n) for x, n in zip(a.view(f"uint{width}"), amount, strict=True)]
    assert np.array_equal(evaluate(f"shl.b{width} $0, $1, $2", [a, amount], f"uint{width}"), left)
    assert np.array_equal(
        evaluate(f"shr.s{width} $0, $1, $2", [a, amount], f"int{width}"), wrapped(signed, f"int{width}")
    )
    shifted = evaluate(f"shr.u{width} $0, $1, $2", [a.view(f"uint{width}"), amount], f"uint{width}")
    assert np.array_equal(shifted, np.array(unsigned, f"uint{width}"))


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift_matches_a_64_bit_shift(direction: str, mode: str) -> None:
    low, high = pairs(integers("uint32"))
    amount = np.resize(np.array([0, 1, 16, 31, 32, 33, 100], np.uint32), low.shape)
    expected = []
    for x, y, n in zip(low, high, amount, strict=True):
        n, both = int(n) % 32 if mode == "wrap" else min(int(n), 32), int(y) << 32 | int(x)
        expected.append((both << n) >> 32 if direction == "l" else both >> n)
    result = evaluate(f"shf.{direction}.{mode}.b32 $0, $1, $2, $3", [low, high, amount], "uint32")
    assert np.array_equal(result, wrapped(expected, "uint32"))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic_matches_numpy(width: int) -> None:
    a, b = pairs(integers(f"uint{width}"))
    for name, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        assert np.array_equal(evaluate(f"{name}.b{width} $0, $1, $2", [a, b], f"uint{width}"), expected)
    assert np.array_equal(evaluate(f"not.b{width} $0, $1", [a], f"uint{width}"), ~a)


@pytest.mark.parametrize("table", [0x00, 0x96, 0xE8, 0xCA, 0x2D, 0xFF])
def test_lop3_looks_up_its_truth_table(table: int) -> None:
    a, b, c = (RNG.permutation(integers("uint32")) for _ in range(3))
    expected = [
        sum(((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1))) & 1) << i for i in range(32))
        for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    ]
    result = evaluate(f"lop3.b32 $0, $1, $2, $3, {table}", [a, b, c], "uint32")
    assert np.array_equal(result, np.array(expected, np.uint32))


def test_prmt_picks_bytes_and_signs() -> None:
    a, b = pairs(integers("uint32"))
    selector = RNG.integers(0, 2**16, a.shape, dtype=np.uint32)
    expected = []
    for x, y, s in zip(a, b, selector, strict=True):
        source = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        choices = [int(s) >> 4 * i & 15 for i in range(4)]
        picked = [source[c & 7] if c < 8 else (255 if source[c & 7] & 128 else 0) for c in choices]
        expected.append(int.from_bytes(bytes(picked), "little"))
    assert np.array_equal(
        evaluate("prmt.b32 $0, $1, $2, $3", [a, b, selector], "uint32"), np.array(expected, np.uint32)
    )


def test_bit_field_population_and_leading_zeros_match_python() -> None:
    a = integers("uint32")
    assert evaluate("popc.b32 $0, $1", [a], "uint32").tolist() == [bin(x).count("1") for x in a.tolist()]
    assert evaluate("clz.b32 $0, $1", [a], "uint32").tolist() == [32 - x.bit_length() for x in a.tolist()]
    assert evaluate("bfe.u32 $0, $1, 5, 11", [a], "uint32").tolist() == [x >> 5 & 0x7FF for x in a.tolist()]


def test_moves_pack_and_unpack_halves() -> None:
    a, b = pairs(integers("uint16"))
    packed = evaluate("mov.b32 $0, {$1, $2}", [a, b], "uint32")
    assert packed.tolist() == [x | y << 16 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert np.array_equal(evaluate("mov.b32 {_, $0}, $1", [packed], "uint16"), b)
    assert np.array_equal(evaluate("mov.b32 {$0, _}, $1", [packed], "uint16"), a)


@pytest.mark.parametrize("kind", ["u32", "s32", "s64"])
def test_setp_compares_integers(kind: str) -> None:
    a, b = pairs(integers(KINDS[kind]))
    for name, expected in {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}.items():
        assert np.array_equal(evaluate(f"setp.{name}.{kind} $0, $1, $2", [a, b], "bool"), expected)


def test_setp_on_floats_is_false_for_nan_unless_unordered() -> None:
    a, b = pairs(floats(300))
    nan = np.array([math.isnan(x) or math.isnan(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    ordered = {"eq": a == b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "ne": (a != b) & ~nan}
    for name, expected in ordered.items():
        assert np.array_equal(evaluate(f"setp.{name}.f32 $0, $1, $2", [a, b], "bool"), expected & ~nan), name
        assert np.array_equal(evaluate(f"setp.{name}u.f32 $0, $1, $2", [a, b], "bool"), expected | nan), name
    assert np.array_equal(evaluate("setp.nan.f32 $0, $1, $2", [a, b], "bool"), nan)
    assert np.array_equal(evaluate("setp.num.f32 $0, $1, $2", [a, b], "bool"), ~nan)


def test_setp_combines_with_a_predicate() -> None:
    a, b = pairs(integers("int32"))
    third = RNG.integers(0, 2, a.shape).astype(bool)
    for name, expected in {"and": (a < b) & third, "or": (a < b) | third, "xor": (a < b) ^ third}.items():
        assert np.array_equal(evaluate(f"setp.lt.{name}.s32 $0, $1, $2, $3", [a, b, third], "bool"), expected)


def test_selp_takes_the_first_where_the_predicate_holds() -> None:
    a, b = pairs(integers("uint32"))
    choice = RNG.integers(0, 2, a.shape).astype(bool)
    expected = [x if p else y for x, y, p in zip(a.tolist(), b.tolist(), choice.tolist(), strict=True)]
    assert evaluate("selp.b32 $0, $1, $2, $3", [a, b, choice], "uint32").tolist() == expected


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
