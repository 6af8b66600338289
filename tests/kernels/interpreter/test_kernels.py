"""Each kernel against its twin, bit for bit, in Triton's interpreter and through the public door.

The interpreter truncates when it converts float32 to bfloat16, so that no bfloat16 output is compared here; bfloat16
inputs and float16 outputs are. Programs take tenths of a second each, hence few and small shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastddpm import Schedule, ops
from fastddpm.diagnostics.step_cases import StepCase, arrange, inputs, setting_cases, step_case
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.ops.group_norm import group_norm
from fastddpm.ops.operators import pack
from fastddpm.ops.twins import Flags
from fastddpm.tables.table import COLUMNS, loss_rows
from tests.ops.norm_cases import CASES as NORM_CASES
from tests.ops.norm_cases import NormCase
from tests.ops.shapes import SHAPES

OUTPUTS = ("out", "x0_out", "low_out", "history")


def counter(batch: int, step: int = 2**31 + 5, stream: int = 1) -> Counter:
    keys, ids = resolve_seeds(seed=2**63 + 12345, sample_ids=[2**32 - 1 - b for b in range(batch)])
    return Counter(keys, ids, torch.tensor([step]), stream)


def both(kw: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(twin, kernel) for every output."""
    given = {name: kw[name] for name in OUTPUTS if kw[name] is not None}
    fresh = {name: t.clone() if name == "history" else torch.full_like(t, torch.nan) for name, t in given.items()}
    ops.p_sample(**kw, backend="torch")
    ops.p_sample(**(kw | fresh), backend="triton")
    return [(given[name], fresh[name]) for name in given]


def check(kw: dict[str, Any]) -> None:
    for twin, kernel in both(kw):
        assert torch.equal(twin.nan_to_num(7.0), kernel.nan_to_num(7.0))
        assert torch.equal(twin.isnan(), kernel.isnan())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 64, 1023, 3072])
def test_randn_kernel_equals_its_twin(n: int) -> None:
    for dtype in (torch.float32, torch.float16):
        draws = [ops.randn(counter(2), (n,), dtype, backend=backend) for backend in ("torch", "triton")]
        assert torch.equal(*draws)


@pytest.mark.parametrize("case", setting_cases(), ids=str)
def test_p_sample_kernel_equals_its_twin_for_every_pair_of_settings(case: StepCase) -> None:
    check(inputs(case))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_p_sample_kernel_equals_its_twin_for_every_shape(shape: tuple[int, ...]) -> None:
    check(inputs(step_case("clip", "use_m", "learned", shape=shape)))


@pytest.mark.parametrize("flags", [{"m_nhwc"}, {"low_nhwc"}, {"m_nhwc", "low_nhwc", "learned", "history_3"}])
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 3, 2, 6), (2, 2, 3, 4, 4)], ids=str)
def test_p_sample_kernel_reads_and_writes_channels_last(shape: tuple[int, ...], flags: set[str]) -> None:
    check(inputs(step_case("clip", *flags, shape=shape)))


@pytest.mark.parametrize("m", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.float16], ids=str)
def test_p_sample_kernel_equals_its_twin_for_every_dtype(x: torch.dtype, m: torch.dtype) -> None:
    check(inputs(step_case("clip", "history_1", "x0_out", "low_out", x=x, m=m)))


def test_p_sample_kernel_takes_unaligned_strided_and_expanded_tensors() -> None:
    kw = inputs(step_case("clip", "low_out", "x0_out", noise="given"))
    offset = torch.zeros(97)[1:].view(2, 3, 4, 4).copy_(kw["x_t"])
    check(kw | {"x_t": offset})
    check(kw | {"x_t": kw["x_t"][:, :1].expand(2, 3, 4, 4)})
    check(kw | {"m": torch.zeros(2, 3, 4, 8)[..., ::2].copy_(kw["m"])})
    check(kw | {"out": arrange(kw["out"], "channels_last"), "noise": arrange(kw["noise"], "channels_last")})


def test_p_sample_kernel_works_in_place() -> None:
    kw = inputs(step_case("clip"))
    ops.p_sample(**kw, backend="torch")
    ops.p_sample(**(kw | {"out": kw["x_t"]}), backend="triton")
    assert torch.equal(kw["x_t"], kw["out"])


def test_p_sample_kernel_writes_within_its_output_only() -> None:
    """Canaries around an output of odd size stay what they were."""
    for shape in ((3, 5), (2, 3, 2, 6)):
        kw = inputs(step_case("clip", shape=shape))
        n = kw["x_t"].numel()
        memory = torch.full((n + 64,), 42.0)
        ops.p_sample(**(kw | {"out": memory[32 : 32 + n].view(shape)}), backend="triton")
        assert (memory[:32] == 42.0).all()
        assert (memory[-32:] == 42.0).all()
        assert torch.equal(memory[32 : 32 + n].view(shape), ops.p_sample(**kw, backend="torch"))


def test_p_sample_kernel_treats_special_values_like_its_twin() -> None:
    """NaN and Inf in every input; sigma 0 in the last row switches noise off."""
    special = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")])
    grid = torch.cartesian_prod(special, special, special)
    for flags in ({"clip"}, set(), {"clip", "learned"}):
        kw = inputs(step_case(*flags, shape=(2, 1, len(grid)), noise="given"))
        kw["x_t"].copy_(grid[:, 0])
        kw["m"][:, :1].copy_(grid[:, 1].expand(2, 1, -1))
        kw["m"][:, -1:].copy_(grid[:, 1].expand(2, 1, -1))
        kw["noise"].copy_(grid[:, 2])
        check(kw | {"row": torch.tensor([1, 5])})


def test_p_sample_kernel_does_not_launch_for_an_empty_batch() -> None:
    kw = inputs(step_case("clip", shape=(0, 3, 4, 4)))
    assert ops.p_sample(**kw, backend="triton").shape == (0, 3, 4, 4)


@pytest.mark.parametrize("given", [False, True], ids=["counter", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 2), (3, 5), (2, 1, 8, 8), (1, 3, 32, 32)], ids=str)
def test_q_sample_kernel_equals_its_twin(shape: tuple[int, ...], dtype: torch.dtype, given: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    noise = eps if given else counter(shape[0], stream=noise_v1.STREAM_TRAIN)
    rows, row = torch.rand(7, 2, generator=g), torch.arange(shape[0]) % 7
    results = [ops.q_sample(x_0, rows, row, noise, return_eps=True, backend=b) for b in ("torch", "triton")]
    for twin, kernel in zip(*results, strict=True):
        assert torch.equal(twin, kernel)
    assert torch.equal(results[0][0], ops.q_sample(x_0, rows, row, noise, backend="triton"))
    keep = torch.rand(shape, generator=g) < 0.5
    pasted = ops.q_sample(x_0, rows, row, noise, out=eps.clone(), keep=keep, backend="triton")
    assert torch.equal(pasted, torch.where(keep, eps, results[0][0]))


@pytest.mark.parametrize(
    ("shape", "prediction", "learned", "layout"),
    [
        ((3, 3, 4, 4), "epsilon", False, "contiguous"),
        ((2, 3, 4, 4), "v", True, "channels_last"),
        ((2, 3, 3, 5), "v", False, "channels_last"),
        ((40, 2), "x_0", False, "contiguous"),
    ],
    ids=str,
)
def test_ddpm_loss_kernel_equals_its_twin(shape: tuple[int, ...], prediction: str, learned: bool, layout: str) -> None:
    g = torch.Generator().manual_seed(0)
    m = torch.randn(shape[0], shape[1] * (1 + learned), *shape[2:], generator=g)
    m = arrange(m, "channels_last") if layout == "channels_last" else m
    x_0 = None if prediction == "epsilon" else torch.randn(shape, generator=g)
    noise = None if prediction == "x_0" else counter(shape[0], stream=noise_v1.STREAM_TRAIN)
    rows, row = loss_rows(Schedule.linear(), prediction), torch.arange(shape[0])
    results = []
    for backend in ("torch", "triton"):
        prediction_m = m.clone().requires_grad_()
        losses = ops.ddpm_loss(prediction_m, rows, row, noise, x_0, learned=learned, backend=backend)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), prediction_m)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0.0)
    assert torch.equal(results[1][1], results[0][1])
    assert results[1][1].stride() == m.stride()


@pytest.mark.parametrize("op", ["p_sample", "p_sample_out", "q_sample", "randn"])
def test_operators_pass_opcheck_with_the_kernels(op: str) -> None:
    kw = inputs(step_case("clip", "x0_out", noise="given"))
    noise, flags, how = pack(kw["noise"]), Flags(clip=True).to_int(), ("triton", False)
    tensors = (kw["x_t"], kw["m"], kw["rows"], kw["row"], *noise)
    arguments: dict[str, tuple[Any, ...]] = {
        "p_sample": (*tensors, None, flags, *how),
        "p_sample_out": (*tensors, None, flags, kw["out"], kw["x0_out"], None, *how),
        "q_sample": (kw["x_t"], kw["rows"][:, :2].contiguous(), kw["row"], *noise, True, *how),
        "randn": (*pack(counter(2)), 2, 5, torch.float32, *how),
    }
    results = torch.library.opcheck(getattr(torch.ops.fastddpm, op).default, arguments[op])
    assert set(results.values()) == {"SUCCESS"}


def test_constants_of_kernels_and_twins_agree() -> None:
    """Bits depend on the constants only through rare inputs for some: compare the numbers themselves."""
    from fastddpm.kernels import noise as kernel
    from fastddpm.kernels import p_sample

    from fastddpm.ops import twins as step

    for twin, constants in (
        (noise_v1._log2_quotient, kernel.LOG2_POLY),
        (noise_v1._sin_quotient, kernel.SIN_POLY),
        (noise_v1._cos, kernel.COS_POLY),
        (step._exp_poly, p_sample.EXP_POLY),
    ):
        assert constants.value in twin.__code__.co_consts
    assert p_sample.Row._fields == COLUMNS
    assert kernel.SQRT_HALF_BITS.value == noise_v1.SQRT_HALF_BITS
    assert tuple(m.value for m in (kernel.PHILOX_M0, kernel.PHILOX_M1)) == noise_v1.PHILOX_M
    assert tuple(w.value for w in (kernel.PHILOX_W0, kernel.PHILOX_W1)) == noise_v1.PHILOX_W


def test_exp_kernel_equals_its_twin_over_its_range() -> None:
    """Through a learned row with mean 0, sigma 1, h0 = 0, h1 = 1 and z = 1: x_prev = exp(v)."""
    v = torch.cat([torch.linspace(-100, 100, 4000), torch.linspace(-1e-6, 1e-6, 90)])
    x = torch.zeros(1, 1, len(v))
    rows = torch.zeros(1, 14)
    rows[0, 8] = rows[0, 10] = 1.0
    m = torch.stack([torch.zeros_like(v), v])[None]
    arguments = (x, m, rows, torch.tensor([0]), torch.ones_like(x))
    results = [ops.p_sample(*arguments, clip=False, learned=True, backend=b) for b in ("torch", "triton")]
    assert torch.equal(*results)
    assert torch.allclose(results[0][0, 0], v.clamp(-87, 88).exp(), rtol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_group_norm_kernel_is_its_twin_to_rounding(case: NormCase, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    (y, u), (expected, kept) = (group_norm(**arguments, backend=backend) for backend in ("triton", "torch"))
    tolerance = 2**-20 if dtype == torch.float32 else 2**-9
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(u, kept)
