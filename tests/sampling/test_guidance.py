"""Guidance by a column, rescaled, and self-conditioning, against loops written from the papers in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import Sampler, Schedule, ddim_table, ddpm_table
from fastddpm.errors import ModelOutputError
from fastddpm.noise import v1 as noise
from fastddpm.ops.draw import randn
from fastddpm.tables.deis import deis_table
from fastddpm.tables.table import Table
from tests.sampling.test_sampler import with_tape
from tests.tiny import tiny_unet

SCHEDULE = Schedule.linear(50, 1e-3, 0.2)
SHAPE, SEEDS, LABELS, NULL, STEPS = (3, 5, 7), [3, 4], [0, 2], 4, 8
# Eight steps of about ten roundings each, on values of size 1.
TOLERANCE = 5e-6
Predict = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A network of elementwise operations, with labels, a learned variance and the last estimate of x_0."""

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75))
        self.null_class, self.learned = NULL, learned

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, x_self_cond: Tensor | None = None
    ) -> Tensor:
        m = x * self.weight / (1 + x.abs()) + (t.to(x.dtype) / 64).reshape(-1, 1, 1, 1)
        if class_labels is not None:
            m = m * (1 - 0.125 * class_labels.to(x.dtype).reshape(-1, 1, 1, 1)) + 0.1 * (2 * x).sin()
        if x_self_cond is not None:
            m = m + 0.25 * x_self_cond
        return torch.cat([m, 0.5 * m], dim=1) if self.learned else m


def drawn() -> tuple[Tensor, list[Tensor]]:
    x_T = randn((2, *SHAPE), seeds=SEEDS, stream=noise.STREAM_X_T)
    return x_T.double(), [randn((2, *SHAPE), seeds=SEEDS, step=i).double() for i in range(STEPS)]


def ancestral(
    predict: Callable[[Tensor, Tensor, int], Tensor],
    timesteps: Sequence[int],
    x: Tensor,
    z: list[Tensor],
    clip: bool = True,
) -> Tensor:
    """Algorithm 2 of Ho et al. 2020 over some timesteps (Nichol & Dhariwal 2021, eq. 19), epsilon, beta_tilde."""
    alpha_bar = SCHEDULE.alphas_cumprod
    for i, t in enumerate(timesteps):
        after = alpha_bar[timesteps[i + 1]] if i + 1 < len(timesteps) else alpha_bar.new_tensor(1.0)
        eps = predict(x, torch.full((len(x),), t), i)
        x_0 = (x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        alpha = alpha_bar[t] / after
        mean = (after.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - after) * x) / (1 - alpha_bar[t])
        x = mean + ((1 - after) / (1 - alpha_bar[t]) * (1 - alpha)).sqrt() * z[i]
    return x


def labelled(model: nn.Module, w: Callable[[int], float], phi: float = 0.0) -> Callable[[Tensor, Tensor, int], Tensor]:
    def predict(x: Tensor, t: Tensor, i: int) -> Tensor:
        m_c, m_u = model(x, t, torch.tensor(LABELS)), model(x, t, torch.full((2,), NULL))
        m = m_u + w(i) * (m_c - m_u)
        rescaled = m * (m_c.std(dim=(1, 2, 3), keepdim=True) / m.std(dim=(1, 2, 3), keepdim=True))
        return phi * rescaled + (1 - phi) * m

    return predict


def table(**options: Any) -> Table:
    return ddpm_table(SCHEDULE, steps=STEPS, **options)


COLUMN = [1.0, 1.0, 3.0, 2.5, 2.0, 0.0, 1.0, 1.0]
TIMES: list[int] = table().timesteps.tolist()
# The arguments, the weight at each row, and phi.
KINDS: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "constant": ({"guidance": 2.5}, [2.5] * STEPS, 0.0),
    "column": ({"guidance": COLUMN}, COLUMN, 0.0),
    "tensor": ({"guidance": torch.tensor(COLUMN)}, COLUMN, 0.0),
    "interval": (
        {"guidance": 2.5, "guidance_interval": (TIMES[5], TIMES[2])},
        [2.5 if 2 <= i <= 5 else 1.0 for i in range(STEPS)],
        0.0,
    ),
    "rescale": ({"guidance": 2.5, "guidance_rescale": 0.7}, [2.5] * STEPS, 0.7),
    "interval-of-a-column-rescaled": (
        {"guidance": COLUMN, "guidance_interval": (0, TIMES[3]), "guidance_rescale": 1.0},
        [w if i >= 3 else 1.0 for i, w in enumerate(COLUMN)],
        1.0,
    ),
}


@pytest.mark.parametrize("engine", ["loop", "tape"])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_matches_the_paper(kind: str, engine: str) -> None:
    arguments, w, phi = KINDS[kind]
    model = Net().eval()
    sampler = Sampler(model, table(), SHAPE, compile=False)
    sampler = with_tape(sampler) if engine == "tape" else sampler
    call: dict[str, Any] = {"seeds": SEEDS, "class_labels": LABELS}
    # Another call before: what changes per call is not captured.
    sampler.sample(**call, **{**arguments, "guidance": 7.0, "guidance_interval": None})
    got = sampler.sample(**call, **arguments)
    x_T, z = drawn()
    exact = ancestral(labelled(model.double(), lambda i: w[i], phi), TIMES, x_T, z)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE)
    assert len(sampler._steps._idle) == 1


def test_rescaled_guidance_takes_the_variance_from_the_conditional_half() -> None:
    rows = table(variance_type="learned")
    model = Net(learned=True).eval()
    got = Sampler(model, rows, SHAPE, compile=False).sample(
        seeds=SEEDS, class_labels=LABELS, guidance=3.0, guidance_rescale=0.7
    )
    double, plain = Net(learned=True).double(), Net().double()

    def by_hand(x: Tensor, t: Tensor) -> Tensor:
        v = double(x, t, torch.tensor(LABELS)).chunk(2, dim=1)[1]
        return torch.cat([labelled(plain, lambda i: 3.0, 0.7)(x, t, 0), v], dim=1)

    x_T, z = drawn()
    exact = fastddpm.reference.p_sample_loop(
        by_hand, x_T, SCHEDULE, timesteps=rows.timesteps, z=torch.stack(z), variance_type="learned"
    )
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE)


def test_prediction_without_spread_is_left_as_it_is() -> None:
    sampler = Sampler(lambda x, t, class_labels: torch.zeros_like(x), table(), SHAPE, null_class=4, compile=False)
    call: dict[str, Any] = {"seeds": SEEDS, "class_labels": LABELS, "guidance": 2.0}
    assert torch.equal(sampler.sample(**call, guidance_rescale=1.0), sampler.sample(**call))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"guidance": [1.0, 2.0]}, "one for each of the 8 steps, got shape \\[2\\]"),
        ({"guidance": [float("nan")] * STEPS}, "finite"),
        ({"guidance": 2.0, "guidance_interval": (9, 3)}, "is \\(low, high\\) in timesteps, got \\(9, 3\\)"),
        ({"guidance": 2.0, "guidance_rescale": 1.5}, "guidance_rescale"),
        ({"model_kwargs": {"x_self_cond": torch.zeros(2, *SHAPE)}}, "given the estimate of x_0"),
    ],
)
def test_guidance_that_does_not_fit_is_refused(call: dict[str, Any], message: str) -> None:
    sampler = Sampler(Net().eval(), table(), SHAPE, compile=False, self_condition="x_self_cond")
    with pytest.raises(ValueError, match=message):
        sampler.sample(seeds=SEEDS, class_labels=LABELS, **call)


def test_guidance_of_one_says_what_has_no_effect(recwarn: pytest.WarningsRecorder) -> None:
    sampler = Sampler(Net().eval(), table(), SHAPE, compile=False)
    call: dict[str, Any] = {"seeds": SEEDS, "class_labels": LABELS}
    for given in ({"guidance": 2.0, "guidance_rescale": 0.5}, {"guidance": [1.0] * (STEPS - 1) + [2.0]}, {}):
        sampler.sample(**call, **given)
    assert not recwarn.list
    for given in ({"guidance_interval": (1, 9)}, {"guidance_rescale": 0.5, "guidance": [1.0] * STEPS}):
        with pytest.warns(UserWarning, match="guidance is 1: guidance_interval and guidance_rescale have no effect"):
            images = sampler.sample(**call, **given)
        assert torch.equal(images, sampler.sample(**call))


def test_front_door_hands_guidance_on() -> None:
    model = tiny_unet(num_class_embeds=4, null_class=3)
    model.diffusion = fastddpm.DiffusionConfig(beta_schedule="cosine", num_timesteps=20)
    arguments: dict[str, Any] = {"steps": 2, "sampler": "ddim", "class_labels": [0, 1]}
    # As many weights as samples: they belong to the rows.
    w = torch.tensor([3.0, 1.5])
    got = fastddpm.sample(model, seeds=SEEDS, batch_size=1, guidance=w, guidance_rescale=0.5, **arguments)
    sampler = Sampler(model, ddim_table(model.diffusion.schedule(), steps=2), (1, 8, 8), compile=False)
    for i, seed in enumerate(SEEDS):
        one = sampler.sample(seeds=[seed], class_labels=[i], guidance=[3.0, 1.5], guidance_rescale=0.5)
        torch.testing.assert_close(got[i], one[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("engine", ["loop", "tape"])
def test_self_conditioning_hands_the_model_its_last_estimate(engine: str, guided: bool, dtype: torch.dtype) -> None:
    """Chen et al. 2023, Algorithm 2: zeros at first, then the clipped x_0 of the step before."""
    model = Net().eval()
    sampler = Sampler(model, table(), SHAPE, compile=False, self_condition="x_self_cond", dtype=dtype)
    sampler = with_tape(sampler) if engine == "tape" else sampler
    call: dict[str, Any] = {"class_labels": LABELS, "guidance": 2.0} if guided else {}
    sampler.sample(seeds=[8, 9], **call)
    got = sampler.sample(seeds=SEEDS, **call)
    double, alpha_bar = Net().double(), SCHEDULE.alphas_cumprod
    x_0 = torch.zeros(2, *SHAPE, dtype=torch.float64)

    def predict(x: Tensor, t: Tensor, i: int) -> Tensor:
        nonlocal x_0
        if guided:
            m_c, m_u = double(x, t, torch.tensor(LABELS), x_0), double(x, t, torch.full((2,), NULL), x_0)
            m = m_u + 2.0 * (m_c - m_u)
        else:
            m = double(x, t, None, x_0)
        x_0 = ((x - (1 - alpha_bar[t[0]]).sqrt() * m) / alpha_bar[t[0]].sqrt()).clamp(-1, 1)
        return m

    x_T, z = drawn()
    exact = ancestral(predict, TIMES, x_T, z)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE if dtype == torch.float32 else 0.1)


def test_self_conditioning_keeps_the_unets_form_and_needs_an_estimate_of_x_0() -> None:
    unet = tiny_unet(in_channels=2)
    got = Sampler(unet, table(), (1, 8, 8), compile=False, self_condition="condition").sample(seeds=SEEDS)
    plain = Sampler(
        lambda x, t, last: unet(torch.cat([x, last], dim=1), t),
        table(),
        (1, 8, 8),
        self_condition="last",
        compile=False,
    )
    torch.testing.assert_close(got, plain.sample(seeds=SEEDS), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"no estimate of x_0 to give; .* self-conditioning"):
        Sampler(Net().eval(), deis_table(SCHEDULE, steps=3), SHAPE, compile=False, self_condition="x_self_cond").sample(
            seeds=SEEDS
        )


def test_unet_of_lucidrains_is_self_conditioned_by_default() -> None:
    original = pytest.importorskip("denoising_diffusion_pytorch")
    torch.manual_seed(0)
    unet = original.Unet(dim=8, dim_mults=(1, 2), channels=3, self_condition=True, flash_attn=False).eval()
    theirs = original.GaussianDiffusion(unet, image_size=8, timesteps=12, objective="pred_v").eval()
    from fastddpm.integrations.lucidrains import table_of

    torch.manual_seed(5)
    x = theirs.sample(batch_size=2) * 2 - 1
    torch.manual_seed(5)
    x_T = torch.randn(2, 3, 8, 8)
    sampler = Sampler(unet, table_of(theirs), (3, 8, 8), compile=False)
    z = torch.stack([*(torch.randn(2, 3, 8, 8) for _ in range(11)), torch.zeros(2, 3, 8, 8)])
    torch.testing.assert_close(sampler.sample(x_T=x_T, noise=z), x, rtol=0, atol=1e-5)
    without = Sampler(lambda x, t: unet(x, t), table_of(theirs), (3, 8, 8), compile=False)
    assert (without.sample(x_T=x_T, noise=z) - x).abs().max() > 0.01


TARGET = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def classifier(x: Tensor, t: Tensor, class_labels: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
    """The gradient by autograd of a made-up log p(y | x_t), as OpenAI's classifier_sample.py takes it."""
    assert t.shape == (len(x),)
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        target = TARGET.to(x.dtype) * (
            1.0 if class_labels is None else 0.5 + class_labels.to(x.dtype)[:, None, None, None]
        )
        log_p = -((x - target) ** 2).sum() * 0.5 - (0.02 * t.to(x.dtype)[:, None, None, None] * x).sin().sum()
        return torch.autograd.grad(log_p, x)[0] * scale


def alpha_bars(timesteps: Sequence[int]) -> list[tuple[int, Tensor, Tensor]]:
    alpha_bar = torch.cat([SCHEDULE.alphas_cumprod[list(timesteps)], torch.ones(1, dtype=torch.float64)])
    return [(t, alpha_bar[i], alpha_bar[i + 1]) for i, t in enumerate(timesteps)]


def respaced(timesteps: Sequence[int], variance: str, by: Predict, model: Predict, clip: bool = True) -> Tensor:
    """Algorithm 1 of Dhariwal & Nichol 2021: x_{t-1} ~ N(mu + Sigma g, Sigma); without noise or shift at t = 0."""
    x, z = drawn()
    for i, (step, now, after) in enumerate(alpha_bars(timesteps)):
        t, beta = torch.full((len(x),), step), 1 - now / after
        eps = model(x, t)
        x_0 = (x - (1 - now).sqrt() * eps[:, :3]) / now.sqrt()
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        mean = (after.sqrt() * beta * x_0 + (now / after).sqrt() * (1 - after) * x) / (1 - now)
        small = (1 - after) / (1 - now) * beta
        if variance == "learned_range" and i + 1 < len(timesteps):
            fraction = (eps[:, 3:] + 1) / 2
            sigma2 = (fraction * beta.log() + (1 - fraction) * small.log()).exp()
        else:
            sigma2 = {"fixed_small": small, "fixed_large": beta}.get(variance, small) * (i + 1 < len(timesteps))
        x = mean + sigma2 * by(x, t) + sigma2**0.5 * z[i]
    return x


@pytest.mark.parametrize("engine", ["loop", "tape"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_a_classifiers_gradient_moves_the_mean(variance: str, engine: str) -> None:
    learned = variance == "learned_range"
    sampler = Sampler(Net(learned=learned).eval(), table(variance_type=variance), SHAPE, compile=False)
    sampler = with_tape(sampler) if engine == "tape" else sampler
    call: dict[str, Any] = {"class_labels": LABELS, "cond_fn": classifier}
    sampler.sample(seeds=[8, 9], **call)
    got = sampler.sample(seeds=SEEDS, **call)
    double, labels = Net(learned=learned).double(), torch.tensor(LABELS)
    exact = respaced(TIMES, variance, lambda x, t: classifier(x, t, labels), lambda x, t: double(x, t, labels))
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=TOLERANCE)
    # The caller's noise takes the same way.
    x_T, z = drawn()
    given = sampler.sample(x_T=x_T.float(), noise=torch.stack(z).float(), **call)
    torch.testing.assert_close(given, got, rtol=0, atol=1e-6)


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x, m, now: m,
    "v": lambda x, m, now: (1 - now).sqrt() * x + now.sqrt() * m,
    "x_0": lambda x, m, now: (x - now.sqrt() * m) / (1 - now).sqrt(),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_classifiers_gradient_is_taken_from_eps(prediction: str, clip: float | None, guided: bool) -> None:
    """Algorithm 2 of Dhariwal & Nichol 2021, DDIM; x_0 is clipped after it."""
    rows = ddim_table(SCHEDULE, steps=STEPS, prediction_type=prediction, clip_range=clip, rederive_eps=True)
    call: dict[str, Any] = {"guidance": 2.0} if guided else {}
    got = Sampler(Net().eval(), rows, SHAPE, compile=False).sample(
        seeds=SEEDS, class_labels=LABELS, cond_fn=classifier, **call
    )
    model = labelled(Net().double(), lambda i: 2.0 if guided else 1.0)
    x, _ = drawn()
    for step, now, after in alpha_bars(rows.timesteps.tolist()):
        t = torch.full((2,), step)
        eps = PREDICTIONS[prediction](x, model(x, t, 0), now) - (1 - now).sqrt() * classifier(
            x, t, torch.tensor(LABELS)
        )
        x_0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        if clip is not None:
            x_0 = x_0.clamp(-1, 1)
            eps = (x - now.sqrt() * x_0) / (1 - now).sqrt()
        x = after.sqrt() * x_0 + (1 - after).sqrt() * eps
    torch.testing.assert_close(got.double(), x, rtol=2e-6, atol=TOLERANCE)


def test_a_gradient_pulls_where_the_rows_keep_eps_and_where_it_is_asked_for() -> None:
    """A linear multistep method over eps' is one over eps whose network already knows the classifier."""
    model = Net().eval()

    def knowing(x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        s = (1 - SCHEDULE.alphas_cumprod[t[0]]).sqrt().float()
        return model(x, t, class_labels) - s * classifier(x, t, class_labels)

    for rows in (deis_table(SCHEDULE, steps=STEPS), ddim_table(SCHEDULE, steps=STEPS, eta=1.0)):
        call: dict[str, Any] = {"seeds": SEEDS, "class_labels": LABELS}
        got = Sampler(model, rows, SHAPE, compile=False).sample(**call, cond_fn=classifier, cond_form="epsilon")
        torch.testing.assert_close(
            got, Sampler(knowing, rows, SHAPE, compile=False).sample(**call), rtol=1e-5, atol=1e-5
        )


def test_gradients_that_cannot_be_are_refused() -> None:
    rows = ddim_table(SCHEDULE, steps=3)
    sampler = Sampler(Net().eval(), rows, SHAPE, compile=False)
    with pytest.raises(ValueError, match="table 'ddim' has none; use 'epsilon'"):
        sampler.sample(seeds=SEEDS, cond_fn=classifier, cond_form="mean")
    zero = ddim_table(SCHEDULE.zero_terminal_snr(), steps=3, prediction_type="v", spacing="trailing")
    for bad, message in ((dataclasses.replace(rows, levels=None), "has no levels"), (zero, "has no signal")):
        with pytest.raises(ValueError, match=message):
            Sampler(Net().eval(), bad, SHAPE, compile=False).sample(seeds=SEEDS, cond_fn=classifier)
    with pytest.raises(ModelOutputError, match=r"gradient for x, \[2, 3, 5, 7\], got \[\]"):
        sampler.sample(seeds=SEEDS, cond_fn=lambda x, t: x.sum())
