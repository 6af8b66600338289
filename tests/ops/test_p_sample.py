"""p_sample's twin against NumPy, bit for bit; the effect of each flag, layout, dtype and special value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastddpm import ops
from fastddpm.diagnostics.step_cases import StepCase, arrange, inputs, setting_cases, step_case
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.v1 import Counter
from fastddpm.ops import twins as step
from tests.ops.oracles import row_step
from tests.ops.shapes import SHAPES

INF, NAN = float("inf"), float("nan")


def older_x0(kw: dict[str, Any]) -> list[Tensor]:
    """The x0 of one, two, ... rows before each sample's, read from the ring sample by sample."""
    ring, row = kw["history"], kw["row"].expand(len(kw["x_t"])).tolist()
    H = 0 if ring is None else len(ring)
    return [torch.stack([ring[(r - k) % H, b] for b, r in enumerate(row)]) for k in range(1, H + 1)]


def oracle(kw: dict[str, Any], dtype: type = np.float32) -> tuple[Tensor, Tensor]:
    """(x_prev, x0) from NumPy, in float32 or float64, on the twin's own noise."""
    x, noise = kw["x_t"], kw["noise"]
    z = noise
    if isinstance(noise, Counter):
        z = noise_v1.normals(*noise, x[0].numel()).expand(len(x), -1).reshape(x.shape)
    rows = kw["rows"][kw["row"].expand(len(x))]
    arrays = [None if t is None else t.float().numpy().astype(dtype) for t in (x, kw["m"], rows, z)]
    older = [t.float().numpy().astype(dtype) for t in older_x0(kw)]
    flags = {name: kw[name] for name in ("clip", "learned", "guided", "use_m")}
    with np.errstate(all="ignore"):
        return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in row_step(*arrays, older, **flags))  # type: ignore


def check(kw: dict[str, Any]) -> None:
    """Run p_sample on ``kw`` and compare every output with NumPy: the same bits, but for a learned std (4e-7)."""
    expected, x0 = oracle(kw)
    exact = oracle(kw, np.float64)[0]
    out, x0_out, low_out, ring = kw["out"], kw["x0_out"], kw["low_out"], kw["history"]
    before = None if ring is None else ring.clone()
    assert ops.p_sample(**kw) is out
    if kw["learned"] and kw["noise"] is not None:
        assert out.dtype == torch.float32
        assert ((out.double() - exact).abs() <= 1e-6 * (1 + exact.abs())).all()
        expected = out
    assert torch.equal(out, expected.to(out.dtype))
    if x0_out is not None:
        assert torch.equal(x0_out, x0.to(x0_out.dtype))
    if low_out is not None:
        assert torch.equal(low_out, expected.to(low_out.dtype))
    if ring is not None:
        for b, r in enumerate(kw["row"].expand(len(out)).tolist()):
            before[r % len(ring), b] = x0[b]
        assert torch.equal(ring, before)


SHAPE_CASES = [step_case("clip", shape=s, shared=shared) for s in SHAPES.values() for shared in (False, True)]


@pytest.mark.parametrize("case", [*setting_cases(), *SHAPE_CASES], ids=str)
def test_p_sample_matches_numpy(case: StepCase) -> None:
    check(inputs(case))


@pytest.mark.parametrize("m", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_p_sample_rounds_each_stored_value_once(x: torch.dtype, m: torch.dtype) -> None:
    names = ("clip", "use_m", "history_2", "x0_out")
    for low in (torch.float32, torch.float16, torch.bfloat16):
        check(inputs(step_case(*names, x=x, m=m, low_out=low)))


def test_p_sample_returns_a_new_tensor_without_out() -> None:
    kw = inputs(step_case("clip"))
    expected = ops.p_sample(**kw)
    x_t = kw["x_t"].clone()
    got = ops.p_sample(**(kw | {"out": None}))
    assert torch.equal(got, expected)
    assert torch.equal(kw["x_t"], x_t)


def test_p_sample_may_work_in_place() -> None:
    kw = inputs(step_case("clip"))
    out = ops.p_sample(**kw).clone()
    ops.p_sample(**(kw | {"out": kw["x_t"]}))
    assert torch.equal(kw["x_t"], out)


def test_p_sample_without_outputs_leaves_the_history_as_it_is() -> None:
    kw = inputs(step_case("clip", "history_2"))
    before = kw["history"].clone()
    without = ops.p_sample(**(kw | {"out": None}))
    assert torch.equal(kw["history"], before)
    assert torch.equal(ops.p_sample(**kw), without)
    assert not torch.equal(kw["history"], before)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts; the last one starts 2 or 4 bytes off any alignment."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    strided = wide[..., ::2].copy_(x)
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return {"channels-last": arrange(x, "channels_last"), "strided": strided, "offset": offset}


@pytest.mark.parametrize("name", ["channels-last", "strided", "offset"])
@pytest.mark.parametrize("argument", ["x_t", "m", "history", "noise", "out", "x0_out", "low_out"])
def test_p_sample_takes_any_layout(argument: str, name: str) -> None:
    kw = inputs(step_case("clip", "use_m", "history_2", "x0_out", "low_out", noise="given"))
    check(kw | {argument: layouts(kw[argument])[name]})


@pytest.mark.parametrize("argument", ["x_t", "m", "noise"])
def test_p_sample_takes_expanded_inputs(argument: str) -> None:
    kw = inputs(step_case("clip", noise="given"))
    check(kw | {argument: kw[argument][:, :1, :1].expand(2, 3, 4, 4)})


def test_p_sample_of_an_empty_batch_is_empty() -> None:
    for shape in ((0, 3, 4, 4), (2, 3, 0, 4)):
        kw = inputs(step_case("clip", shape=shape))
        assert ops.p_sample(**kw).shape == shape


def test_p_sample_of_many_points_matches_numpy() -> None:
    check(inputs(step_case("clip", shape=(100_000, 2))))


def test_p_sample_adds_no_noise_where_sigma_is_0() -> None:
    """The last row of every table: not even Inf or NaN in z or in a learned variance gets through."""
    kw = inputs(step_case("clip", "learned", noise="given")) | {"row": torch.tensor([5])}
    expected, _ = oracle(kw | {"noise": None})
    kw["noise"].fill_(INF)
    kw["m"][:, 3:] = NAN
    assert torch.equal(ops.p_sample(**kw), expected)


def test_p_sample_ignores_terms_that_are_switched_off() -> None:
    """0 * Inf is NaN: a coefficient that no flag asks for must not be read."""
    kw = inputs(step_case("clip", noise="none"))
    expected = ops.p_sample(**kw).clone()
    kw["rows"][:, 6:] = INF
    assert torch.equal(ops.p_sample(**kw), expected)


def test_p_sample_propagates_nan_and_clips_inf() -> None:
    kw = inputs(step_case("clip", shape=(1, 1, 4), noise="none")) | {"row": torch.tensor([0])}
    rows, x, m = kw["rows"], kw["x_t"], kw["m"]
    rows[0, :12] = torch.tensor([2.0, 1.0, -1.0, 1.0, 3.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    x[0, 0] = torch.tensor([0.0, 0.0, 0.0, NAN])
    m[0, 0] = torch.tensor([NAN, INF, -INF, 0.0])
    out = ops.p_sample(**kw)[0, 0]
    assert out.isnan().tolist() == [True, False, False, True]
    assert out[1:3].tolist() == [3.0, -3.0]


def test_p_sample_does_not_depend_on_the_batch() -> None:
    kw = inputs(step_case("clip", shape=(4, 3, 5, 5)))
    together = ops.p_sample(**kw)
    for b in (2, 0):
        part = {k: kw[k][b : b + 1] for k in ("x_t", "m", "row")}
        part["noise"] = Counter(*(t[b : b + 1] for t in kw["noise"][:3]), 1)
        assert torch.equal(ops.p_sample(**(kw | part | {"out": None})), together[b : b + 1])


def test_p_sample_guidance_of_weight_1_is_the_conditional_step() -> None:
    """m_u + 1 * (m_c - m_u) equals m_c exactly when m_u = 0."""
    kw = inputs(step_case("clip", "guided", "learned"))
    kw["rows"][:, 11] = 1.0
    kw["m"][2:, :3] = 0.0
    conditional = kw | {"m": kw["m"][:2], "guided": False, "out": None}
    assert torch.equal(ops.p_sample(**kw), ops.p_sample(**conditional))


def test_exp_is_within_2e7_of_float64_and_saturates() -> None:
    y = torch.cat([torch.linspace(-87, 88, 1_000_001), torch.linspace(-1, 1, 100_001)])
    exact = y.double().exp()
    assert ((step.exp(y).double() - exact) / exact).abs().max() <= 2e-7
    special = step.exp(torch.tensor([0.0, INF, -INF, NAN]))
    assert special[0] == 1.0
    assert special[1] == step.exp(torch.tensor(88.0))
    assert special[2] == step.exp(torch.tensor(-87.0))
    assert special[3].isnan()


REFUSED = {
    "shape": ({"m": torch.zeros(2, 3, 4, 5)}, ValueError, r"\(2, 3, 4, 5\); expected \(2, 3, 4, 4\)"),
    "broadcast": ({"m": torch.zeros(1, 3, 4, 4)}, ValueError, "nothing is broadcast"),
    "2C": ({"m": torch.zeros(2, 6, 4, 4)}, ValueError, "variance_type 'learned'"),
    "not 2B": ({"guided": True}, ValueError, r"expected \(4, 3, 4, 4\)"),
    "device": ({"m": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "is on meta, but x is on cpu"),
    "float64 x": ({"x_t": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, TypeError, "fastddpm.reference"),
    "int m": ({"m": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "torch.int32"),
    "complex": ({"m": torch.zeros(2, 3, 4, 4, dtype=torch.complex64)}, TypeError, "complex64"),
    "float8": ({"m": torch.zeros(2, 3, 4, 4).to(torch.float8_e4m3fn)}, TypeError, "float8"),
    "rows": ({"rows": torch.zeros(5, 11)}, ValueError, r"rows must be float32 \[R, 14\]"),
    "rows64": ({"rows": torch.zeros(5, 14, dtype=torch.float64)}, ValueError, "rows must be float32"),
    "row": ({"row": torch.tensor([0, 1, 2])}, ValueError, r"row must be int64 \[1\] or \[2\]"),
    "row dtype": ({"row": torch.tensor([0], dtype=torch.int32)}, ValueError, "row must be int64"),
    "history of four": ({"history": torch.zeros(4, 2, 3, 4, 4)}, ValueError, "H = 1, 2 or 3, got"),
    "history shape": ({"history": torch.zeros(2, 3, 4, 4)}, ValueError, "history, without its first dimension, has"),
    "z": ({"noise": torch.zeros(2, 3, 4)}, ValueError, "noise has shape"),
    "seeds": (
        {"noise": Counter(torch.zeros(3, dtype=torch.int64), torch.tensor([0]), torch.tensor([0]), 1)},
        ValueError,
        "seed must be int64",
    ),
    "out shape": ({"out": torch.zeros(2, 3, 4)}, ValueError, "out has shape"),
    "out dtype": ({"out": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, ValueError, "use low_out"),
    "expanded out": ({"out": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)}, ValueError, "out overlaps itself"),
    "backend": ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'; choose one of auto"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_p_sample_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.p_sample(**(inputs(step_case("clip")) | change))


def test_p_sample_refuses_overlapping_memory() -> None:
    kw = inputs(step_case("clip", "x0_out"))
    memory = torch.zeros(200)
    x, shifted = memory[:96].view(2, 3, 4, 4), memory[4:100].view(2, 3, 4, 4)
    with pytest.raises(ValueError, match="out partly overlaps x_t"):
        ops.p_sample(**(kw | {"x_t": x, "out": shifted}))
    with pytest.raises(ValueError, match="x0_out and out overlap"):
        ops.p_sample(**(kw | {"x0_out": kw["out"]}))


def test_p_sample_into_given_tensors_refuses_gradients() -> None:
    kw = inputs(step_case("clip"))
    kw["x_t"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"x_t requires a gradient.*no_grad"):
        ops.p_sample(**kw)
    with torch.no_grad():
        assert not ops.p_sample(**kw).requires_grad
