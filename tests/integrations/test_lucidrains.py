"""The denoising-diffusion-pytorch drop-in, against the installed package and against float64 by hand."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm import reference
from fastddpm.integrations.lucidrains import GaussianDiffusion, accelerate
from fastddpm.integrations.lucidrains.tables import BUFFERS, OBJECTIVES, SCHEDULES, ddim_timesteps
from fastddpm.schedules.schedule import Schedule
from tests.ops.pairs import all_pairs, case_id

SIZE = 8
DTYPES = [torch.float32, torch.float64]
PREDICTION = {"pred_noise": "epsilon", "pred_x0": "x_0", "pred_v": "v"}
pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")


class Net(nn.Module):
    """A small network whose output depends on every input, on its neighbours and on t."""

    def __init__(self, channels: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = self.out_dim = channels
        self.self_condition = False
        generator = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(0.3 * torch.randn(channels, channels, 3, 3, generator=generator))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        h = nn.functional.conv2d(self.dropout(x), self.weight, padding=1)
        return torch.tanh(h + 0.01 * t.float().view(-1, 1, 1, 1)) + 0.5 * x


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # The tensors are too small to share.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def original() -> Any:
    return pytest.importorskip(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
        reason="denoising-diffusion-pytorch, or the torchvision that it imports, is not installed",
        exc_type=ImportError,
    )


def options(**changes: Any) -> dict[str, Any]:
    return {"image_size": SIZE, "timesteps": 50, **changes}


def pair(original: Any, **changes: Any) -> tuple[Any, GaussianDiffusion]:
    net = Net().eval()
    return original.GaussianDiffusion(net, **options(**changes)), GaussianDiffusion(net, **options(**changes))


class Cast(Net):
    """Computes in float32, and returns another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return super().forward(x.float(), t).to(self.dtype)


def images(seed: int = 0, batch: int = 4, channels: int = 3) -> Tensor:
    return torch.rand(batch, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


# Against the installed package.


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"s": 0.02}),
        ("sigmoid", {}),
        ("sigmoid", {"start": 0, "end": 3, "tau": 0.7}),
    ],
)
@pytest.mark.parametrize("timesteps", [21, 1000, 1, 2])
def test_state_dict_is_the_originals_bit_for_bit(
    original: Any, schedule: str, kwargs: dict[str, Any], timesteps: int
) -> None:
    if schedule == "linear" and timesteps <= 20:
        # The original computes NaN there.
        with pytest.raises(ValueError, match="beta"):
            GaussianDiffusion(Net(), **options(timesteps=timesteps, beta_schedule=schedule))
        return
    # The cap matters to loss_weight alone, which both make in one expression.
    for objective, gamma in [
        *((objective, None) for objective in OBJECTIVES),
        *zip(OBJECTIVES, (5, 2.5, 5), strict=True),
    ]:
        theirs, ours = pair(
            original,
            timesteps=timesteps,
            beta_schedule=schedule,
            schedule_fn_kwargs=kwargs,
            objective=objective,
            min_snr_loss_weight=gamma is not None,
            min_snr_gamma=gamma or 5,
        )
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(actual) == list(expected)
        for name in expected:
            assert actual[name].dtype == expected[name].dtype
            assert torch.equal(actual[name], expected[name]), (objective, gamma, name)


def test_attributes_are_the_originals(original: Any) -> None:
    theirs, ours = pair(original, sampling_timesteps=10, ddim_sampling_eta=0.5, offset_noise_strength=0.1)
    names = [name for name in vars(theirs) if not name.startswith("_") and name not in ("normalize", "unnormalize")]
    assert len(names) >= 9
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert torch.equal(ours.normalize(images()), theirs.normalize(images()))
    assert torch.equal(ours.unnormalize(images()), theirs.unnormalize(images()))
    assert ours.device == theirs.device


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predictions_and_posteriors_are_the_originals_bits(original: Any, objective: str, schedule: str) -> None:
    theirs, ours = pair(original, objective=objective, beta_schedule=schedule)
    x, noise, x0 = (images(seed) * 2 - 1 for seed in (1, 2, 3))
    t = torch.tensor([0, 1, 30, 49])
    calls = {
        "predict_start_from_noise": (x, t, noise),
        "predict_noise_from_start": (x, t, x0),
        "predict_v": (x0, t, noise),
        "predict_start_from_v": (x, t, noise),
        "q_posterior": (x0, x, t),
        "p_mean_variance": (x, t),
        "model_predictions": (x, t),
        "q_sample": (x0, t, noise),
    }
    for name, arguments in calls.items():
        assert_same(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments), name)
    for clip, again in itertools.product((False, True), repeat=2):
        flags = {"clip_x_start": clip, "rederive_pred_noise": again}
        assert_same(ours.model_predictions(x, t, **flags), theirs.model_predictions(x, t, **flags), flags)
    assert_same(ours.p_mean_variance(x, t, clip_denoised=False), theirs.p_mean_variance(x, t, clip_denoised=False), 0)


def assert_same(ours: Any, theirs: Any, label: Any) -> None:
    ours, theirs = ([value] if isinstance(value, Tensor) else list(value) for value in (ours, theirs))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), label


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p_sample_is_the_originals_bits_and_draws(original: Any, objective: str, dtype: torch.dtype) -> None:
    theirs, ours = pair(original, objective=objective)
    theirs.model.to(dtype)
    x = (images(4) * 4 - 2).to(dtype)
    for t in (49, 1, 0):
        results = []
        for diffusion in (theirs, ours):
            torch.manual_seed(11)
            results.append((diffusion.p_sample(x, t), torch.get_rng_state()))
        assert_same(results[1][0], results[0][0], t)
        assert torch.equal(results[1][1], results[0][1])


PROCESSES = {
    "objective": list(OBJECTIVES),
    "beta_schedule": list(SCHEDULES),
    "timesteps": [21, 50, 1000],
    "auto_normalize": [True, False],
    "offset_noise_strength": [0.0, 0.1],
    "min_snr_loss_weight": [False, True],
    "min_snr_gamma": [5, 2.5],
}


@pytest.mark.parametrize(
    "case",
    all_pairs({**PROCESSES, "at": [0, 1, 0.5, -2, -1], "x": DTYPES, "network": [*DTYPES, torch.bfloat16]}),
    ids=case_id,
)
def test_one_step_is_the_originals_over_all_pairs_of_settings(original: Any, case: dict[str, Any]) -> None:
    at, x_dtype, network_dtype = (case[name] for name in ("at", "x", "network"))
    settings = {name: case[name] for name in PROCESSES}
    T = settings["timesteps"]
    t = T // 2 if at == 0.5 else at % T
    net = Cast(network_dtype).eval()
    x = (images(4) * 4 - 2).to(x_dtype)
    results = []
    for diffusion in (
        original.GaussianDiffusion(net, **options(**settings)),
        GaussianDiffusion(net, **options(**settings)),
    ):
        torch.manual_seed(11)
        prev, x0 = diffusion.p_sample(x, t)
        results.append((prev, x0, torch.get_rng_state()))
    (prev, x0, left), (expected, expected_x0, expected_left) = results[1], results[0]
    assert torch.equal(left, expected_left)
    assert relative(prev, expected) <= 1e-6
    a = float(diffusion.sqrt_recip_alphas_cumprod[t])
    bound = 4 * torch.finfo(torch.float32).eps * max(1.0, a) * float(x.abs().max())
    assert float((x0 - expected_x0).abs().max()) <= bound


@pytest.mark.parametrize(
    "case", all_pairs({**PROCESSES, "loss_reduction": ["mean", "none"], "noise": [None, 3]}), ids=case_id
)
def test_loss_is_the_originals_over_all_pairs_of_settings(original: Any, case: dict[str, Any]) -> None:
    theirs, ours = pair(original, **{name: case[name] for name in PROCESSES})
    t = torch.tensor([0, 1, case["timesteps"] // 2, case["timesteps"] - 1])
    results = []
    for diffusion in (theirs, ours):
        noise = None if case["noise"] is None else images(case["noise"]) * 2 - 1
        torch.manual_seed(2)
        loss = diffusion.p_losses(images(6) * 2 - 1, t, noise, loss_reduction=case["loss_reduction"])
        results.append((loss.detach(), torch.get_rng_state()))
    assert results[1][0].shape == results[0][0].shape
    assert relative(results[1][0], results[0][0]) <= 1e-6
    assert torch.equal(results[1][1], results[0][1])


def test_p_sample_of_channels_last_draws_in_memory_order(original: Any) -> None:
    x = images(4) * 4 - 2
    results = []
    for diffusion in pair(original):
        torch.manual_seed(11)
        results.append(diffusion.p_sample(x.to(memory_format=torch.channels_last), 20)[0])
    assert torch.equal(*results)
    torch.manual_seed(11)
    assert not torch.equal(results[0], diffusion.p_sample(x, 20)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_of_a_bfloat16_network_is_the_originals_bits(original: Any, objective: str) -> None:
    low, arguments = Cast(torch.bfloat16), options(objective=objective)
    theirs, ours = original.GaussianDiffusion(low, **arguments), GaussianDiffusion(low, **arguments)
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(11)
        results.append(diffusion.p_sample(images(4) * 4 - 2, 20))
    assert torch.equal(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1].float())


@pytest.mark.parametrize(("objective", "schedule"), list(zip(OBJECTIVES, SCHEDULES, strict=True)))
def test_sample_is_the_originals_over_1000_steps(original: Any, objective: str, schedule: str) -> None:
    theirs, ours = pair(original, timesteps=1000, objective=objective, beta_schedule=schedule)
    expected, expected_state = seeded_sample(theirs, batch_size=2)
    actual, state = seeded_sample(ours, batch_size=2)
    assert float((actual - expected).abs().max()) <= 1e-4
    assert torch.equal(state, expected_state)


def seeded_sample(diffusion: Any, **call: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    return diffusion.sample(**call), torch.get_rng_state()


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_is_the_originals_with_the_same_draws(
    original: Any, schedule: str, objective: str, eta: float, steps: int
) -> None:
    theirs, ours = pair(
        original, objective=objective, beta_schedule=schedule, sampling_timesteps=steps, ddim_sampling_eta=eta
    )
    expected, expected_state = seeded_sample(theirs, batch_size=2)
    actual, state = seeded_sample(ours, batch_size=2)
    assert relative(actual, expected) <= 2e-5
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_ddim_step_is_within_1e6_of_the_original(original: Any, schedule: str, objective: str) -> None:
    theirs, ours = pair(
        original,
        timesteps=1000,
        objective=objective,
        beta_schedule=schedule,
        sampling_timesteps=250,
        ddim_sampling_eta=0.5,
    )
    # The states of the original run, each advanced by one step of ours: row i of the table.
    states = seeded_sample(theirs, batch_size=2, return_all_timesteps=True)[0] * 2 - 1
    table = ours._cached("ddim", ddim_builder(), objective, 250, 0.5)
    torch.manual_seed(5)
    torch.randn(2, 3, SIZE, SIZE)
    for i, t in enumerate(table.timesteps.tolist()):
        z = torch.randn(2, 3, SIZE, SIZE) if i < 249 else torch.zeros(())
        if i % 20 and i < 240:
            continue
        step = ours_step(ours, table, i, states[:, i], t, z)
        assert relative(step, states[:, i + 1]) <= 1e-6, t


def ddim_builder() -> Any:
    from fastddpm.integrations.lucidrains.tables import ddim_table

    return ddim_table


def ours_step(diffusion: GaussianDiffusion, table: Any, i: int, x: Tensor, t: int, z: Tensor) -> Tensor:
    from fastddpm import ops

    with torch.no_grad():
        output = diffusion.model(x, torch.full((len(x),), t))
        return ops.p_sample(x, output, table.rows, torch.tensor([i]), z.expand_as(x).contiguous(), clip=True)


@pytest.mark.parametrize("steps", [None, 6])
def test_return_all_timesteps_is_the_originals(original: Any, steps: int | None) -> None:
    theirs, ours = pair(original, timesteps=21, sampling_timesteps=steps)
    expected, _ = seeded_sample(theirs, batch_size=2, return_all_timesteps=True)
    actual, _ = seeded_sample(ours, batch_size=2, return_all_timesteps=True)
    assert actual.shape == expected.shape == (2, (steps or 21) + 1, 3, SIZE, SIZE)
    assert relative(actual, expected) <= 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_training_loss_and_gradients_are_the_originals_bits(original: Any, objective: str, reduction: str) -> None:
    theirs, ours = pair(original, objective=objective, min_snr_loss_weight=True, offset_noise_strength=0.1)
    results = []
    for diffusion in (theirs, ours):
        torch.manual_seed(2)
        diffusion.model.zero_grad()
        loss = diffusion(images(6), loss_reduction=reduction)
        loss.sum().backward()
        results.append((loss.detach(), diffusion.model.weight.grad.clone(), torch.get_rng_state()))
    assert_same(results[1], results[0], objective)


def test_sample_with_active_dropout_draws_as_the_original(original: Any) -> None:
    net = Net(dropout=0.5).train()
    arguments = options(timesteps=21)
    theirs, ours = original.GaussianDiffusion(net, **arguments), GaussianDiffusion(net, **arguments)
    assert torch.equal(seeded_sample(ours, batch_size=2)[0], seeded_sample(theirs, batch_size=2)[0])


def test_sample_of_the_originals_unet_and_checkpoint(original: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    theirs = original.GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20)).eval()
    torch.save({"step": 1, "model": theirs.state_dict()}, tmp_path / "model-1.pt")
    ours = GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20, beta_schedule="cosine"))
    ours.load_state_dict(torch.load(tmp_path / "model-1.pt", weights_only=True)["model"])
    expected, _ = seeded_sample(theirs, batch_size=2)
    assert float((seeded_sample(ours.eval(), batch_size=2)[0] - expected).abs().max()) <= 1e-5
    again = original.GaussianDiffusion(original.Unet(dim=8, dim_mults=(1, 2)), **options(timesteps=20))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(seeded_sample(again.eval(), batch_size=2)[0], expected)


def test_accelerate_takes_over_a_live_instance(original: Any) -> None:
    theirs, _ = pair(original, sampling_timesteps=10, ddim_sampling_eta=0.3, auto_normalize=False)
    ours = accelerate(theirs)
    assert isinstance(ours, GaussianDiffusion)
    assert ours.model is theirs.model
    assert relative(seeded_sample(ours, batch_size=2)[0], seeded_sample(theirs, batch_size=2)[0]) <= 1e-5
    assert ours.training == theirs.training
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert accelerate(ours) is ours


def test_accelerate_refuses_what_it_would_change(original: Any) -> None:
    class Changed(original.GaussianDiffusion):
        pass

    with pytest.raises(TypeError, match=r"Changed.*load the state_dict"):
        accelerate(Changed(Net(), **options()))
    with pytest.raises(TypeError, match="Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match=r"immiscible.*denoising_diffusion_pytorch\.GaussianDiffusion"):
        accelerate(original.GaussianDiffusion(Net(), **options(immiscible=True)))


def follow(message: str, line: int, **names: Any) -> Any:
    """Execute the import that an error's advice begins with, then its line of that number."""
    code = re.findall("`([^`]+)`", message)
    exec(code[0], names)
    return eval(code[line], names)


def drawn_by_the_original(sample: Callable[[], Tensor], shape: tuple[int, ...], steps: int) -> tuple[Tensor, ...]:
    """Return what the original samples, mapped to [-1, 1], and the x_T and z that it drew."""
    torch.manual_seed(3)
    expected = sample() * 2 - 1
    torch.manual_seed(3)
    x_T, *z = torch.randn(steps, *shape)
    return expected, x_T, torch.stack([*z, torch.zeros(shape)])


def test_advice_for_the_one_dimensional_diffusion_works(original: Any) -> None:
    one_dimensional = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")
    torch.manual_seed(0)
    net = one_dimensional.Unet1D(dim=8, dim_mults=(1, 2), channels=2).eval()
    diffusion = one_dimensional.GaussianDiffusion1D(net, seq_length=8, timesteps=20)
    with pytest.raises(TypeError, match="GaussianDiffusion1D") as refused:
        fastddpm.accelerate(diffusion)
    sampler = follow(str(refused.value), 1, fastddpm=fastddpm, diffusion=diffusion, shape=(2, 8))
    expected, x_T, z = drawn_by_the_original(lambda: diffusion.sample(3), (3, 2, 8), 20)
    assert relative(sampler.sample(x_T=x_T, noise=z), expected) <= 1e-5


def test_advice_for_the_classifier_free_diffusion_works(original: Any) -> None:
    classifier_free = pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")
    torch.manual_seed(0)
    net = classifier_free.Unet(dim=8, num_classes=3, dim_mults=(1, 2)).eval()
    diffusion = classifier_free.GaussianDiffusion(net, image_size=SIZE, timesteps=20)
    with pytest.raises(TypeError, match="classifier_free_guidance") as refused:
        fastddpm.accelerate(diffusion)
    sampler = follow(str(refused.value), 2, fastddpm=fastddpm, diffusion=diffusion, shape=(3, SIZE, SIZE))
    classes = torch.tensor([0, 2])
    options = {"cond_scale": 3.0, "rescaled_phi": 0.7}
    shape = (2, 3, SIZE, SIZE)
    expected, x_T, z = drawn_by_the_original(lambda: diffusion.sample(classes, **options), shape, 20)
    actual = sampler.sample(x_T=x_T, noise=z, model_kwargs={"classes": classes, **options})
    assert relative(actual, expected) <= 1e-5


def test_network_in_data_parallel_is_looked_through() -> None:
    plain, wrapped = (GaussianDiffusion(Net().eval(), **options(sampling_timesteps=5)) for _ in range(2))
    wrapped.model = nn.DataParallel(wrapped.model)
    assert torch.equal(wrapped.sample(seeds=[1, 2]), plain.sample(seeds=[1, 2]))
    around = GaussianDiffusion(nn.DataParallel(Net().eval()), **options(sampling_timesteps=5))
    assert torch.equal(around.sample(seeds=[1, 2]), plain.sample(seeds=[1, 2]))


def test_accelerate_takes_a_live_instance_whose_network_was_wrapped(original: Any) -> None:
    theirs, _ = pair(original, sampling_timesteps=5)
    theirs.model = nn.DataParallel(theirs.model)
    ours = accelerate(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    results = [seeded_sample(diffusion, batch_size=2) for diffusion in (theirs, ours)]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-5)


def test_unknown_arguments_are_named_at_once() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options())
    with pytest.raises(TypeError, match=r"'compil'.*did you mean 'compile'"):
        accelerate(diffusion, compil=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'sedes'"):
        diffusion.sample(sedes=[1])  # type: ignore[call-arg]


def test_bad_input_raises_what_the_original_raises(original: Any) -> None:
    for changes in (
        {"objective": "pred_w"},
        {"beta_schedule": "quadratic"},
        {"image_size": (8, 8, 8)},
        {"sampling_timesteps": 51},
        {"schedule_fn_kwargs": {"gamma": 1}},
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            original.GaussianDiffusion(Net(), **options(**changes))
        with pytest.raises(type(theirs.value)):
            GaussianDiffusion(Net(), **options(**changes))
    with pytest.raises(AssertionError, match="height and width of image must be"):
        GaussianDiffusion(Net(), **options())(torch.zeros(1, 3, 4, 8))


# By hand, with nothing but the papers.


def test_sigmoid_schedule_has_the_known_alpha_bars() -> None:
    bar = GaussianDiffusion(Net(), image_size=SIZE).state_dict()["alphas_cumprod"]
    for t, expected in ((0, 0.9996997), (500, 0.4983428), (999, 3.003e-7)):
        assert float(bar[t]) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_p_sample_matches_the_papers_form_in_float64(objective: str) -> None:
    diffusion = GaussianDiffusion(Net().double(), **options(objective=objective, beta_schedule="cosine"))
    schedule = Schedule.cosine(50)
    x, z = torch.randn(2, 4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = GaussianDiffusion(Net(), **options(objective=objective, beta_schedule="cosine"))
    for t in (49, 25, 1, 0):
        with torch.no_grad():
            output = diffusion.model(x, torch.full((4,), t))
        expected = reference.p_sample(x, output, t, schedule, z, prediction_type=PREDICTION[objective])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: z.to(x.dtype))
            actual, _ = fast.p_sample(x.float(), t)
        # float32 tables and states against float64: x_0 is ill-conditioned at t = T - 1, where |a| = 1e4.
        assert relative(actual.double(), expected) <= 5e-4, t


def test_losses_are_the_weighted_errors_by_hand() -> None:
    weights = {"pred_noise": lambda snr: 1.0, "pred_x0": lambda snr: snr, "pred_v": lambda snr: snr / (snr + 1)}
    x_0, eps = images(1, batch=1).double() * 2 - 1, torch.randn(1, 3, SIZE, SIZE).double()
    for objective in OBJECTIVES:
        diffusion = GaussianDiffusion(Net().double(), **options(objective=objective, beta_schedule="cosine"))
        bar = float(Schedule.cosine(50).alphas_cumprod[20])
        x_t = math.sqrt(bar) * x_0 + math.sqrt(1 - bar) * eps
        v = math.sqrt(bar) * eps - math.sqrt(1 - bar) * x_0
        target = {"pred_noise": eps, "pred_x0": x_0, "pred_v": v}[objective]
        t = torch.tensor([20])
        with torch.no_grad():
            expected = weights[objective](bar / (1 - bar)) * (diffusion.model(x_t, t) - target).square().mean()
            loss = diffusion.p_losses(x_0, t, noise=eps)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_ddim_timesteps_truncate_towards_zero() -> None:
    assert ddim_timesteps(1000, 10) == [*range(999, -1, -100), -1]
    assert ddim_timesteps(1000, 3) == [999, 665, 332, -1]


def test_ddim_with_eta_zero_walks_to_the_clipped_x0() -> None:
    diffusion = GaussianDiffusion(Net(), **options(sampling_timesteps=1, auto_normalize=False, objective="pred_x0"))
    torch.manual_seed(0)
    x_T = torch.randn(2, 3, SIZE, SIZE)
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(diffusion.sample(2), diffusion.model(x_T, torch.tensor([49, 49])).clamp(-1, 1))


@pytest.mark.parametrize("changes", [{}, {"sampling_timesteps": 10, "ddim_sampling_eta": 0.5}], ids=["ddpm", "ddim"])
def test_seeds_give_the_same_images_in_any_batch(changes: dict[str, Any]) -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(**changes))
    state = torch.get_rng_state()
    batch = diffusion.sample(seeds=[3, 2**64 - 1, 3])
    assert torch.equal(batch[0], batch[2])
    assert not torch.equal(batch[0], batch[1])
    assert torch.allclose(diffusion.sample(seeds=[2**64 - 1])[0], batch[1], atol=1e-5)
    ids = diffusion.sample(seed=3, sample_ids=[0, 5])
    assert torch.allclose(ids[0], batch[0], atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_p_sample_with_seeds_continues_a_seeded_run() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(auto_normalize=False))
    states = diffusion.sample(seeds=[1, 2], return_all_timesteps=True)
    x = states[:, 40]
    for t in range(9, -1, -1):
        x, x_start = diffusion.p_sample(x, t, seeds=[1, 2])
    assert torch.equal(x, states[:, -1])
    assert torch.equal(x_start, x.clamp(-1, 1))


def test_seed_arguments_that_contradict_each_other_are_refused() -> None:
    diffusion = GaussianDiffusion(Net(), **options())
    for call, message in (
        ({"seeds": [1], "seed": 2}, "seed"),
        ({"sample_ids": [1]}, "pass seed="),
        ({"batch_size": 3, "seeds": [1, 2]}, "batch of 3|2"),
        ({"seeds": [-1]}, "-1"),
        ({"seed": 1, "sample_ids": [2**32]}, str(2**32)),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion.sample(**call)


def test_options_and_buffers_changed_later_are_noticed() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options(beta_schedule="cosine"))
    first = diffusion.sample(seeds=[1])
    diffusion.is_ddim_sampling, diffusion.sampling_timesteps = True, 5
    assert not torch.equal(diffusion.sample(seeds=[1]), first)
    diffusion.is_ddim_sampling = False
    assert torch.equal(diffusion.sample(seeds=[1]), first)
    other = GaussianDiffusion(diffusion.model, **options(beta_schedule="sigmoid"))
    diffusion.load_state_dict(other.state_dict())
    assert torch.equal(diffusion.sample(seeds=[1]), other.sample(seeds=[1]))
    with torch.no_grad():
        diffusion.model.weight.mul_(0.5)
    assert not torch.equal(diffusion.sample(seeds=[1]), first)


def test_copies_and_pickles_sample_the_same_after_a_run() -> None:
    diffusion = GaussianDiffusion(Net().eval(), **options())
    expected = diffusion.sample(seeds=[1])
    for twin in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert torch.equal(twin.sample(seeds=[1]), expected)
        assert set(twin.state_dict()) == {"model.weight", *BUFFERS}


def test_a_subclass_that_replaces_a_part_of_the_step_is_obeyed() -> None:
    class Still(GaussianDiffusion):
        def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x_start, torch.zeros(1), torch.full((1,), -1e9)

    diffusion = Still(Net().eval(), **options(auto_normalize=False))
    states = diffusion.sample(1, return_all_timesteps=True)
    for i in (0, 30):
        with torch.no_grad():
            output = diffusion.model(states[:, i], torch.tensor([49 - i]))
        x_start = diffusion.predict_start_from_v(states[:, i], torch.tensor([49 - i]), output).clamp(-1, 1)
        assert torch.equal(states[:, i + 1], x_start)


def test_sampling_is_possible_after_training_steps_and_before() -> None:
    diffusion = GaussianDiffusion(Net(), **options())
    diffusion.sample(1, seeds=[1])
    loss = diffusion(images())
    loss.backward()
    assert float(diffusion.model.weight.grad.abs().max()) > 0


def test_a_model_that_raises_keeps_its_exception() -> None:
    class Broken(Net):
        def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
            raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        GaussianDiffusion(Broken(), **options()).sample(1)


@pytest.mark.parametrize("name", ["p_sample", "forward"])
def test_methods_trace_into_one_graph(name: str) -> None:
    diffusion = GaussianDiffusion(Net(), **options())

    def call(x: Tensor) -> Tensor:
        return diffusion(x) if name == "forward" else diffusion.p_sample(x, 7)[0]

    torch._dynamo.reset()
    traced = torch.compile(call, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    actual = traced(images())
    torch.manual_seed(1)
    assert torch.allclose(actual, call(images()), atol=1e-6)


def test_unsupported_features_name_the_original() -> None:
    net = Net()
    net.self_condition = True  # type: ignore[assignment]
    named = r"denoising_diffusion_pytorch\.GaussianDiffusion"
    with pytest.raises(NotImplementedError, match=rf"self_condition.*{named}"):
        GaussianDiffusion(net, **options())
    with pytest.raises(NotImplementedError, match=rf"immiscible.*{named}"):
        GaussianDiffusion(Net(), **options(immiscible=True))
    diffusion, x = GaussianDiffusion(Net(), **options()), torch.zeros(1, 3, SIZE, SIZE)
    with pytest.raises(NotImplementedError, match=rf"interpolate.*{named}"):
        diffusion.interpolate(x, x)
    with pytest.raises(NotImplementedError, match=rf"self-conditioning.*{named}"):
        diffusion.p_sample(x, 3, x)


def test_linear_schedule_of_too_few_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beta = 2\.5.*cosine"):
        GaussianDiffusion(Net(), **options(timesteps=8, beta_schedule="linear"))


def test_sampler_options_reach_the_sampler() -> None:
    diffusion = accelerate(GaussianDiffusion(Net(), **options()), compile="nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        diffusion.sample(1)
