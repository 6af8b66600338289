"""Edits of a run, against plain loops in float64: data to begin from."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

import fastddpm
from fastddpm import DiffusionConfig, Sampler, ddpm_table
from fastddpm.data.points import sliced_wasserstein
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.tables.by_name import make_table
from fastddpm.tables.table import make_rows
from tests.sampling.test_sampler import SCHEDULE, SHAPE, Pointwise, with_tape
from tests.tables.yardsticks import CONFIG as UNCLIPPED
from tests.tables.yardsticks import Mixture

CONFIG = DiffusionConfig(num_timesteps=50, beta_start=1e-3, beta_end=0.2)
X_0 = torch.linspace(-1, 1, 210).reshape(2, *SHAPE)


def forward_noise(step: int = 0, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    return randn((len(seeds), *SHAPE), seeds=seeds, step=step, stream=noise.STREAM_FORWARD)


def noised(x_0: Tensor, t: int, eps: Tensor) -> Tensor:
    """Eq. 4 of Ho et al. in float64."""
    alpha_bar = SCHEDULE.alphas_cumprod[t]
    return alpha_bar.sqrt() * x_0.double() + (1 - alpha_bar).sqrt() * eps.double()


@pytest.mark.parametrize(("strength", "steps"), [(0.29, 29), (0.6, 60), (0.004, 1), (1.0, 100)])
def test_strength_keeps_that_share_of_the_steps(strength: float, steps: int) -> None:
    whole = make_table("ddim", DiffusionConfig(), steps=100)
    tail = make_table("ddim", DiffusionConfig(), steps=100, strength=strength)
    assert tail.timesteps.tolist() == whole.timesteps.tolist()[100 - steps :]
    torch.testing.assert_close(tail.rows64, whole.rows64[100 - steps :], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tail.levels, whole.levels[100 - steps :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["unipc3", "dpm++2m", "heun", "sa_solver", "deis"])
def test_a_multistep_method_begins_part_way_without_a_past(name: str) -> None:
    options = {"tau": [0.5] * 10} if name == "sa_solver" else {}
    whole = make_table(name, CONFIG, steps=10, **options)
    tail = make_table(name, CONFIG, steps=10, strength=0.5, **options)
    per_step = 2 if name == "heun" else 1
    assert len(tail) == len(whole) - 5 * per_step
    assert torch.equal(tail.timesteps, whole.timesteps[5 * per_step :])
    assert not tail.column("c_1")[0]
    assert not tail.column("c_2")[:2].any()
    torch.testing.assert_close(tail.levels, whole.levels[5 * per_step :], rtol=1e-6, atol=1e-7)


def test_a_list_of_levels_is_cut_too() -> None:
    sigmas = [3.0, 2.0, 1.0, 0.5, 0.2, 0.0]
    tail = make_table("dpm++2m", CONFIG, sigmas=sigmas, strength=0.6)
    expected = make_table("dpm++2m", CONFIG, sigmas=sigmas[2:])
    torch.testing.assert_close(tail.rows64, expected.rows64, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc3", "euler_a", "heun"])
def test_levels_are_what_data_become_at_each_row(name: str) -> None:
    rows = make_table(name, CONFIG, steps=6)
    alpha_bar = torch.cat([SCHEDULE.alphas_cumprod[rows.timesteps], torch.ones(1, dtype=torch.float64)])
    torch.testing.assert_close(rows.levels[:, 0] ** 2, alpha_bar, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.levels.square().sum(dim=1), torch.ones_like(alpha_bar), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [49, 20, 0])
def test_init_is_noised_to_the_first_rows_level(t: int) -> None:
    sampler = Sampler(Pointwise().eval(), ddpm_table(SCHEDULE, timesteps=[t]), SHAPE, compile=False)
    sampler.sample(seeds=[1, 2], init=X_0)
    seen = sampler.model.seen[0].x
    torch.testing.assert_close(seen.double(), noised(X_0, t, forward_noise()), rtol=0, atol=1e-6)


def test_init_with_a_generator_takes_its_first_draw_as_noise() -> None:
    sampler = Sampler(Pointwise().eval(), ddpm_table(SCHEDULE, timesteps=[20, 10]), SHAPE, compile=False)
    sampler.sample(generator=torch.Generator().manual_seed(0), init=X_0)
    eps = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler.model.seen[0].x.double(), noised(X_0, 20, eps), rtol=0, atol=1e-6)


def test_front_door_begins_part_way_in_any_batches() -> None:
    def draw(init: Tensor, **options: object) -> Tensor:
        return fastddpm.sample(
            Pointwise().eval(), SHAPE, seeds=[1, 2], init=init, diffusion=CONFIG, steps=10, sampler="ddpm", **options
        )

    x = draw(X_0, strength=0.5)
    assert torch.equal(x, draw(X_0, strength=0.5, batch_size=1))
    rows = make_table("ddpm", CONFIG, steps=10, strength=0.5)
    assert torch.equal(x, Sampler(Pointwise().eval(), rows, SHAPE, compile=False).sample(seeds=[1, 2], init=X_0))
    assert torch.equal(draw(X_0[:1], strength=0.5)[0], x[0])
    nearer = draw(X_0, strength=0.1)
    assert (nearer - X_0).square().mean() < (x - X_0).square().mean()


def test_init_that_does_not_fit_is_refused() -> None:
    rows = ddpm_table(SCHEDULE, steps=2)
    sampler = Sampler(Pointwise().eval(), rows, SHAPE, compile=False)
    with pytest.raises(ValueError, match=r"init must be floating point of shape \[B, 3, 5, 7\].*image\[None\]"):
        sampler.sample(seeds=[1, 2], init=X_0[0])
    with pytest.raises(ValueError, match=r"init must be floating.*uint8.*x / 127.5 - 1"):
        sampler.sample(seeds=[1, 2], init=X_0.to(torch.uint8))
    bytes_as_floats = 127.5 * (X_0.clamp(-1, 1) + 1)
    with pytest.raises(ValueError, match=r"init reaches 2.*clipped to 1: .*x / 127.5 - 1"):
        sampler.sample(seeds=[1, 2], init=bytes_as_floats)
    with pytest.raises(ValueError, match="known reaches 2"):
        sampler.sample(seeds=[1, 2], known=bytes_as_floats, mask=MASKS["half"])
    absent = torch.where(MASKS["half"].bool(), -999.0, X_0)
    drawn = sampler.sample(seeds=[1, 2], known=absent, mask=MASKS["half"])
    assert torch.equal(drawn, sampler.sample(seeds=[1, 2], known=X_0, mask=MASKS["half"]))
    unclipped = Sampler(Pointwise().eval(), ddpm_table(SCHEDULE, steps=2, clip_range=None), SHAPE, compile=False)
    assert unclipped.sample(seeds=[1, 2], init=bytes_as_floats).shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="init holds 2 samples, and 3 are drawn"):
        sampler.sample(seed=1, batch_size=3, init=X_0)
    with pytest.raises(ValueError, match="init= and x_T= are two starts"):
        sampler.sample(seeds=[1, 2], init=X_0, x_T=X_0)
    with pytest.raises(ValueError, match="begins part-way: pass init="):
        fastddpm.sample(Pointwise(), SHAPE, strength=0.5)
    with pytest.raises(ValueError, match="strength must"):
        fastddpm.sample(Pointwise(), SHAPE, strength=0.0, init=X_0)
    bare = fastddpm.Table(make_rows(1, a=1.0), torch.zeros(1, dtype=torch.int64), name="bare")
    with pytest.raises(ValueError, match="'bare' has no levels"):
        Sampler(Pointwise().eval(), bare, SHAPE, compile=False).sample(seeds=[1, 2], init=X_0)


MASKS = {
    "half": torch.arange(7) < 3,  # [W]
    "per sample": torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5,
    "numbers": (torch.arange(5) % 2).float()[:, None],  # [H, 1]
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "unipc3"])
def test_known_data_are_noised_to_the_level_of_each_state(name: str, mask: Tensor) -> None:
    rows = make_table(name, CONFIG, steps=6)
    sampler = Sampler(Pointwise().eval(), rows, SHAPE, compile=False)
    x = sampler.sample(seeds=[1, 2], known=X_0, mask=mask)
    free = mask.bool().expand(2, *SHAPE)
    for i, seen in enumerate(sampler.model.seen):
        expected = noised(X_0, int(rows.timesteps[i]), forward_noise(i))
        torch.testing.assert_close(seen.x.double()[~free], expected[~free], rtol=0, atol=1e-6)
    assert torch.equal(x[~free], X_0[~free])
    # A pointwise network lets nothing of the known part into the rest.
    assert torch.equal(x[free], Sampler(Pointwise().eval(), rows, SHAPE, compile=False).sample(seeds=[1, 2])[free])


def test_masks_and_known_data_live_in_buffers_that_a_replay_reads() -> None:
    rows = make_table("ddpm", CONFIG, steps=4, jump_length=1, jump_n_sample=2)
    loop, tape = (Sampler(Pointwise().eval(), rows, SHAPE, compile=False) for _ in range(2))
    with_tape(tape)
    for k, mask in enumerate(MASKS.values()):
        call = {"seeds": [k, 9], "known": X_0 / (k + 1), "mask": mask}
        assert torch.equal(tape.sample(**call), loop.sample(**call))
    assert tape._steps._idle[0].graph is not None


def test_mask_runs_in_any_batches() -> None:
    mask = MASKS["per sample"]

    def draw(**options: object) -> Tensor:
        return fastddpm.sample(
            Pointwise().eval(), SHAPE, seeds=[1, 2], known=X_0, mask=mask, diffusion=CONFIG, steps=4, **options
        )

    x = draw()
    assert torch.equal(x, draw(batch_size=1))
    assert torch.equal(x[~mask], X_0[~mask])
    # With init for known data, and a mask as wide as there are seeds.
    wide = torch.tensor([True, False, True, False, True])
    y = fastddpm.sample(Pointwise().eval(), (5,), seeds=range(5), init=torch.ones(1, 5), mask=wide, strength=0.5)
    assert torch.equal(y[:, ~wide], torch.ones(5, 2))
    assert not torch.equal(y[:, wide], torch.ones(5, 3))


def test_points_inpainted_along_one_coordinate_are_of_the_data() -> None:
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    ring = Mixture(0.7 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.1)
    n = 2000
    given = ring.draw(n, seed=1).float()
    data = [ring.draw(n, seed).float() for seed in range(2, 8)]

    def inpainted(**jumps: int) -> Tensor:
        table = make_table("ddpm", UNCLIPPED, steps=250, **jumps)
        sampler = Sampler(lambda x, t: ring(x.double(), t).float(), table, (2,), compile=False)
        return sampler.sample(seeds=range(n), known=given, mask=torch.tensor([0.0, 1.0]))

    def distance(points: Tensor) -> float:
        return statistics.mean(sliced_wasserstein(points, other) for other in data[:3])

    points = inpainted(jump_length=10, jump_n_sample=5)
    assert torch.equal(points[:, 0], given[:, 0])
    assert distance(points) < 1.5 * statistics.mean(map(sliced_wasserstein, data[:3], data[3:]))
    # The distance sees which second coordinate belongs to which first one, and what jumps are for.
    assert distance(inpainted()) > 1.2 * distance(points)
    points[:, 1] = points[torch.randperm(n, generator=torch.Generator().manual_seed(0)), 1]
    assert distance(points) > 2 * distance(given)


def test_mask_that_does_not_fit_is_refused() -> None:
    sampler = Sampler(Pointwise().eval(), ddpm_table(SCHEDULE, steps=2), SHAPE, compile=False)
    half = MASKS["half"]
    with pytest.raises(ValueError, match="needs known="):
        sampler.sample(seeds=[1, 2], mask=half)
    with pytest.raises(ValueError, match=r"0 \(known\) and 1 \(to be drawn\) only"):
        sampler.sample(seeds=[1, 2], known=X_0, mask=half * 0.5)
    with pytest.raises(ValueError, match=r"broadcast to \[2, 3, 5, 7\], got \[6\]"):
        sampler.sample(seeds=[1, 2], known=X_0, mask=torch.ones(6))
    with pytest.raises(ValueError, match="noises the known data by seeds"):
        sampler.sample(generator=torch.Generator(), known=X_0, mask=half, batch_size=2)
    with pytest.raises(ValueError, match="known= counts where a mask is 0"):
        sampler.sample(seeds=[1, 2], known=X_0)


def test_slerp_keeps_angles_and_lengths() -> None:
    a, b = (torch.randn(3, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))
    path = fastddpm.slerp(a, b, torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    torch.testing.assert_close(path[2], fastddpm.slerp(a, b, 0.5))
    unit = fastddpm.slerp(a / a.norm(), b / b.norm(), torch.linspace(0, 1, 5, dtype=torch.float64)).flatten(1)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angles = (unit[:-1] * unit[1:]).sum(dim=1).acos()
    torch.testing.assert_close(angles, angles[:1].expand(4))
    assert torch.equal(fastddpm.slerp(a, a, 0.3), a)
