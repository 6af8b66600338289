"""Every row of the DDPM builder against the paper's own form in float64, and against diffusers."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import pytest
import torch

from fastddpm import reference
from fastddpm.ops import twins
from fastddpm.schedules.diffusion import PREDICTION_TYPES, VARIANCE_TYPES
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables.ddpm import ddpm_table
from fastddpm.tables.table import COLUMNS, HISTORY, K, Table, make_rows, q_rows, q_step_rows
from tests.ops.pairs import all_pairs, case_id
from tests.tables.float64 import DIFFUSERS_TYPES, execute_row64, execute_table64, relative_error

SCHEDULES = {
    "linear": Schedule.linear(),
    "cosine": Schedule.cosine(),
    "sigmoid_jabri": Schedule.sigmoid_jabri(60),
    "zero_snr": Schedule.linear().zero_terminal_snr(),
}
VISITS = {
    "all": {},
    "linspace50": {"steps": 50},
    "leading13": {"steps": 13, "spacing": "leading", "steps_offset": 1},
    "trailing7": {"steps": 7, "spacing": "trailing"},
    "custom": {"timesteps": [58, 41, 40, 3]},
    "one": {"timesteps": [30]},
}


def respaced_reference(schedule: Schedule, timesteps: torch.Tensor) -> Schedule:
    """Build the respaced process from its definition: beta' = 1 - alpha_bar_t / alpha_bar of the previous kept t."""
    betas, last = [], 1.0
    for t in timesteps.flip(0).tolist():
        betas.append(1.0 - float(schedule.alphas_cumprod[t]) / last)
        last = float(schedule.alphas_cumprod[t])
    return Schedule(torch.tensor(betas, dtype=torch.float64))


def row_cases() -> list[dict[str, Any]]:
    """All pairs of settings, twice over, without what is refused: epsilon where alpha_bar = 0."""
    factors = {
        "schedule_name": list(SCHEDULES),
        "visit": list(VISITS),
        "prediction_type": PREDICTION_TYPES,
        "variance_type": VARIANCE_TYPES,
        "clip_range": [1.0, 0.3, None],
    }
    cases = all_pairs(factors, seed=0) + all_pairs(factors, seed=1)
    refused = [("zero_snr", visit, "epsilon") for visit in ("all", "linspace50", "trailing7")]
    return [case for case in cases if tuple(case.values())[:3] not in refused]


@pytest.mark.parametrize("case", row_cases(), ids=case_id)
def test_ddpm_row_equals_the_papers_form(case):
    schedule = SCHEDULES[case["schedule_name"]]
    options = {name: case[name] for name in ("prediction_type", "variance_type", "clip_range")}
    table = ddpm_table(schedule, **VISITS[case["visit"]], **options)
    R = len(table)
    paper = respaced_reference(schedule, table.timesteps)
    generator = torch.Generator().manual_seed(0)
    channels = 4 if table.learned else 2
    for r in {0, 1, R // 2, R - 2, R - 1} & set(range(R)):
        x_t, z = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=generator)
        output = torch.randn(3, channels, 5, dtype=torch.float64, generator=generator)
        x_prev, x0 = execute_row64(table, r, x_t, output, z)
        t = R - 1 - r
        assert relative_error(x_prev, reference.p_sample(x_t, output, t, paper, z, **options)) <= 1e-12
        assert relative_error(x0, reference.p_mean_variance(x_t, output, t, paper, **options)[2]) <= 1e-12


@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_ddpm_table_executes_to_the_papers_loop(variance_type):
    schedule = Schedule.cosine(200)
    table = ddpm_table(schedule, steps=20, variance_type=variance_type)
    generator = torch.Generator().manual_seed(1)
    x_T = torch.randn(4, 3, 2, dtype=torch.float64, generator=generator)
    z = list(torch.randn(20, 4, 3, 2, dtype=torch.float64, generator=generator))

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        m = torch.sin(3 * x) + t.reshape(-1, 1, 1) / 200
        return torch.cat([m, torch.cos(x)], dim=1) if table.learned else m

    expected = reference.p_sample_loop(
        model, x_T, schedule, timesteps=table.timesteps, z=z, variance_type=variance_type
    )
    assert relative_error(execute_table64(table, model, x_T, z), expected) <= 1e-10


@pytest.mark.parametrize("visit", VISITS)
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
def test_ddpm_table_adds_no_noise_on_the_last_row(variance_type, visit):
    sigma = ddpm_table(SCHEDULES["sigmoid_jabri"], **VISITS[visit], variance_type=variance_type).column("sigma")
    assert float(sigma[-1]) == 0.0
    assert (sigma[:-1] > 0).all()


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm_table_matches_diffusers_coefficients(prediction_type, variance_type, spacing):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle")
    scheduler = diffusers.DDPMScheduler(
        prediction_type=DIFFUSERS_TYPES[prediction_type],
        variance_type=variance_type,
        timestep_spacing=spacing,
        clip_sample=False,
    )
    scheduler.set_timesteps(40)
    table = ddpm_table(
        Schedule.linear(),
        steps=40,
        spacing=spacing,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=None,
    )
    assert torch.equal(table.timesteps, scheduler.timesteps)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    state = table.column("a") * table.column("c_x0") + table.column("c_xt")
    network = table.column("b") * table.column("c_x0")
    for r, t in enumerate(scheduler.timesteps):
        # A step is linear in (output, x_t): the basis vectors read its coefficients, given the same noise.
        steps = [
            scheduler.step(m, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
            for m, x in ((zero, zero), (zero, one), (one, zero))
        ]
        if t > 0:
            z = torch.randn(1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            assert float(steps[0] / z) == pytest.approx(float(table.column("sigma")[r]), rel=5e-4)
        assert float(steps[1] - steps[0]) == pytest.approx(float(state[r]), rel=5e-4, abs=1e-7)
        assert float(steps[2] - steps[0]) == pytest.approx(float(network[r]), rel=5e-4, abs=1e-7)


def test_ddpm_table_refuses_epsilon_at_zero_alpha_bar():
    schedule = SCHEDULES["zero_snr"]
    with pytest.raises(
        ValueError, match=r"'epsilon' cannot give x_0 where alpha_bar = 0.*use a network trained for 'v'"
    ):
        ddpm_table(schedule)
    assert len(ddpm_table(schedule, timesteps=[998, 0])) == 2
    rows64 = ddpm_table(schedule, prediction_type="v").rows64
    assert (float(rows64[0, COLUMNS.index("a")]), float(rows64[0, COLUMNS.index("b")])) == (0.0, -1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "sample"}, "unknown prediction_type 'sample'; choose one of epsilon, x_0, v"),
        ({"variance_type": "fixed"}, "unknown variance_type 'fixed' .*; choose one of fixed_small"),
        ({"clip_range": 0.0}, "clip_range must be positive and finite in float32, or None for no clipping; got 0.0"),
        ({"clip_range": -1.0}, "clip_range must be positive .* got -1.0"),
        ({"clip_range": math.nan}, "clip_range must be positive .* got nan"),
        ({"clip_range": True}, "clip_range must be positive .* got True"),
        ({"steps": 1001}, "steps must be an integer >= 1 and <= 1000, got 1001"),
        ({"timesteps": [3, 5]}, "must descend strictly"),
    ],
)
def test_ddpm_table_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ddpm_table(SCHEDULES["linear"], **options)


def test_ddpm_table_leaves_absent_terms_off():
    table = ddpm_table(SCHEDULES["linear"], prediction_type="x_0", clip_range=None)
    assert (table.name, table.clip, table.learned, table.use_m, table.history) == ("ddpm", False, False, False, 0)
    for column, value in (("a", 0), ("b", 1), ("lo", -math.inf), ("hi", math.inf), ("c_m", 0), ("c_1", 0), ("w", 1)):
        assert (table.column(column) == value).all(), column


def test_ddpm_table_of_one_training_step_works():
    table = ddpm_table(Schedule.from_betas([0.999]))
    m, x = torch.full((1, 1), 0.25, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64)
    # The only step returns the clipped estimate of x_0 (eq. 15).
    expected = min(1.0, (0.5 - 0.999**0.5 * 0.25) / 0.001**0.5)
    assert float(execute_row64(table, 0, x, m)[0]) == pytest.approx(expected, rel=1e-12)


def test_table_rounds_to_float32_once():
    table = ddpm_table(SCHEDULES["linear"], steps=9)
    assert table.rows.shape == (9, K)
    assert table.rows.dtype == torch.float32
    assert table.rows.is_contiguous()
    # struct packs a double to the nearest float, ties to even.
    packed = [struct.unpack("f", struct.pack("f", value))[0] for value in table.rows64.flatten().tolist()]
    assert table.rows.flatten().tolist() == packed


def test_table_with_guidance_changes_only_the_weight():
    table = ddpm_table(SCHEDULES["linear"], steps=9)
    guided = table.with_guidance(3.5)
    assert (guided.column("w") == 3.5).all()
    others = [k for k, name in enumerate(COLUMNS) if name != "w"]
    assert torch.equal(guided.rows64[:, others], table.rows64[:, others])
    assert (table.column("w") == 1.0).all()
    assert torch.equal(guided.rows[:, COLUMNS.index("w")], torch.full((9,), 3.5))


@pytest.mark.parametrize(
    ("rows64", "timesteps", "message"),
    [
        (torch.zeros(3, 11).double(), torch.arange(3), r"shape \[R, 14\] with R >= 1, got \(3, 11\)"),
        (torch.zeros(0, 14).double(), torch.arange(0), r"with R >= 1, got \(0, 14\)"),
        (torch.zeros(3, 14), torch.arange(3), "must be float64, got torch.float32"),
        (torch.zeros(3, 14).double(), torch.arange(4), r"shape \[3\], got torch.int64 of shape \(4,\)"),
        (torch.zeros(3, 14).double(), torch.arange(3).double(), "int64 or float32 of shape"),
        (make_rows(3, sigma=math.nan), torch.arange(3), "row 0 of table 'x', at timestep 0, has sigma = nan"),
        (
            make_rows(3, a=torch.tensor([1.0, math.inf, 1.0])),
            torch.arange(3),
            "timestep 1, has a = inf, which is not finite",
        ),
    ],
)
def test_table_refuses_rows_that_do_not_fit(rows64, timesteps, message):
    with pytest.raises(ValueError, match=message):
        Table(rows64, timesteps, name="x")


@pytest.mark.parametrize("history", [-1, 4, 1.5])
def test_table_refuses_a_history_that_no_row_holds(history):
    with pytest.raises(ValueError, match=rf"history must lie in 0\.\.3, got {history}"):
        Table(make_rows(2), torch.arange(2), name="x", history=history)


@pytest.mark.parametrize("history", range(4))
def test_a_row_adds_the_older_x0_newest_first(history):
    generator = torch.Generator().manual_seed(history)
    columns = {name: torch.randn(1, dtype=torch.float64, generator=generator) for name in ("a", "b", "c_x0", *HISTORY)}
    table = Table(make_rows(1, **columns), torch.zeros(1, dtype=torch.int64), name="x", history=history)
    x_t, m, *older = torch.randn(2 + history, 3, 5, generator=generator)
    expected, x0 = execute_row64(table, 0, x_t.double(), m.double(), history=[x.double() for x in older])
    by_hand = columns["c_x0"] * x0 + sum(float(columns[f"c_{k + 1}"]) * x.double() for k, x in enumerate(older))
    assert relative_error(expected, by_hand) <= 1e-15
    # The ring holds x0_k in slot (row - k) mod H: at row 0, the oldest first.
    ring = torch.stack(older[::-1]) if older else None
    x_prev, stored, _ = twins.p_sample(
        x_t, m, table.rows, torch.tensor([0]), None, twins.Flags(table.clip, history=history), ring
    )
    assert relative_error(x_prev.double(), expected) <= 1e-6
    assert ring is None or torch.equal(ring[0], stored)


def test_table_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ddpm_table(SCHEDULES["linear"], steps=2).clip = False


@pytest.mark.parametrize(
    ("rows_of", "form"), [(q_rows, reference.q_sample), (q_step_rows, reference.q_step)], ids=["q_sample", "q_step"]
)
def test_noising_rows_are_the_coefficients_of_the_papers_form(rows_of, form):
    schedule = SCHEDULES["cosine"]
    rows, t = rows_of(schedule), torch.arange(1000)
    one, zero = torch.ones(1000, 1, dtype=torch.float64), torch.zeros(1000, 1, dtype=torch.float64)
    assert torch.equal(rows[:, :1], form(one, t, schedule, zero).float())
    assert torch.equal(rows[:, 1:], form(zero, t, schedule, one).float())
    assert rows.is_contiguous()
