"""The PTX interpreter's conversions against torch and exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ptx.parser import PtxError
from tests.ptx.snippets import evaluate

RNG = np.random.default_rng(1)


def rounding_cases() -> np.ndarray:
    """float32 values, with those halfway between two 16-bit values and their neighbours."""
    bf16_ties = (RNG.integers(0, 2**16, 2000, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    f16_ties = RNG.normal(size=2000).astype(np.float16).astype(np.float32).view(np.uint32) | np.uint32(0x1000)
    tiny = (RNG.integers(0, 2**11, 500) * 2.0**-26).astype(np.float32).view(np.uint32)
    large = np.linspace(65000, 66000, 500, dtype=np.float32).view(np.uint32)
    bits = np.concatenate([bf16_ties, f16_ties, tiny, large, RNG.integers(0, 2**32, 2000, dtype=np.uint32)])
    return np.concatenate([bits, bits - np.uint32(1), bits + np.uint32(1)]).view(np.float32)


def torch_bits(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What torch rounds to, with the hardware's NaN."""
    bits = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), bits)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_rounds_to_nearest_even_as_torch(name: str, dtype: torch.dtype) -> None:
    values = rounding_cases()
    expected = torch_bits(values, dtype)
    assert np.array_equal(evaluate(f"cvt.rn.{name}.f32 $0, $1", [values], "uint16"), expected)
    other = RNG.permutation(values)
    packed = evaluate(f"cvt.rn.{name}x2.f32 $0, $1, $2", [values, other], "uint32")
    assert np.array_equal(packed >> np.uint32(16), expected), "the first operand belongs in the upper half"
    assert np.array_equal(packed & np.uint32(0xFFFF), torch_bits(other, dtype))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_widening_is_exact_for_every_16_bit_pattern(name: str, dtype: torch.dtype) -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    result = evaluate(f"cvt.f32.{name} $0, $1", [bits], "float32")
    assert np.array_equal(np.isnan(result), np.isnan(expected))
    number = ~np.isnan(expected)
    assert np.array_equal(result.view(np.uint32)[number], expected.view(np.uint32)[number])


@pytest.mark.parametrize(("kind", "dtype"), [("u32", "uint32"), ("s32", "int32"), ("u64", "uint64"), ("s64", "int64")])
def test_integer_to_float_rounds_to_nearest_even(kind: str, dtype: str) -> None:
    limits = np.iinfo(dtype)
    values = RNG.integers(limits.min, limits.max, 2000, dtype=dtype, endpoint=True)
    ties = np.array([2**24 + 1, 2**24 + 3, 2**25 + 2, limits.max, limits.min], dtype)
    values = np.concatenate([values, ties, values >> np.array(5).astype(dtype)])
    result = evaluate(f"cvt.rn.f32.{kind} $0, $1", [values], "float32")
    for value, rounded in zip(values.tolist(), result, strict=True):
        neighbours = [int(np.nextafter(rounded, np.float32(side))) for side in (-np.inf, np.inf)]
        error = abs(value - int(rounded))
        assert all(error <= abs(value - neighbour) for neighbour in neighbours)
        is_tie = any(error == abs(value - neighbour) and error for neighbour in neighbours)
        assert not is_tie or rounded.view(np.uint32) % 2 == 0


def test_integer_to_integer_truncates_or_extends() -> None:
    values = RNG.integers(-(2**63), 2**63 - 1, 500, dtype=np.int64)
    assert np.array_equal(evaluate("cvt.u32.u64 $0, $1", [values], "uint32"), values.astype(np.uint32))
    narrow = values.astype(np.int32)
    assert np.array_equal(evaluate("cvt.s64.s32 $0, $1", [narrow], "int64"), narrow.astype(np.int64))
    unsigned = narrow.view(np.uint32)
    assert np.array_equal(evaluate("cvt.u64.u32 $0, $1", [unsigned], "uint64"), unsigned.astype(np.uint64))
    assert np.array_equal(evaluate("cvt.s16.s8 $0, $1", [values.astype(np.int16)], "int16"), values.astype(np.int8))


@pytest.mark.parametrize(
    "instruction",
    [
        "ex2.approx.f32 $0, $1",
        "sqrt.approx.f32 $0, $1",
        "cvt.rz.f32.u32 $0, $1",
        "cvt.rzi.s32.f32 $0, $1",
        "cvt.rni.f32.f32 $0, $1",
        "cvt.sat.u16.s32 $0, $1",
        "shf.r.clamp.b32 $0, $1, $1, $1",
        "add.sat.f32 $0, $1, $1",
    ],
)
def test_what_is_approximate_or_compiled_kernels_do_not_contain_is_refused(instruction: str) -> None:
    with pytest.raises(PtxError, match=r"approx|not defined|bit-exact"):
        evaluate(instruction, [np.ones(4, np.float32)], "float32")
