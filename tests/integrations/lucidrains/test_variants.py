"""GaussianDiffusion1D and the classifier-free GaussianDiffusion, against the installed package."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastddpm
from fastddpm.integrations.lucidrains import GaussianDiffusion, GaussianDiffusion1D
from fastddpm.integrations.lucidrains import classifier_free_guidance as ours_classifier_free
from fastddpm.integrations.lucidrains.tables import OBJECTIVES
from tests.integrations.lucidrains.cases import SIZE, both, images, relative
from tests.ops.pairs import all_pairs, case_id

pytestmark = pytest.mark.filterwarnings("ignore:the schedule does not end near a Gaussian")

SETTINGS = {"objective": list(OBJECTIVES), "sampling_timesteps": [None, 5, 1], "ddim_sampling_eta": [0.0, 0.6]}


@pytest.fixture(scope="module")
def one_dimensional(original: Any) -> Any:
    return pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")


@pytest.fixture(scope="module")
def classifier_free(original: Any) -> Any:
    return pytest.importorskip("denoising_diffusion_pytorch.classifier_free_guidance")


class Sequences(nn.Module):
    """A network of sequences in either layout, with a condition of its own."""

    def __init__(self, channel_first: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1)
        self.channels, self.self_condition, self.channel_first = 2, False, channel_first

    def forward(self, x: Tensor, t: Tensor, level: Tensor | None = None) -> Tensor:
        h = x if self.channel_first else x.mT
        h = torch.tanh(self.conv(h) + 0.01 * t.float()[:, None, None])
        h = h if level is None else h + level[:, None, None]
        return h if self.channel_first else h.mT.contiguous()


@pytest.mark.parametrize(
    "case",
    all_pairs({**SETTINGS, "channel_first": [True, False], "auto_normalize": [True, False], "level": [None, 0.3]}),
    ids=case_id,
)
def test_sequences_are_the_originals(one_dimensional: Any, case: dict[str, Any]) -> None:
    settings = {name: value for name, value in case.items() if name != "level"}
    torch.manual_seed(0)
    net = Sequences(case["channel_first"]).eval()
    theirs = one_dimensional.GaussianDiffusion1D(net, seq_length=SIZE, timesteps=8, **settings)
    ours = GaussianDiffusion1D(net, seq_length=SIZE, timesteps=8, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.rand(3, *((2, SIZE) if case["channel_first"] else (SIZE, 2)))
    level = None if case["level"] is None else {"level": torch.full((3,), case["level"])}
    kwargs = {} if level is None else {"model_forward_kwargs": level}
    for diffusion in (ours, fastddpm.accelerate(theirs)):
        drawn = both(diffusion, theirs, "sample", 3, **kwargs)
        assert drawn.shape == x.shape
    both(ours, theirs, "interpolate", x, x.flip(0), t=6, lam=0.3)
    both(ours, theirs, "p_sample", x, 5, clip_denoised=False, **kwargs)
    with torch.no_grad():
        both(ours, theirs, "forward", x, **kwargs)
        both(ours, theirs, "forward", x, return_reduced_loss=False, times=torch.tensor([0, 4, 7]))
    with pytest.raises(AssertionError, match="seq length"):
        ours(x.repeat_interleave(2, ours.seq_index))


def test_sequences_return_their_x_T(one_dimensional: Any) -> None:
    ours = GaussianDiffusion1D(Sequences().eval(), seq_length=SIZE, timesteps=8, sampling_timesteps=5)
    torch.manual_seed(2)
    _, x_T = ours.sample(3, return_noise=True)
    torch.manual_seed(2)
    assert torch.equal(x_T, torch.randn(3, 2, SIZE))
    assert relative(ours.sample(seeds=[4, 5])[1], ours.sample(seeds=[5])[0]) <= 1e-5
    with pytest.raises(TypeError, match="go by name: return_noise="):
        ours.sample(3, True)


@pytest.mark.parametrize("case", all_pairs({**SETTINGS, "auto_normalize": [True, False]}), ids=case_id)
@pytest.mark.parametrize("sequences", [False, True])
def test_self_conditioned_samples_are_the_originals(
    original: Any, one_dimensional: Any, sequences: bool, case: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    if sequences:
        net = one_dimensional.Unet1D(dim=8, dim_mults=(1,), channels=2, self_condition=True).eval()
        kinds, size = (one_dimensional.GaussianDiffusion1D, GaussianDiffusion1D), {"seq_length": SIZE}
    else:
        net = original.Unet(dim=8, dim_mults=(1,), channels=2, self_condition=True).eval()
        kinds, size = (original.GaussianDiffusion, GaussianDiffusion), {"image_size": SIZE}
    theirs, ours = (kind(net, **size, timesteps=8, **case) for kind in kinds)
    x = torch.rand(3, *ours._shape)
    for diffusion in (ours, fastddpm.accelerate(theirs)):
        both(diffusion, theirs, "sample", 3)
    both(ours, theirs, "p_sample", x, 5, x.flip(0))
    both(ours, theirs, "interpolate", x, x.flip(0), t=6, lam=0.3)
    # Step by step, as a subclass that replaces a part of the step is run.
    part = {"q_posterior": lambda self, *a, **k: kinds[1].q_posterior(self, *a, **k)}
    both(type("Stepwise", (kinds[1],), part)(net, **size, timesteps=8, **case), theirs, "sample", 3)
    plain = copy.copy(ours)
    plain.self_condition = False
    torch.manual_seed(5)
    differs = relative(plain.sample(3), both(ours, theirs, "sample", 3)) > 1e-4
    assert differs == (case["sampling_timesteps"] != 1)
    losses: list[float] = []
    for seed in (0, 1):  # one below a half, one above
        for diffusion in (ours, theirs):
            random.seed(seed)
            torch.manual_seed(5)
            losses.append(diffusion(x, times=torch.tensor([0, 4, 7])).item())
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-5)
    assert losses[0] != losses[2]


@pytest.mark.parametrize("case", all_pairs({**SETTINGS, "cond_scale": [3.0, 6.0], "phi": [0.0, 0.7]}), ids=case_id)
def test_classifier_free_images_are_the_originals(classifier_free: Any, case: dict[str, Any]) -> None:
    settings = {name: case[name] for name in SETTINGS}
    torch.manual_seed(0)
    net = classifier_free.Unet(dim=8, num_classes=3, dim_mults=(1,), attn_heads=1).eval()
    theirs = classifier_free.GaussianDiffusion(net, image_size=SIZE, timesteps=8, **settings)
    ours = ours_classifier_free.GaussianDiffusion(net, image_size=SIZE, timesteps=8, **settings)
    classes, x = torch.tensor([0, 2]), images(batch=2)
    scales = {"cond_scale": case["cond_scale"], "rescaled_phi": case["phi"]}
    for diffusion in (ours, fastddpm.accelerate(copy.copy(theirs))):
        both(diffusion, theirs, "sample", classes, **scales)
    both(ours, theirs, "interpolate", x, x.flip(0), classes, t=5, lam=0.3)
    both(ours, theirs, "p_sample", x, 5, classes, **scales)
    with torch.no_grad():
        both(ours, theirs, "forward", x, classes=classes, cond_keep_mask=torch.tensor([True, False]))


def test_classifier_free_guidance_of_one_means_none(classifier_free: Any) -> None:
    torch.manual_seed(0)
    net = classifier_free.Unet(dim=8, num_classes=3, dim_mults=(1,), attn_heads=1).eval()
    ours = ours_classifier_free.GaussianDiffusion(net, image_size=SIZE, timesteps=8, sampling_timesteps=2)
    classes = torch.tensor([0, 2])
    nearly = ours.sample(classes, cond_scale=1 + 1e-6, rescaled_phi=0.0, seeds=[1, 2])
    assert relative(ours.sample(classes, cond_scale=1.0, seeds=[1, 2]), nearly) <= 1e-4
    theirs = classifier_free.GaussianDiffusion(net, image_size=SIZE, use_cfg_plus_plus=True)
    with pytest.raises(NotImplementedError, match="use_cfg_plus_plus"):
        fastddpm.accelerate(theirs)


def test_a_subclass_that_replaces_the_step_is_obeyed(classifier_free: Any) -> None:
    class Halved(ours_classifier_free.GaussianDiffusion):
        def p_sample(self, x: Tensor, t: int, classes: Tensor, *scales: float, **options: Any) -> Any:  # type: ignore[override]
            x, x_start = super().p_sample(x, t, classes, *scales, **options)
            return x / 2, x_start

    torch.manual_seed(0)
    net = classifier_free.Unet(dim=8, num_classes=3, dim_mults=(1,), attn_heads=1).eval()
    arguments = {"image_size": SIZE, "timesteps": 1}
    plain, halved = (kind(net, **arguments) for kind in (ours_classifier_free.GaussianDiffusion, Halved))
    expected = (plain.sample(torch.tensor([1]), seeds=[3]) * 2 - 1) / 2
    torch.testing.assert_close(halved.sample(torch.tensor([1]), seeds=[3]) * 2 - 1, expected)
