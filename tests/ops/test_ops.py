"""The operators inside PyTorch: opcheck, torch.compile, torch.export, autograd, fake tensors, and the compiled twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastddpm import Schedule, ops
from fastddpm.diagnostics.step_cases import StepCase, inputs, step_case
from fastddpm.noise import v1 as noise_v1
from fastddpm.noise.seeds import resolve_seeds
from fastddpm.noise.v1 import Counter
from fastddpm.ops.operators import pack
from fastddpm.tables.table import q_rows

ALL = ("clip", "learned", "guided", "use_m", "history_3", "x0_out", "low_out")


def arguments(case: StepCase, functional: bool = False, **change: Any) -> tuple[Any, ...]:
    """The operator's own arguments for a case."""
    kw = inputs(case) | change
    outputs = () if functional else (kw["out"], kw["x0_out"], kw["low_out"])
    tensors = (kw["x_t"], kw["m"], kw["rows"], kw["row"])
    return (*tensors, *pack(kw["noise"]), kw["history"], case.flags.to_int(), *outputs, "auto", False)


def counter(batch: int) -> Counter:
    return noise_v1.counter(resolve_seeds(seeds=range(batch)), 5)


OPCHECKS = {
    "randn": lambda: ("randn", (*pack(counter(2)), 2, 5, torch.float16, "auto", False)),
    "q_sample": lambda: (
        "q_sample",
        (
            torch.randn(2, 5, requires_grad=True),
            torch.rand(4, 2),
            torch.tensor([1]),
            *pack(counter(2)),
            True,
            "auto",
            False,
        ),
    ),
    "q_sample given": lambda: (
        "q_sample",
        (
            torch.randn(2, 5),
            torch.rand(4, 2),
            torch.tensor([1]),
            [torch.randn(2, 5)],
            0,
            False,
            "auto",
            False,
        ),
    ),
    "p_sample": lambda: ("p_sample", arguments(step_case(*ALL, noise="given"), True)),
    "p_sample grad": lambda: (
        "p_sample",
        arguments(step_case("clip"), True, x_t=torch.randn(2, 3, 4, 4, requires_grad=True)),
    ),
    "p_sample_out": lambda: ("p_sample_out", arguments(step_case(*ALL))),
}


@pytest.mark.parametrize("name", OPCHECKS)
def test_operators_pass_opcheck(name: str) -> None:
    op, args = OPCHECKS[name]()
    results = torch.library.opcheck(getattr(torch.ops.fastddpm, op).default, args)
    assert set(results.values()) == {"SUCCESS"}


class Step(nn.Module):
    """Both operations, the step in place, as a user's module may call them."""

    def forward(self, x: Tensor, m: Tensor, rows: Tensor, q: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(seed)
        x_t = ops.q_sample(x, q, zero, Counter(seed, zero, zero, 2))
        assert isinstance(x_t, Tensor)
        state, x0 = x_t.clone(), torch.empty_like(x_t)
        ops.p_sample(state, m, rows, zero, Counter(seed, zero, zero, 1), clip=True, out=state, x0_out=x0)
        return state * 2.0, x0


def step_arguments() -> tuple[Tensor, ...]:
    kw = inputs(step_case("clip"))
    return kw["x_t"], kw["m"], kw["rows"], q_rows(Schedule.linear()), torch.tensor([3, 4])


def test_operators_compile_to_one_graph_with_the_same_bits() -> None:
    torch._dynamo.reset()
    args = step_arguments()
    with torch.no_grad():
        expected = Step()(*args)
        got = torch.compile(Step(), fullgraph=True)(*args)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_operators_export() -> None:
    args = step_arguments()
    with torch.no_grad():
        program = torch.export.export(Step(), args)
        got, expected = program.module()(*args), Step()(*args)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"fastddpm.q_sample.default", "fastddpm.p_sample_out.default"} <= names
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_operators_are_seen_by_fake_tensors() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 4)
        keys = torch.empty(2, dtype=torch.int64)
        rows, row = torch.empty(5, 14), torch.empty(1, dtype=torch.int64)
        out = ops.p_sample(x, torch.empty(2, 3, 4, 4), rows, row, Counter(keys, keys, row, 1), clip=True)
        assert type(out) is not Tensor
        assert out.shape == x.shape
        assert ops.randn(Counter(keys, keys, row, 1), (3, 5), torch.bfloat16).dtype == torch.bfloat16


def test_operators_do_not_import_dynamo_for_plain_calls() -> None:
    """Dynamo takes as long to import as torch; only a traced or differentiated call may need it."""
    import subprocess
    import sys

    code = (
        "import sys, torch; import fastddpm; fastddpm.randn((2, 3), seed=1); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GRADIENTS = {
    "clip": ("clip",),
    "no-clip-use_m": ("use_m",),
    "learned": ("learned",),
    "guided": ("guided", "use_m"),
    "guided-learned-history_1": ("guided", "learned", "history_1", "clip"),
    "history_3": ("history_3", "clip"),
}


@pytest.mark.parametrize("noise", ["given", "counter"])
@pytest.mark.parametrize("flags", GRADIENTS.values(), ids=GRADIENTS)
def test_p_sample_gradients_match_finite_differences(flags: tuple[str, ...], noise: str) -> None:
    """Directional derivatives in float32: a central difference of a function that is linear but for exp and clip.

    x0 is kept away from the clip bounds, where there is no derivative.
    """
    kw = inputs(step_case(*flags, shape=(2, 2, 3), noise=noise)) | {"out": None}
    kw["rows"][:, 10] *= 0.1
    kw["rows"][:, 2], kw["rows"][:, 3] = -1000.0, 1000.0
    names = [n for n in ("x_t", "m", "history", "noise") if isinstance(kw[n], Tensor)]
    leaves = {n: kw[n].clone().requires_grad_() for n in names}
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 2, 3, generator=g)
    grads = torch.autograd.grad((ops.p_sample(**(kw | leaves)) * weights).sum(), list(leaves.values()))
    for name, grad in zip(names, grads, strict=True):
        direction, h = torch.randn(kw[name].shape, generator=g), 1e-2
        ends = [ops.p_sample(**(kw | {name: kw[name] + s * h * direction})) for s in (1, -1)]
        numeric = float(((ends[0].double() - ends[1].double()) * weights).sum()) / (2 * h)
        assert float((grad * direction).sum()) == pytest.approx(numeric, rel=2e-3, abs=2e-3), name


def test_p_sample_has_no_gradient_through_a_clipped_x0() -> None:
    kw = inputs(step_case("clip", shape=(1, 1, 3), noise="none")) | {"out": None, "row": torch.tensor([0])}
    kw["rows"][0, :12] = torch.tensor([1.0, 1.0, -1.0, 1.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    x = torch.tensor([[[0.25, 3.0, -3.0]]], requires_grad=True)
    m = torch.zeros(1, 1, 3, requires_grad=True)
    ops.p_sample(**(kw | {"x_t": x, "m": m})).sum().backward()
    assert x.grad.flatten().tolist() == [2.5, 0.5, 0.5]
    assert m.grad.flatten().tolist() == [2.0, 0.0, 0.0]


def test_p_sample_gradients_reach_a_compiled_caller() -> None:
    torch._dynamo.reset()
    kw = inputs(step_case("clip", "learned")) | {"out": None}

    def loss(m: Tensor) -> Tensor:
        return ops.p_sample(**(kw | {"m": m})).square().sum()

    m = kw["m"].clone().requires_grad_()
    expected = torch.autograd.grad(loss(m), m)[0]
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(m), m)[0]
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


COMPILED = {
    "float32": step_case("clip", "x0_out"),
    "bfloat16 everything": step_case(*ALL, x=torch.bfloat16, m=torch.bfloat16, low_out=torch.bfloat16),
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED)
def test_p_sample_compiled_twin_has_the_same_bits(case: StepCase) -> None:
    for shape in ((2, 3, 4, 4), (5, 2, 7, 3)):
        both = []
        for compiled in (False, True):
            kw = inputs(case.but(shape=shape))
            ops.p_sample(**kw, compiled=compiled)
            both.append([kw[name] for name in ("out", "x0_out", "low_out", "history")])
        for eager, fused in zip(*both, strict=True):
            assert (eager is None and fused is None) or torch.equal(eager, fused)


def test_p_sample_compiled_twin_compiles_once_per_flags_and_dtypes() -> None:
    from torch._dynamo.utils import counters

    def compilations() -> int:
        return counters["stats"]["unique_graphs"]

    case = COMPILED["float32"]
    ops.p_sample(**inputs(case.but(shape=(3, 2, 6, 6))), compiled=True)
    before = compilations()
    for batch, step, seed in ((3, 1, 0), (4, 9, 2**63 - 1), (7, 999, 2**31)):
        kw = inputs(case.but(shape=(batch, 2, 6, 6)))
        key = torch.full((batch,), seed)
        ops.p_sample(**(kw | {"noise": Counter(key, key % 2**32, torch.tensor([step]), 1)}), compiled=True)
    assert compilations() - before <= 1


def test_randn_and_q_sample_compiled_twins_have_the_same_bits() -> None:
    for n in (5, 70_001, 70_002):
        assert torch.equal(ops.randn(counter(2), (n,)), ops.randn(counter(2), (n,), compiled=True))
        x_0, rows, t = torch.randn(2, n), q_rows(Schedule.linear()), torch.tensor([7, 700])
        eager = ops.q_sample(x_0, rows, t, counter(2), return_eps=True)
        for a, b in zip(eager, ops.q_sample(x_0, rows, t, counter(2), return_eps=True, compiled=True), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_randn_writes_into_the_given_tensor(compiled: bool) -> None:
    expected = ops.randn(counter(2), (2, 3))
    memory = torch.zeros(13)
    # Also where pairs of float32 do not start at a multiple of eight bytes.
    for offset in (0, 1):
        out = memory[offset : offset + 12].view(2, 2, 3)
        assert ops.randn(counter(2), (2, 3), out=out, compiled=compiled) is out
        assert torch.equal(out, expected)
    low = torch.empty(2, 6, dtype=torch.bfloat16)
    ops.randn(counter(2), (6,), torch.bfloat16, out=low, compiled=compiled)
    assert torch.equal(low, expected.flatten(1).to(torch.bfloat16))


@pytest.mark.parametrize(
    "out",
    [torch.empty(2, 5), torch.empty(2, 6, dtype=torch.bfloat16), torch.empty(6, 2).t(), torch.empty(3, 6)],
    ids=["shape", "dtype", "layout", "batch"],
)
def test_randn_refuses_a_tensor_that_does_not_fit(out: Tensor) -> None:
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[2, 6\], got"):
        ops.randn(counter(2), (6,), out=out)


def test_compiled_twin_works_inside_an_outer_compiled_function() -> None:
    torch._dynamo.reset()
    z = ops.randn(counter(2), (33,))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def outer(key: Tensor) -> Tensor:
        return ops.randn(Counter(key, key * 0, torch.full_like(key, 5), 1), (33,), compiled=True) + 1.0

    assert torch.equal(outer(torch.tensor([0, 1])), z + 1.0)


def test_operators_refuse_a_transform_that_they_have_no_rule_for() -> None:
    """vmap over a custom operator without a rule is an error, not silently wrong."""
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: ops.q_sample(x, torch.rand(4, 2), torch.tensor([1]), counter(2)))(torch.zeros(3, 2, 5))
