"""Every solver's rows against its paper's own form in float64, state by state, and its order of convergence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastddpm.schedules.levels import noise_levels
from fastddpm.schedules.schedule import Schedule
from fastddpm.tables import multistep
from fastddpm.tables.deis import deis_table, ipndm_table
from fastddpm.tables.dpm_solver import dpm_solver_table
from fastddpm.tables.euler import euler_ancestral_table, euler_table, heun_table
from fastddpm.tables.sa_solver import sa_solver_table
from fastddpm.tables.table import Table
from fastddpm.tables.unipc import unipc_table
from tests.ops.pairs import all_pairs, case_id
from tests.tables import papers
from tests.tables.float64 import execute_row64, randn, states64

SCHEDULE = Schedule.linear()


def x_0_model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network of x_0: nonlinear, and dependent on neighbours and on t."""
    return torch.tanh(1.3 * x + 0.4 * x.roll(1, dims=-1)) * 0.8 + t.reshape(-1, 1).double() / 2000 - 0.2


def assert_same_states(table: Table, expected, z=None) -> None:
    """Compare the state after every row."""
    x_T = randn(3, 8)
    count = 0
    for ours, theirs in itertools.zip_longest(states64(table, x_0_model, x_T, z), expected(x_T)):
        count += 1
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= 2e-12, f"row {count - 1} differs by {error:.1e}"
    assert count == len(table)


def path(steps: int, final: str, spacing: str, **options) -> tuple[dict, list[float], list[float]]:
    """Options of a table of x_0, and the levels and timesteps that its paper's form takes."""
    chosen = {"steps": steps, "final": final, "spacing": spacing}
    levels = noise_levels(SCHEDULE, **chosen)
    shared = chosen | {"prediction_type": "x_0", "clip_range": None} | options
    return shared, levels.alphas_cumprod.tolist(), levels.timesteps.tolist()


UNIPC = {"order": [1, 2, 3], "variant": ["bh1", "bh2"], "final": ["zero", "sigma_min"], "steps": [1, 2, 3, 4, 9]}


@pytest.mark.parametrize("case", all_pairs(UNIPC), ids=case_id)
def test_unipc_is_its_predictor_and_corrector(case):
    options, levels, ts = path(case["steps"], case["final"], "trailing")
    table = unipc_table(SCHEDULE, order=case["order"], variant=case["variant"], **options)
    assert table.history <= case["order"]
    assert_same_states(table, lambda x: papers.unipc(x_0_model, x, levels, ts, case["order"], case["variant"]))


SA = {
    "order": [1, 2, 3],
    "corrector_order": [0, 1, 2, 3, 4],
    "tau": [0.0, 0.4, 1.0],
    "final": ["zero", "sigma_min"],
    "steps": [1, 2, 3, 4, 9],
}


@pytest.mark.parametrize("case", all_pairs(SA), ids=case_id)
def test_sa_solver_is_its_predictor_and_corrector(case):
    options, levels, ts = path(case["steps"], case["final"], "karras")
    names = ("order", "corrector_order", "tau")
    table = sa_solver_table(SCHEDULE, **{name: case[name] for name in names}, **options)
    z = randn(case["steps"], 3, 8, seed=1)
    assert_same_states(
        table, lambda x: papers.sa_solver(x_0_model, x, levels, ts, *(case[name] for name in names), z), z
    )


def test_sa_solver_takes_a_tau_for_each_step():
    options, *_ = path(4, "zero", "trailing")
    taus = [0.0, 1.0, 0.5, 0.0]
    table = sa_solver_table(SCHEDULE, order=1, corrector_order=0, tau=taus, **options)
    for r, tau in enumerate(taus):
        one = sa_solver_table(SCHEDULE, order=1, corrector_order=0, tau=tau, **options)
        assert torch.equal(table.rows64[r], one.rows64[r])
    with pytest.raises(ValueError, match="tau must be one number or 4, one for each step; got 3"):
        sa_solver_table(SCHEDULE, tau=taus[:3], **options)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_solver_of_order_3_is_k_diffusions(final, eta):
    options, levels, ts = path(9, final, "logsnr")
    table = dpm_solver_table(SCHEDULE, order=3, tau=math.sqrt(eta), lower_order_final=False, **options)
    z = randn(9, 3, 8, seed=2)
    assert_same_states(table, lambda x: papers.dpm_solver_3m_sde(x_0_model, x, levels, ts, eta, z), z)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_deis_integrates_its_polynomials(final, order):
    options, levels, ts = path(9, final, "trailing")
    table = deis_table(SCHEDULE, order=order, **options)
    assert (table.estimate, table.clip) == ("eps", False)
    assert_same_states(table, lambda x: papers.deis(x_0_model, x, levels, ts, order))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_ipndm_is_adams_bashforth(final):
    options, levels, ts = path(9, final, "karras")
    assert_same_states(ipndm_table(SCHEDULE, **options), lambda x: papers.ipndm(x_0_model, x, levels, ts))


@pytest.mark.parametrize("build", [unipc_table, sa_solver_table, dpm_solver_table])
def test_a_solver_starts_from_zero_terminal_snr(build):
    # lambda is -inf there: no polynomial goes through that estimate, and no correction is for the step from it.
    table = build(SCHEDULE.zero_terminal_snr(), order=3, steps=9, prediction_type="v")
    later = table.rows64[:, [7, 12, 13]]
    assert (later[:2] == 0).all()
    assert (later[2:-1].abs().sum(dim=1) > 0).all()
    for eps in (deis_table, ipndm_table, heun_table):
        with pytest.raises(ValueError, match=r"need.* signal at every level.*use unipc"):
            eps(SCHEDULE.zero_terminal_snr(), steps=9, prediction_type="v")


def test_heun_is_two_rows_a_step():
    options, levels, ts = path(6, "zero", "karras")
    table = heun_table(SCHEDULE, **options)
    assert (len(table), table.history) == (11, 1)
    assert_same_states(table, lambda x: papers.heun(x_0_model, x, levels, ts))


def test_euler_ancestral_goes_down_and_up():
    options, levels, ts = path(7, "zero", "karras")
    z = randn(7, 3, 8, seed=3)
    table = euler_ancestral_table(SCHEDULE, **options)
    assert_same_states(table, lambda x: papers.euler_ancestral(x_0_model, x, levels, ts, z), z)


@pytest.mark.parametrize("H", [0.0, 1e-9, 1e-3, 0.5, 1.0 - 1e-12, 1.0, 3.0, 30.0, math.inf])
def test_moments_are_the_integrals(H):
    exact = [
        1.0 if math.isinf(H) else papers.integral(lambda u, k=k: H * papers.np.exp(-H * (1 - u)) * u**k, 0, 1)
        for k in range(4)
    ]
    assert multistep.moments(H, 4) == pytest.approx(exact, rel=1e-13)


# The order of convergence of each. A method of p nodes has order p, with the corrector p + 1 (Zhao et al. 2023, theorem
# 3.1). The published DPM-Solver++(3M) takes half of the second difference, and what is left is of second order.
ORDERS = {
    "euler": (euler_table, {}, 1),
    "dpm++2m": (dpm_solver_table, {}, 2),
    "dpm++2m-heun": (dpm_solver_table, {"solver_type": "heun"}, 2),
    "dpm++3m": (dpm_solver_table, {"order": 3}, 2),
    "unip2": (unipc_table, {"order": 2, "corrector": False}, 2),
    "unipc2-bh1": (unipc_table, {"order": 2, "variant": "bh1"}, 3),
    "unipc2-bh2": (unipc_table, {"order": 2}, 3),
    "unip3": (unipc_table, {"order": 3, "corrector": False}, 3),
    "unipc3": (unipc_table, {"order": 3}, 4),
    "sa2": (sa_solver_table, {"order": 2, "corrector_order": 0, "tau": 0.0}, 2),
    "sa3-corrected": (sa_solver_table, {"order": 3, "corrector_order": 4, "tau": 0.0}, 4),
    "deis3": (deis_table, {"order": 3}, 3),
    "deis4": (deis_table, {"order": 4}, 4),
}


def gaussian_error(build, options, steps: int) -> float:
    """The error of a run over lambda in [-1, 2] for data N(0, 0.25), begun with the exact state and history of row 3.

    There E[x_0 | x_t] is linear in x_t, and the diffusion ODE scales x_t with its standard deviation.
    """
    lam = torch.linspace(-1.0, 2.0, steps + 1, dtype=torch.float64)
    table = build(
        SCHEDULE,
        sigmas=(-lam).exp(),
        prediction_type="x_0",
        clip_range=None,
        **({} if build is euler_table else {"lower_order_final": False}),
        **options,
    )
    alpha_bar = (2 * lam).sigmoid()
    std = (0.25 * alpha_bar + 1 - alpha_bar).sqrt()
    x_0 = 0.25 * alpha_bar.sqrt() / std  # at x = std
    kept = (std - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt() if table.estimate == "eps" else x_0
    x, history = std[3:4], [kept[2:3], kept[1:2], kept[0:1]]
    for r in range(3, steps):
        x, estimate = execute_row64(table, r, x, x_0[r] / std[r] * x, history=history)
        history = [estimate, *history][:3]
    return abs(float(x - std[-1]))


@pytest.mark.parametrize("name", ORDERS)
def test_a_solver_converges_at_its_order(name):
    build, options, order = ORDERS[name]
    errors = [gaussian_error(build, options, steps) for steps in (40, 80, 160)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order, order], abs=0.2), errors


def test_heun_converges_at_its_order():
    errors = []
    for steps in (20, 40, 80):
        sigmas = torch.cat([(-torch.linspace(-2.0, 1.0, steps + 1, dtype=torch.float64)).exp(), torch.zeros(1)])
        table = heun_table(SCHEDULE, sigmas=sigmas, prediction_type="x_0", clip_range=None)
        alpha_bar = 1 / (1 + sigmas**2)
        std = (0.25 * alpha_bar + 1 - alpha_bar).sqrt()
        x, history = std[0:1], [torch.zeros(1)]
        for r in range(2 * steps):
            level = (r + 1) // 2
            x, estimate = execute_row64(
                table, r, x, 0.25 * alpha_bar[level].sqrt() / std[level] ** 2 * x, None, history
            )
            history = [estimate]
        errors.append(abs(float(x - std[-2])))
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], abs=0.3), errors
