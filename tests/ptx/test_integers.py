"""The PTX interpreter's integer arithmetic against other authorities: Python's integers, and NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.snippets import evaluate, pairs

RNG = np.random.default_rng(0)


def integers(kind: str, count: int = 200) -> np.ndarray:
    """Edge values, all their neighbours, and random ones."""
    limits = np.iinfo(kind)
    edges = [limits.min, limits.min + 1, limits.max, limits.max - 1, 0, 1, 2, 3, limits.max // 2, limits.max // 2 + 1]
    random = RNG.integers(limits.min, limits.max, count, dtype=kind, endpoint=True)
    return np.concatenate([np.array(edges, kind), random])


def wrapped(values: list[int], kind: str) -> np.ndarray:
    """Python's integers reduced to the width of a NumPy type."""
    width = np.dtype(kind).itemsize * 8
    unsigned = np.array([v & ((1 << width) - 1) for v in values], f"u{width // 8}")
    return unsigned.view(kind)


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


@pytest.mark.parametrize(("kind", "wide"), [("u32", "uint64"), ("s32", "int64")])
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


def test_funnel_shift_matches_a_64_bit_shift() -> None:
    low, high = pairs(integers("uint32"))
    amount = np.resize(np.array([0, 1, 16, 31, 32, 33, 100], np.uint32), low.shape)
    expected = [((int(y) << 32 | int(x)) << int(n) % 32) >> 32 for x, y, n in zip(low, high, amount, strict=True)]
    result = evaluate("shf.l.wrap.b32 $0, $1, $2, $3", [low, high, amount], "uint32")
    assert np.array_equal(result, wrapped(expected, "uint32"))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic_matches_numpy(width: int) -> None:
    a, b = pairs(integers(f"uint{width}"))
    for name, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        assert np.array_equal(evaluate(f"{name}.b{width} $0, $1, $2", [a, b], f"uint{width}"), expected)
    assert np.array_equal(evaluate(f"not.b{width} $0, $1", [a], f"uint{width}"), ~a)


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


def test_bit_fields_match_python() -> None:
    a = integers("uint32")
    assert evaluate("bfe.u32 $0, $1, 5, 11", [a], "uint32").tolist() == [x >> 5 & 0x7FF for x in a.tolist()]
    signed = [((x >> 5 & 0x7FF) ^ 0x400) - 0x400 for x in a.tolist()]
    assert evaluate("bfe.s32 $0, $1, 5, 11", [a], "int32").tolist() == signed


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


def test_selp_takes_the_first_where_the_predicate_holds() -> None:
    a, b = pairs(integers("uint32"))
    choice = RNG.integers(0, 2, a.shape).astype(bool)
    expected = [x if p else y for x, y, p in zip(a.tolist(), b.tolist(), choice.tolist(), strict=True)]
    assert evaluate("selp.b32 $0, $1, $2, $3", [a, b, choice], "uint32").tolist() == expected
