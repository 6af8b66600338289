"""The sampler: Algorithm 2 for any table, the same bits in any batch, looped or captured, from any source of noise."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import DiffusionConfig, Sampler, Schedule, ddpm_table, reference
from fastddpm.errors import BackendUnavailable, ModelOutputError, SamplingError
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.sampling.sampler import StepResult
from fastddpm.sampling.step import StaticStep
from fastddpm.sampling.step_pool import MAX_IDLE, StepPool
from fastddpm.tables.by_name import make_table
from fastddpm.tables.table import COLUMN, HISTORY, Table, make_rows
from tests.sampling.tape import Tape, TapePool
from tests.tables.float64 import execute_table64

SCHEDULE = Schedule.linear(50, 1e-3, 0.2)
SHAPE = (3, 5, 7)


class Pointwise(nn.Module):
    """A network of exactly rounded elementwise operations: its bits do not depend on the batch."""

    def __init__(self, *, learned: bool = False, null_class: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75))
        self.learned, self.null_class = learned, null_class
        self.seen: list[SimpleNamespace] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, shift: Any = 0.0) -> Tensor:
        self.seen.append(SimpleNamespace(x=x.clone(), t=t.clone(), labels=class_labels))
        per_sample = (-1, *[1] * (x.dim() - 1))
        m = x * self.weight / (1 + x.abs()) + (t.to(torch.float32) / 512).to(x.dtype).reshape(per_sample)
        if class_labels is not None:
            m = m - 0.25 * class_labels.to(x.dtype).reshape(per_sample)
        m = m + shift
        return torch.cat([m, 0.5 * m], dim=1) if self.learned else m


def table(steps: int = 6, **options: Any) -> Table:
    return ddpm_table(SCHEDULE, steps=steps, **options)


def sampler(model: Any = None, steps: int = 6, shape: tuple[int, ...] = SHAPE, **options: Any) -> Sampler:
    return Sampler(Pointwise().eval() if model is None else model, table(steps), shape, compile=False, **options)


def drawn(batch: int, steps: int, seeds: list[int], shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """x_T and every z of noise-v1, from its public function."""
    x_T = randn((batch, *shape), seeds=seeds, stream=noise.STREAM_X_T)
    z = torch.stack([randn((batch, *shape), seeds=seeds, step=i) for i in range(steps)])
    return x_T, z


@pytest.mark.parametrize("prediction_type", ["epsilon", "x_0", "v"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_sample_matches_the_paper_in_float64(prediction_type: str, variance_type: str) -> None:
    options = {"prediction_type": prediction_type, "variance_type": variance_type}
    model = Pointwise(learned=variance_type.startswith("learned")).eval()
    rows = ddpm_table(SCHEDULE, steps=20, **options)
    got = Sampler(model, rows, SHAPE, compile=False).sample(seeds=[3, 4])
    x_T, z = drawn(2, 20, [3, 4])
    exact = reference.p_sample_loop(
        model.double(), x_T.double(), SCHEDULE, timesteps=rows.timesteps, z=z.double(), **options
    )
    # Twenty steps of about ten roundings each, on values of size 1, with clipping to keep errors from growing.
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)


def test_sample_does_not_depend_on_the_batch() -> None:
    seeds = [5, 0, 2**63, 7, 5]
    whole = sampler().sample(seeds=seeds)
    assert torch.equal(whole[0], whole[4])
    alone = torch.cat([sampler().sample(seeds=[seed]) for seed in seeds])
    assert torch.equal(whole, alone)
    shared = sampler()
    parts = torch.cat([shared.sample(seeds=seeds[:2]), shared.sample(seeds=seeds[2:])])
    assert torch.equal(whole, parts)
    order = [3, 0, 4, 2, 1]
    assert torch.equal(whole[order], shared.sample(seeds=[seeds[i] for i in order]))
    assert not torch.equal(whole[0], whole[1])


def test_sample_ids_tell_the_samples_of_a_seed_apart() -> None:
    s = sampler()
    whole = s.sample(seed=9, batch_size=4)
    assert torch.equal(whole, s.sample(seed=9, sample_ids=[0, 1, 2, 3]))
    assert torch.equal(whole[[2, 3]], s.sample(seed=9, sample_ids=[2, 3]))
    assert torch.equal(whole[:1], s.sample(seeds=9))
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 4


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 1, 1), (1, 5, 5), (4, 6)], ids=str)
def test_sample_takes_any_shape(shape: tuple[int, ...]) -> None:
    x = sampler(shape=shape).sample(seeds=range(3))
    x_T, z = drawn(3, 6, [0, 1, 2], shape)
    exact = reference.p_sample_loop(Pointwise().double(), x_T.double(), SCHEDULE, timesteps=table().timesteps, z=z)
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=5e-6)


def test_steps_yields_what_sample_returns() -> None:
    s = sampler()
    results = list(s.steps(seeds=[1, 2]))
    assert [r.index for r in results] == list(range(6))
    assert [r.t for r in results] == table().timesteps.tolist()
    x, x0 = s.sample(seeds=[1, 2], return_x0=True)
    assert torch.equal(results[-1].x_t, x)
    assert torch.equal(results[-1].x0, x0)
    # Copies: an earlier state is not the last one.
    assert not torch.equal(results[0].x_t, results[-1].x_t)
    live: list[Tensor] = []
    s.sample(seeds=[1, 2], callback=lambda r: live.append(r.x_t.clone()))
    for result, x_t in zip(results, live, strict=True):
        assert torch.equal(result.x_t, x_t)


def test_steps_reports_the_clipped_estimate_of_x_0() -> None:
    model, rows = Pointwise().eval(), table()
    x_T = drawn(2, 6, [1, 2])[0]
    first = next(Sampler(model, rows, SHAPE, compile=False).steps(seeds=[1, 2]))
    t = int(rows.timesteps[0])
    m = model(x_T, torch.full((2,), t))
    expected = reference.predict_x0(x_T.double(), m.double(), t, SCHEDULE).clamp(-1, 1)
    torch.testing.assert_close(first.x0.double(), expected, rtol=0, atol=1e-6)
    assert first.x0.abs().max() == 1.0


def test_steps_left_early_or_interleaved_disturbs_nobody() -> None:
    s = sampler()
    expected = {seed: s.sample(seeds=[seed]) for seed in (1, 2)}
    next(s.steps(seeds=[3])).x_t.fill_(7.0)
    first, second = s.steps(seeds=[1]), s.steps(seeds=[2])
    pairs = list(zip(first, second, strict=True))
    assert torch.equal(pairs[-1][0].x_t, expected[1])
    assert torch.equal(pairs[-1][1].x_t, expected[2])


def test_results_are_not_overwritten_by_the_next_call() -> None:
    s = sampler()
    x, x0 = s.sample(seeds=[1], return_x0=True)
    before = x.clone(), x0.clone()
    s.sample(seeds=[2], return_x0=True)
    assert torch.equal(x, before[0])
    assert torch.equal(x0, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_callback_may_edit_the_state(dtype: torch.dtype) -> None:
    model = Pointwise().eval().to(dtype)

    def edit(result: StepResult) -> None:
        assert result.x0 is None
        if result.index == 2:
            result.x_t.fill_(0.3)
        if result.index == 5:
            result.x_t.zero_()

    x = sampler(model, dtype=dtype).sample(seeds=[1], callback=edit)
    assert torch.equal(model.seen[3].x, torch.full((1, *SHAPE), 0.3, dtype=dtype))
    assert not x.any()


def test_generator_draws_as_the_original_does() -> None:
    """x_T first, then z for every step but the last, which adds none (diffusers' DDPMPipeline)."""
    s, g = sampler(), torch.Generator().manual_seed(0)
    x_T = torch.randn(4, *SHAPE, generator=g)
    z = [torch.randn(4, *SHAPE, generator=g) for _ in range(5)]
    expected = s.sample(x_T=x_T, noise=torch.stack([*z, torch.full_like(x_T, float("nan"))]))
    h = torch.Generator().manual_seed(0)
    assert torch.equal(s.sample(generator=h, batch_size=4), expected)
    assert torch.equal(h.get_state(), g.get_state())
    assert torch.equal(s.sample(x_T=x_T, noise=lambda i: z[i]), expected)


def test_generator_list_gives_every_sample_its_own() -> None:
    def fresh() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]

    s = sampler()
    whole = s.sample(generator=fresh())
    assert torch.equal(whole, torch.cat([s.sample(generator=[g]) for g in fresh()]))
    assert torch.equal(whole, torch.cat([s.sample(generator=g, batch_size=1) for g in fresh()]))


def test_x_T_replaces_the_start_only() -> None:
    s = sampler()
    x_T, z = drawn(2, 6, [1, 2])
    assert torch.equal(s.sample(seeds=[1, 2], x_T=x_T), s.sample(seeds=[1, 2]))
    assert torch.equal(s.sample(noise=z, x_T=x_T), s.sample(seeds=[1, 2]))
    assert not torch.equal(s.sample(seeds=[1, 2], x_T=-x_T), s.sample(seeds=[1, 2]))


def test_deterministic_table_needs_no_noise() -> None:
    config = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
    s = Sampler(Pointwise().eval(), make_table("ddim", config, steps=5), SHAPE, compile=False)
    x_T = drawn(2, 1, [1, 2])[0]
    assert torch.equal(s.sample(x_T=x_T), s.sample(seeds=[1, 2]))


def guided_by_hand(model: nn.Module, labels: list[int], null: int, w: float) -> Callable[[Tensor, Tensor], Tensor]:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        conditional = model(x, t, torch.tensor(labels))
        unconditional = model(x, t, torch.full((len(labels),), null))
        return unconditional + w * (conditional - unconditional)

    return predict


def test_guidance_matches_two_calls_in_float64() -> None:
    model = Pointwise(null_class=3).eval()
    got = sampler(model).sample(seeds=[1, 2], class_labels=[0, 2], guidance=2.5)
    x_T, z = drawn(2, 6, [1, 2])
    by_hand = guided_by_hand(model.double(), [0, 2], 3, 2.5)
    exact = reference.p_sample_loop(by_hand, x_T.double(), SCHEDULE, timesteps=table().timesteps, z=z.double())
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)


def test_guidance_is_one_call_with_the_conditional_half_first() -> None:
    model = Pointwise(null_class=3).eval()
    sampler(model).sample(seeds=[1, 2], class_labels=[0, 2], guidance=2.5)
    assert len(model.seen) == 6
    for seen in model.seen:
        assert seen.labels.tolist() == [0, 2, 3, 3]
        assert torch.equal(seen.x[:2], seen.x[2:])
        assert len(seen.t) == 4
    model.seen.clear()
    sampler(model).sample(seeds=[1, 2], class_labels=[0, 2], guidance=1.0)
    assert all(len(seen.x) == 2 and seen.labels.tolist() == [0, 2] for seen in model.seen)


def test_guidance_takes_the_variance_from_the_conditional_half() -> None:
    model = Pointwise(learned=True, null_class=3).eval()
    rows = ddpm_table(SCHEDULE, steps=6, variance_type="learned_range")
    got = Sampler(model, rows, SHAPE, compile=False).sample(seeds=[1], class_labels=[0], guidance=2.0)
    double = Pointwise(learned=True).double()

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        (m_c, v), (m_u, _) = (double(x, t, torch.tensor([label])).chunk(2, dim=1) for label in (0, 3))
        return torch.cat([m_u + 2.0 * (m_c - m_u), v], dim=1)

    x_T, z = drawn(1, 6, [1])
    exact = reference.p_sample_loop(
        by_hand, x_T.double(), SCHEDULE, timesteps=rows.timesteps, z=z.double(), variance_type="learned_range"
    )
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-6)


def test_model_kwargs_reach_the_model_anew_in_each_call() -> None:
    s = sampler()
    shifts = [torch.tensor([0.1, -0.3]).reshape(2, 1, 1, 1), torch.tensor([0.5, 0.2]).reshape(2, 1, 1, 1)]
    for shift in shifts:
        got = s.sample(seeds=[1, 2], model_kwargs={"shift": shift})
        parts = [s.sample(seeds=[1 + i], model_kwargs={"shift": float(shift[i])}) for i in range(2)]
        assert torch.equal(got, torch.cat(parts))


def test_numbers_among_model_kwargs_live_in_buffers() -> None:
    model = Pointwise().eval()
    loop, tape = sampler(model), with_tape(sampler(model))
    for shift in (0.1, -0.7, np.float32(0.3), 1e-3):
        call: dict[str, Any] = {"seeds": [1], "model_kwargs": {"shift": shift}}
        assert torch.equal(tape.sample(**call), loop.sample(**call))
    assert len(tape._steps._idle) == len(loop._steps._idle) == 1


def test_plain_loop_hands_the_model_any_value_and_a_graph_hashable_ones() -> None:
    def scaled(x: Tensor, t: Tensor, factors: list[float]) -> Tensor:
        return x * factors[0] * factors[1]

    call: dict[str, Any] = {"seeds": [1], "model_kwargs": {"factors": [0.5, 0.5]}}
    assert torch.equal(sampler(scaled).sample(**call), sampler(lambda x, t: 0.25 * x).sample(seeds=[1]))
    with pytest.raises(ValueError, match=r"model_kwargs\['factors'\] is a list; pass tensors and hashable values"):
        with_tape(sampler(scaled)).sample(**call)


def test_buffers_stay_few_whatever_is_asked_for() -> None:
    def shifted(x: Tensor, t: Tensor, shift: Any) -> Tensor:
        return 0.5 * x + shift

    def live_bytes() -> int:
        gc.collect()
        tensors = [t for o in gc.get_objects() if isinstance(o, StaticStep) for t in vars(o).values()]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    before = live_bytes()
    s = sampler(shifted)
    s.sample(seeds=[0] * 20, model_kwargs={"shift": 0.0})
    most = MAX_IDLE * (live_bytes() - before)
    for current in (s, with_tape(sampler(shifted))):
        for k in range(60):
            length = torch.full((1, 1, 1, 1 + 6 * (k % 2)), k / 100)
            current.sample(seed=k, batch_size=1 + k % 20, model_kwargs={"shift": k / 100 if k % 3 else length})
        assert live_bytes() - before <= most
        current.clear()
    assert live_bytes() == before


def test_the_step_used_least_recently_goes_first() -> None:
    s = sampler()
    for batch in [*range(1, MAX_IDLE + 1), 1, MAX_IDLE + 1]:
        s.sample(seed=0, batch_size=batch)
    assert [step.key.batch for step in s._steps._idle] == [*range(3, MAX_IDLE + 1), 1, MAX_IDLE + 1]


def test_model_may_be_a_function_or_return_an_object() -> None:
    model = Pointwise().eval()
    expected = sampler(model).sample(seeds=[1])
    assert torch.equal(sampler(lambda x, t: model(x, t)).sample(seeds=[1]), expected)
    assert torch.equal(sampler(lambda x, t: SimpleNamespace(sample=model(x, t))).sample(seeds=[1]), expected)


def test_low_precision_network_keeps_a_float32_state() -> None:
    model = Pointwise().eval()
    inputs: list[Tensor] = []
    states: list[Tensor] = []

    def low(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x.clone())
        assert t.dtype == torch.int64
        return model(x, t).to(torch.bfloat16)

    x = sampler(low, dtype=torch.bfloat16).sample(seeds=[1], callback=lambda r: states.append(r.x_t.clone()))
    assert x.dtype == torch.float32
    assert all(seen.dtype == torch.bfloat16 for seen in inputs)
    for state, seen in zip(states[:-1], inputs[1:], strict=True):
        assert state.dtype == torch.float32
        assert torch.equal(seen, state.to(torch.bfloat16))
        assert not torch.equal(seen.to(torch.float32), state)
    torch.testing.assert_close(x, sampler(model).sample(seeds=[1]), rtol=0, atol=0.05)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_network_may_write_into_its_input(guidance: float) -> None:
    def writes(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return nn.functional.silu(x, inplace=True)

    def reads(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        return nn.functional.silu(x)

    call: dict[str, Any] = {"seeds": [1, 2], "class_labels": 0, "guidance": guidance}
    options = {"null_class": 1}
    assert torch.equal(sampler(writes, **options).sample(**call), sampler(reads, **options).sample(**call))


class MixedDtype(nn.Module):
    """Weights of two dtypes and a table in float64, as OpenAI's networks are after convert_to_fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1).half()
        self.register_buffer("sigmas", torch.linspace(0, 1, 50, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert self.sigmas.dtype == torch.float64
        m = self.second(self.first(x.to(self.first.weight.dtype)).half()).float()
        return m * self.sigmas[t].float().reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_network_of_mixed_dtype_runs_as_it_is(dtype: torch.dtype | None) -> None:
    model = MixedDtype().eval()
    s = sampler(model, dtype=dtype)
    seen: list[torch.dtype] = []
    model.second.register_forward_hook(lambda module, args, output: seen.append(module.weight.dtype))
    expected = sampler(lambda x, t: model(x, t), dtype=dtype or torch.float32).sample(seeds=[1])
    assert torch.equal(s.sample(seeds=[1]), expected)
    assert set(seen) == {torch.float16}


def test_float64_buffers_are_never_converted() -> None:
    class Table64(Pointwise):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sigmas", torch.linspace(0, 1, 50, dtype=torch.float64))

        def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
            assert self.weight.dtype == torch.bfloat16
            return super().forward(x, t, shift=self.sigmas[t].to(x.dtype).reshape(-1, 1, 1, 1))

    model = Table64().eval()
    x = sampler(model, dtype=torch.bfloat16).sample(seeds=[1])
    assert model.sigmas.dtype == torch.float64
    converted = copy.deepcopy(model)
    converted.weight.data = converted.weight.data.bfloat16()
    assert torch.equal(x, sampler(lambda x, t: converted(x, t), dtype=torch.bfloat16).sample(seeds=[1]))


def test_model_is_converted_in_a_copy() -> None:
    model = Pointwise().eval()
    sampler(model, dtype=torch.bfloat16).sample(seeds=[1])
    assert model.weight.dtype == torch.float32
    assert not model.seen


def test_float_timesteps_reach_the_model() -> None:
    model, rows = Pointwise().eval(), table()
    halves = Table(rows.rows64, rows.timesteps.to(torch.float32) + 0.5, name="half")
    Sampler(model, halves, SHAPE, compile=False).sample(seeds=[1, 2])
    assert [seen.t.tolist() for seen in model.seen] == [[t + 0.5] * 2 for t in rows.timesteps.tolist()]


ENGINE_CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "counter": ({}, [{"seeds": [1, 2]}, {"seeds": [2**63, 4]}, {"seed": 1, "sample_ids": [7, 8]}]),
    "given": ({}, [{"generator": [torch.Generator().manual_seed(s) for s in (1, 2)]}, {"seeds": [1, 2]}]),
    "guided": (
        {"null_class": 3},
        [
            {"seeds": [1, 2], "class_labels": [0, 1], "guidance": 2.0},
            {"seeds": [1, 2], "class_labels": [2, 1], "guidance": 0.0},
            {"seeds": [3, 2], "class_labels": [2, 1], "guidance": 1.0},
        ],
    ),
    "kwargs": ({}, [{"seeds": [1, 2], "model_kwargs": {"shift": torch.tensor(s)}} for s in (0.1, 0.9)]),
    "x0": ({}, [{"seeds": [1, 2], "return_x0": True}, {"seeds": [3, 4], "return_x0": True}]),
    "bfloat16": ({"dtype": torch.bfloat16}, [{"seeds": [1, 2]}, {"seeds": [3, 4]}]),
    "finite": ({"check_finite": True}, [{"seeds": [1, 2]}, {"seeds": [3, 4]}]),
}


def with_tape(s: Sampler) -> Sampler:
    pool = s._steps
    s.options = pool._options = dataclasses.replace(s.options, uses_graph=True)
    pool._captures = True
    pool._graphs = TapePool()  # type: ignore[assignment]
    return s


def test_fallback_to_the_loop_says_what_may_have_waited(caplog: pytest.LogCaptureFixture) -> None:
    def reads(x: Tensor, t: Tensor) -> Tensor:
        return x * (0.5 if t[0].item() > 20 else 0.25)

    s = with_tape(sampler(reads))
    assert torch.equal(s.sample(seeds=[1]), sampler(reads).sample(seeds=[1]))
    (said,) = [record.message for record in caplog.records if "no CUDA graph" in record.message]
    assert "torch.cuda.synchronize()" in said
    assert "nor another thread" in said
    assert "warmup()" in said


@pytest.mark.parametrize("case", ENGINE_CASES)
@pytest.mark.parametrize("rows", ["ddpm", "learned", "dpm++2m"])
def test_replayed_steps_equal_the_plain_loop(case: str, rows: str) -> None:
    options, calls = ENGINE_CASES[case]
    config = DiffusionConfig(
        num_timesteps=50, beta_start=1e-3, beta_end=0.2, variance_type="learned" if rows == "learned" else "fixed_small"
    )
    steps = make_table("ddpm" if rows == "learned" else rows, config, steps=5)
    model = Pointwise(learned=steps.learned).eval()
    loop = Sampler(model, steps, SHAPE, compile=False, **options)
    tape = with_tape(Sampler(model, steps, SHAPE, compile=False, **options))
    for call in calls:
        generators = call.get("generator", [])
        states = [g.get_state() for g in generators]
        expected = loop.sample(**call)
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        runs = len(model.seen)
        got = tape.sample(**call)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        # Python runs once, at capture; never in the steps.
        assert len(model.seen) - runs <= 1


def test_graph_follows_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, padding=1)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x).float()

    loop, tape = sampler(predict), with_tape(sampler(predict))
    with torch.autocast("cpu", torch.bfloat16):
        low = loop.sample(seeds=[1])
        assert torch.equal(tape.sample(seeds=[1]), low)
    assert torch.equal(tape.sample(seeds=[1]), loop.sample(seeds=[1]))
    assert not torch.equal(tape.sample(seeds=[1]), low)


def test_model_that_cannot_be_captured_falls_back_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def reads(x: Tensor, t: Tensor) -> Tensor:
        return x * (0.5 if t[0].item() > 20 else 0.25)

    expected = sampler(reads).sample(seeds=[1])
    s = with_tape(sampler(reads))
    assert torch.equal(s.sample(seeds=[1]), expected)
    assert torch.equal(s.sample(seeds=[1, 1])[1:], expected)
    assert [record.levelname for record in caplog.records if "CUDA graph" in record.message] == ["WARNING"]
    strict = with_tape(sampler(reads))
    strict._steps._options = dataclasses.replace(strict.options, strict_graph=True)
    with pytest.raises(SamplingError, match="not permitted while capturing"):
        strict.sample(seeds=[1])


class ForPickle(nn.Module):
    """A module that another process can find."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x


class Breaks(Pointwise):
    """Raises or returns something else in its n-th call."""

    def __init__(self, at: int, result: Any) -> None:
        super().__init__()
        self.at, self.result = at, result

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        m = super().forward(x, t, **kwargs)
        if len(self.seen) != self.at + 1:
            return m
        if isinstance(self.result, Exception):
            raise self.result
        return self.result(m)


def test_model_error_is_chained_with_its_step_and_the_sampler_goes_on() -> None:
    error = KeyError("lost")
    s = sampler(Breaks(3, error).eval())
    with pytest.raises(SamplingError, match=r"step 3 of 6 \(t = 20\) failed: KeyError: 'lost'") as caught:
        s.sample(seeds=[1])
    assert caught.value.__cause__ is error
    assert torch.equal(s.sample(seeds=[1]), sampler().sample(seeds=[1]))


def test_call_that_fails_leaves_graphs_on(caplog: pytest.LogCaptureFixture) -> None:
    s = with_tape(sampler())
    with pytest.raises(SamplingError, match="unexpected keyword argument 'shfit'"):
        s.sample(seeds=[1], model_kwargs={"shfit": 1.0})
    assert s._steps._captures
    assert "no CUDA graph" not in caplog.text
    s.sample(seeds=[1])
    (step,) = s._steps._idle
    assert isinstance(step.graph, Tape)


def test_failed_step_is_not_kept() -> None:
    def lose(m: Tensor) -> Tensor:
        raise KeyError("lost")

    s = sampler(Breaks(3, lose).eval())
    made: list[Any] = []
    build = s._steps._build
    s._steps._build = lambda key: made.append(weakref.ref(step := build(key))) or step  # type: ignore[method-assign]
    with pytest.raises(SamplingError):
        s.sample(seeds=[1])
    gc.collect()
    assert [ref() for ref in made] == [None]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda m: (m, m), r"^step 0 of 6 \(t = 49\): the model returned tuple"),
        (lambda m: None, "returned NoneType"),
        (lambda m: {"sample": m}, "returned dict"),
        (lambda m: m[:1], r"returned shape \(1, 3, 5, 7\) for x of shape \(2, 3, 5, 7\)"),
        (lambda m: m[:, :1], r"expected \(2, 3, 5, 7\)"),
        (lambda m: torch.cat([m, m], dim=1), "needs variance_type 'learned'"),
        (lambda m: m.mean(), r"returned shape \(\)"),
    ],
)
def test_model_output_that_is_no_prediction_is_refused(result: Any, message: str) -> None:
    s = sampler(Breaks(0, result).eval())
    with pytest.raises(ModelOutputError, match=message):
        s.sample(seeds=[1, 2])
    assert s.sample(seeds=[1, 2]).shape == (2, *SHAPE)


def test_learned_table_needs_twice_the_channels() -> None:
    rows = ddpm_table(SCHEDULE, steps=3, variance_type="learned")
    with pytest.raises(ModelOutputError, match="use a fixed variance_type"):
        Sampler(Pointwise().eval(), rows, SHAPE, compile=False).sample(seeds=[1])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_names_the_sizes_and_the_next_call_works(error: Exception) -> None:
    model = Breaks(-1, error).eval()
    s = sampler(model)
    others = s.steps(seeds=[0])
    next(others)
    s.warmup(seeds=[1])
    model.at = len(model.seen) + 1
    with pytest.raises(torch.OutOfMemoryError, match=r"step 1 of 6 .*\[4, 3, 5, 7\].*smaller batch") as caught:
        s.sample(seeds=range(4))
    assert caught.value.__cause__ is error
    assert not s._steps._idle
    assert len(list(others)) == 5
    assert s.sample(seeds=range(2)).shape == (2, *SHAPE)


def test_out_of_memory_frees_the_buffers_while_its_error_is_kept() -> None:
    s = sampler(Breaks(1, torch.OutOfMemoryError("CUDA out of memory")).eval())
    made: list[Any] = []
    build = s._steps._build
    s._steps._build = lambda key: made.append(weakref.ref((step := build(key)).x_in)) or step  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError) as caught:
        s.sample(seeds=[1])
    assert caught.value.__traceback__ is not None
    assert [ref() for ref in made] == [None]


def test_cuda_error_says_to_start_a_new_process() -> None:
    s = sampler(Breaks(1, RuntimeError("CUDA error: an illegal memory access was encountered")).eval())
    with pytest.raises(SamplingError, match="start a new one"):
        s.sample(seeds=[1])


def test_cuda_error_is_reported_though_cuda_fails_in_clearing_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(*args: Any) -> None:
        raise lost

    s = sampler(Breaks(1, lost).eval())
    monkeypatch.setattr(StepPool, "_free", fail)
    with pytest.raises(SamplingError, match=r"step 1 of 6 .*start a new one") as caught:
        s.sample(seeds=[1])
    assert caught.value.__cause__ is lost
    s._steps._last_use = SimpleNamespace()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_event=fail))
    with pytest.raises(SamplingError, match="start a new one"):
        s.sample(seeds=[1])


def test_check_finite_names_step_and_sample() -> None:
    def bad(m: Tensor) -> Tensor:
        m = m.clone()
        m[1, 0, 2, 3] = float("nan")
        return m

    s = sampler(Breaks(2, bad).eval(), check_finite=True)
    with pytest.raises(SamplingError, match=r"after step 2 \(t = 29\) for sample 1 \(seed 8, sample id 0\)"):
        s.sample(seeds=[7, 8, 9])
    assert s.sample(seeds=[7, 8, 9]).isfinite().all()
    assert sampler(Breaks(2, bad).eval()).sample(seeds=[7, 8, 9])[1].isnan().any()


def test_infinite_prediction_is_clipped_as_in_the_peers() -> None:
    x = sampler(Breaks(2, lambda m: torch.full_like(m, float("inf"))).eval(), check_finite=True).sample(seeds=[1])
    assert x.isfinite().all()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_are_noticed(dtype: torch.dtype, captured: bool) -> None:
    model, other = Pointwise().eval(), Pointwise().eval()
    with torch.no_grad():
        other.weight.fill_(-0.5)
    s = with_tape(sampler(model, dtype=dtype)) if captured else sampler(model, dtype=dtype)
    s.sample(seeds=[1])
    model.load_state_dict(other.state_dict())
    expected = sampler(other, dtype=dtype).sample(seeds=[1])
    assert torch.equal(s.sample(seeds=[1]), expected)
    with torch.no_grad():
        model.weight.add_(0.25)
    assert not torch.equal(s.sample(seeds=[1]), expected)
    # Another tensor in the place of the captured one.
    model.weight = other.weight
    assert torch.equal(s.sample(seeds=[1]), expected)
    model.double()
    assert torch.equal(s.sample(seeds=[1]), expected)


def test_callback_that_edits_nothing_costs_no_copy_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[StaticStep] = []
    feed = StaticStep.feed_network
    monkeypatch.setattr(StaticStep, "feed_network", lambda step: (fed.append(step), feed(step)))
    s = sampler()
    # A CPU's state may be written by NumPy, which nobody sees; a GPU's cannot.
    s.device = torch.device("cuda")

    def copies(callback: Callable[[StepResult[None]], Any] | None) -> int:
        fed.clear()
        s.sample(seeds=[1], callback=callback)
        return len(fed)

    assert copies(lambda result: None) == copies(None)
    assert copies(lambda result: result.x_t.mul_(0.5)) == copies(None) + len(s.table)


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyError("mine")])
def test_error_of_a_callback_is_the_callers_own(error: Exception) -> None:
    def fail(result: StepResult) -> None:
        raise error

    s = sampler()
    with pytest.raises(type(error)) as caught:
        s.sample(seeds=[1], callback=fail)
    assert caught.value is error
    assert torch.equal(s.sample(seeds=[1]), sampler().sample(seeds=[1]))


def test_a_sampler_can_be_copied_and_pickled() -> None:
    s = sampler(ForPickle().eval())
    x = s.sample(seeds=[1])
    for other in (copy.deepcopy(s), pickle.loads(pickle.dumps(s))):
        assert torch.equal(other.sample(seeds=[1]), x)
        assert other.model is not s.model


def test_torchs_defaults_change_nothing() -> None:
    config = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
    model = Pointwise().eval()
    calls: list[Callable[[], Tensor]] = [
        lambda: sampler(model).sample(seeds=[1, 2]),
        lambda: sampler(model, dtype=torch.bfloat16).sample(seed=1, batch_size=2, class_labels=[0, 1]),
        lambda: sampler(model).sample(generator=torch.Generator("cpu").manual_seed(0), batch_size=2),
        lambda: fastddpm.sample(model, SHAPE, seeds=[1], steps=3, class_labels=1, diffusion=config),
    ]
    expected = [call() for call in calls]
    steps = table()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert all(torch.equal(call(), x) for call, x in zip(calls, expected, strict=True))
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert torch.equal(Sampler(model, steps, SHAPE, compile=False).sample(seeds=[1, 2]), expected[0])
        got = fastddpm.sample(model, SHAPE, seeds=[1], steps=3, class_labels=1, diffusion=config)
        assert torch.equal(got, expected[3])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.usefixtures("still_generators")
def test_no_global_generator_is_touched() -> None:
    s = sampler(ForPickle().eval(), dtype=torch.bfloat16)
    s.sample(seeds=[1, 2])
    s.sample(generator=torch.Generator().manual_seed(1), batch_size=2)
    list(s.steps(seed=3, batch_size=2))
    fastddpm.sample("digits", seeds=[1], steps=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_samples_while_its_parent_does() -> None:
    script = """
    import os, threading, torch
    from fastddpm import Sampler, Schedule, ddpm_table
    torch.set_num_threads(2)
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    entered, leave = threading.Event(), threading.Event()
    def predict(x, t):
        if threading.current_thread() is not threading.main_thread():
            entered.set(), leave.wait(60)
        return net(x)
    s = Sampler(predict, ddpm_table(Schedule.linear(50), steps=3), (3, 256, 256), compile=False)
    x = s.sample(seeds=[1])
    other = threading.Thread(target=lambda: s.sample(seeds=[2]))
    other.start(), entered.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if (s.sample(seeds=[1]) - x).abs().max() < 1e-3 else 1)
    status = os.waitpid(child, 0)[1]
    leave.set(), other.join()
    raise SystemExit(os.waitstatus_to_exitcode(status))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=120)
    assert done.returncode == 0


def test_clear_frees_the_steps_and_calls_build_new_ones() -> None:
    s = sampler()
    expected = s.sample(seeds=[1, 2])
    step = weakref.ref(s._steps._idle[0])
    running = s.steps(seeds=[1, 2])
    next(running)
    s.clear()
    assert torch.equal(list(running)[-1].x_t, expected)
    del running
    gc.collect()
    assert step() is None
    assert torch.equal(s.sample(seeds=[1, 2]), expected)


def test_threads_may_share_a_sampler() -> None:
    s = sampler(steps=20)
    expected = {seed: sampler(steps=20).sample(seeds=[seed]) for seed in range(6)}
    got: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        got[seed] = s.sample(seeds=[seed]) if seed % 2 else list(s.steps(seeds=[seed]))[-1].x_t

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, x in expected.items():
        assert torch.equal(got[seed], x)


def test_inference_mode_around_one_call_leaves_the_next_alone() -> None:
    s = sampler()
    with torch.inference_mode():
        first = s.sample(seeds=[1])
    assert torch.equal(s.sample(seeds=[1]), first)
    assert torch.is_grad_enabled()
    assert not first.requires_grad


def test_warmup_leaves_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    s = sampler()
    s.warmup(seeds=[1, 2])
    monkeypatch.setattr(s._steps, "_build", None)
    assert torch.equal(s.sample(seeds=[3, 4]), sampler().sample(seeds=[3, 4]))


def test_model_may_bring_a_form_for_sampling() -> None:
    class Form:
        memory_format = torch.channels_last

        def __init__(self, timesteps: Tensor, batch: int) -> None:
            self.timesteps, self.batch, self.labels = timesteps, batch, None

        def load(self, class_labels: Tensor | None) -> None:
            self.labels = class_labels

        def __call__(self, x: Tensor, t: Tensor, row: Tensor, kwargs: Any) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(self.timesteps[row].expand(self.batch), t)
            return plain(x, t, self.labels)

    plain = Pointwise(null_class=3).eval()
    model = Pointwise(null_class=3).eval()
    model.sampling_networks = lambda timesteps, **_: lambda batch: Form(timesteps, batch)  # type: ignore[assignment]
    call: dict[str, Any] = {"seeds": [1, 2], "class_labels": [0, 1], "guidance": 2.0}
    assert torch.equal(sampler(model).sample(**call), sampler(plain).sample(**call))


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({}, "no noise"),
    ({"seeds": [1], "seed": 1}, "seeds and seed"),
    ({"seeds": [1], "generator": torch.Generator()}, "seeds and generator"),
    ({"generator": torch.Generator()}, "how many samples"),
    ({"noise": lambda i: None}, "how many samples"),
    ({"noise": lambda i: None, "batch_size": 2}, "pass x_T= too"),
    ({"noise": lambda i: torch.zeros(1), "x_T": torch.zeros(2, *SHAPE)}, r"noise\(0\) must return"),
    ({"noise": torch.zeros(5, 2, *SHAPE), "x_T": torch.zeros(2, *SHAPE)}, "noise must have shape"),
    ({"x_T": torch.zeros(2, *SHAPE)}, "no noise"),
    ({"seeds": [1], "x_T": torch.zeros(1, 3, 7, 5)}, "x_T must have shape"),
    ({"seeds": [1], "x_T": torch.zeros(2, *SHAPE)}, "batch|samples"),
    ({"seeds": [-1]}, "seed"),
    ({"seeds": [2**64]}, "seed"),
    ({"seeds": [True]}, "seed"),
    ({"seeds": True}, "seed"),
    ({"seeds": [1.0]}, "seed"),
    ({"seed": 1}, "batch"),
    ({"seed": 1, "sample_ids": [2**32]}, "sample_id"),
    ({"seeds": [1], "guidance": float("nan")}, "finite"),
    ({"seeds": [1], "guidance": 2.0}, "needs class_labels"),
    ({"seeds": [1], "guidance": 2.0, "class_labels": [1]}, "no class"),
    ({"seeds": [1, 2], "class_labels": [1]}, "1 labels for 2"),
    ({"seeds": [1], "class_labels": [-1]}, "class label -1"),
    ({"seeds": [1], "class_labels": [0.5]}, "must be integers"),
    ({"seeds": [1], "model_kwargs": {"class_labels": [1]}}, "pass class_labels= itself"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[m for _, m in BAD_CALLS])
def test_sample_refuses(call: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, SamplingError), match=message):
        sampler().sample(**call)


def test_labels_outside_the_embedding_are_refused() -> None:
    model = Pointwise().eval()
    model.config = SimpleNamespace(num_class_embeds=11, null_class=10)  # type: ignore[assignment]
    assert sampler(model).sample(seeds=[1], class_labels=10).shape == (1, *SHAPE)
    with pytest.raises(ValueError, match="class label 11 is out of range; labels are 0 to 10"):
        sampler(model).sample(seeds=[1], class_labels=11)


def test_no_seeds_give_no_samples() -> None:
    assert sampler().sample(seeds=[]).shape == (0, *SHAPE)


def test_estimates_of_x_0_are_refused_where_a_table_keeps_eps() -> None:
    eps = Sampler(Pointwise(), make_table("deis", DiffusionConfig(), steps=3, order=2), SHAPE, compile=False)
    assert eps.sample(seeds=[1]).isfinite().all()
    with pytest.raises(ValueError, match="'deis' keeps eps and has no estimate of x_0 to give"):
        eps.sample(seeds=[1], return_x0=True)


@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_history_enters_as_in_float64(history: int) -> None:
    """Seven rows, so that the ring of older x0 turns more than twice; a second call starts without any."""
    generator = torch.Generator().manual_seed(history)
    columns = {name: torch.rand(7, dtype=torch.float64, generator=generator) / 4 for name in ("a", "b", *HISTORY)}
    rows = make_rows(7, c_x0=0.5, c_xt=0.25, sigma=0.125, **columns)
    # What comes before the first row is 0, which the executor in float64 asks to be left out.
    for k, name in enumerate(HISTORY):
        rows[: k + 1, COLUMN[name]] = 0.0
    multistep = Table(rows, torch.arange(6, -1, -1), "multistep", clip=False, history=history)
    fused = Sampler(Pointwise().eval(), multistep, SHAPE, compile=False)
    x_T, z = drawn(2, 7, [3, 4])
    exact = execute_table64(multistep, Pointwise().double(), x_T.double(), list(z.double()))
    for _ in range(2):
        torch.testing.assert_close(fused.sample(seeds=[3, 4]).double(), exact, rtol=0, atol=2e-6)
    assert torch.equal(list(fused.steps(seeds=[3, 4]))[-1].x_t, fused.sample(seeds=[3, 4]))


def test_triton_on_a_cpu_is_refused_at_once() -> None:
    with pytest.raises(BackendUnavailable, match="Triton"):
        sampler(backend="triton")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, "shape must be"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"shape": (3, 0)}, "shape must be"),
        ({"shape": (3.0, 4)}, "shape must be"),
        ({"dtype": torch.float64}, "dtype must be"),
        ({"cuda_graph": True}, "needs a CUDA device"),
        ({"cuda_graph": "yes"}, "unknown cuda_graph"),
        ({"compile": "yes"}, "unknown compile"),
        ({"device": "cuda:7"}, "CUDA devices are visible"),
    ],
)
def test_sampler_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(Pointwise().eval(), table(), **{"shape": SHAPE, "compile": False, **options})


def test_fork_after_cuda_was_used_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="spawn"):
        sampler(device="cuda")


@pytest.mark.parametrize("behind_a_function", [False, True])
def test_training_mode_is_pointed_out_when_a_run_begins(
    behind_a_function: bool, caplog: pytest.LogCaptureFixture
) -> None:
    network = Pointwise().eval()
    s = sampler((lambda x, t: network(x, t)) if behind_a_function else network)
    s.sample(seeds=[0])
    assert "training mode" not in caplog.text
    sampler(nn.DataParallel(network)).sample(seeds=[0])
    assert "training mode" not in caplog.text
    network.train()
    s.sample(seeds=[0])
    assert "training mode" in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripts_are_sampled() -> None:
    network = Pointwise().eval()
    script = torch.jit.trace(network, (torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.int64)))
    s = sampler(script)
    assert torch.equal(s.sample(seeds=[1, 2]), sampler(network).sample(seeds=[1, 2]))
    with torch.no_grad():
        for weight in script.parameters():
            weight.mul_(2)
    assert torch.equal(s.sample(seeds=[1, 2]), sampler(script).sample(seeds=[1, 2]))
