"""diffusers' pipelines with our schedulers, and the pipelines that run the whole loop."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
)

from fastddpm.integrations import accelerate
from fastddpm.integrations.diffusers import (
    FastDDIMPipeline,
    FastDDIMScheduler,
    FastDDPMPipeline,
    FastDDPMScheduler,
)
from fastddpm.sampling.sampler import StepResult
from tests.integrations.diffusers.cases import (
    DDPM_VARIANTS,
    LOOP_ATOL,
    assert_same_images,
    quiet,
    tiny_dit_pipeline,
    tiny_unet,
)

DDIM_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {"eta": 0.0}),
    "eta": ({"set_alpha_to_one": False}, {"eta": 0.8}),
    "clipped": ({"timestep_spacing": "linspace"}, {"eta": 1.0, "use_clipped_model_output": True}),
    "v": ({"prediction_type": "v_prediction"}, {"eta": 0.0}),
}


@pytest.mark.parametrize("variant", DDPM_VARIANTS)
def test_ddpm_pipelines_draw_diffusers_images(variant: str) -> None:
    config, unet_options = DDPM_VARIANTS[variant]
    theirs = quiet(DDPMPipeline(tiny_unet(**unet_options), DDPMScheduler(**config)))
    swapped = copy.copy(theirs)
    swapped.scheduler = FastDDPMScheduler.from_config(theirs.scheduler.config)
    assert_same_images(swapped, theirs)
    fast = accelerate(theirs)
    assert type(fast) is FastDDPMPipeline
    assert_same_images(fast, theirs)


@pytest.mark.parametrize("variant", DDIM_VARIANTS)
def test_ddim_pipelines_draw_diffusers_images(variant: str) -> None:
    config, options = DDIM_VARIANTS[variant]
    theirs = quiet(DDIMPipeline(tiny_unet(), DDIMScheduler(**config)))
    swapped = copy.copy(theirs)
    swapped.scheduler = FastDDIMScheduler.from_config(theirs.scheduler.config)
    assert_same_images(swapped, theirs, **options)
    fast = accelerate(theirs)
    assert type(fast) is FastDDIMPipeline
    assert_same_images(fast, theirs, **options)


def test_ddpm_pipeline_runs_a_ddim_scheduler_as_diffusers() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDIMScheduler()))
    fast = accelerate(theirs)
    assert isinstance(fast.scheduler, FastDDIMScheduler)
    assert_same_images(fast, theirs)


def test_lists_of_generators_and_the_global_one_draw_as_in_diffusers() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    images = []
    for pipe in (theirs, accelerate(theirs)):
        listed = [torch.Generator().manual_seed(s) for s in (1, 2)]
        torch.manual_seed(3)
        first = pipe(batch_size=2, generator=listed, num_inference_steps=4, output_type="pt").images
        second = pipe(batch_size=2, num_inference_steps=4, output_type="pt", return_dict=False)[0]
        images.append(torch.cat([first, second]))
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=LOOP_ATOL)


def test_output_types_are_those_of_diffusers() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    for output_type in ("pil", "np", "pt"):
        kinds = []
        for pipe in (theirs, accelerate(theirs)):
            images = pipe(
                generator=torch.Generator().manual_seed(1), num_inference_steps=2, output_type=output_type
            ).images
            first = images[0]
            kinds.append((type(images), type(first), getattr(first, "shape", None) or first.size))
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["whole-loop", "step-by-step"])
def test_image_of_a_seed_does_not_depend_on_its_batch(config: dict[str, Any]) -> None:
    fast = quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler(**config)))
    together = fast(seeds=[7, 8, 7], num_inference_steps=4, output_type="np").images
    alone = fast(seeds=8, num_inference_steps=4, output_type="np").images
    np.testing.assert_allclose(together[1], alone[0], rtol=0, atol=LOOP_ATOL)
    np.testing.assert_allclose(together[0], together[2], rtol=0, atol=LOOP_ATOL)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_whole_loop_and_steps_agree_on_seeds() -> None:
    class Custom(FastDDPMScheduler):
        """A subclass may change the step, so the pipeline calls it."""

    config = {"timestep_spacing": "trailing", "variance_type": "fixed_large"}
    images = []
    for scheduler_class in (FastDDPMScheduler, Custom):
        fast = quiet(FastDDPMPipeline(tiny_unet(), scheduler_class(**config)))
        images.append(fast(seeds=[1, 2], num_inference_steps=5, output_type="np").images)
        assert (fast._samplers is not None) == (scheduler_class is FastDDPMScheduler)
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=LOOP_ATOL)


@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["whole-loop", "step-by-step"])
def test_callback_sees_every_step_and_may_edit_it(config: dict[str, Any]) -> None:
    fast = quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler(**config)))
    seen: list[tuple[int, float]] = []

    def callback(result: StepResult) -> None:
        assert result.x0 is not None
        assert float(result.x0.abs().max()) <= 1.0
        seen.append((result.index, result.t))
        if result.index == 3:
            result.x_t.fill_(0.5)

    images = fast(seeds=[1, 2], num_inference_steps=4, output_type="np", callback=callback).images
    assert seen == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert np.all(images == 0.75)


def test_pipelines_refuse_what_diffusers_refuses_with_its_exception() -> None:
    short = [torch.Generator()]
    short_of_three = [torch.Generator(), torch.Generator()]
    for pipe in (DDPMPipeline(tiny_unet(), DDPMScheduler()), FastDDPMPipeline(tiny_unet(), DDPMScheduler())):
        quiet(pipe)
        with pytest.raises(IndexError):
            pipe(batch_size=3, generator=short_of_three, num_inference_steps=2)
        with pytest.raises(ValueError, match="1001"):
            pipe(num_inference_steps=1001)
    for pipe in (DDIMPipeline(tiny_unet(), DDIMScheduler()), FastDDIMPipeline(tiny_unet(), DDIMScheduler())):
        with pytest.raises(ValueError, match="batch size of 3"):
            quiet(pipe)(batch_size=3, generator=short, num_inference_steps=2)


def test_pipeline_refuses_two_sources_of_noise_and_foreign_schedulers() -> None:
    fast = quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler()))
    with pytest.raises(ValueError, match="seeds and generator"):
        fast(seeds=[1], generator=torch.Generator(), num_inference_steps=2)
    with pytest.raises(ValueError, match="batch size of 3"):
        fast(seeds=[1, 2], batch_size=3, num_inference_steps=2)
    with pytest.raises(ValueError, match="seed"):
        fast(seeds=[-1], num_inference_steps=2)
    fast.scheduler = PNDMScheduler()
    with pytest.raises(TypeError, match="PNDMScheduler"):
        fast(num_inference_steps=2)


def test_pipeline_follows_weights_schedulers_and_copies() -> None:
    unet = tiny_unet()
    fast = quiet(FastDDPMPipeline(unet, DDPMScheduler()))
    theirs = quiet(DDPMPipeline(unet, DDPMScheduler()))
    assert_same_images(fast, theirs, steps=3)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
    assert_same_images(fast, theirs, steps=3)
    unet.load_state_dict(tiny_unet().state_dict(), assign=True)
    assert_same_images(fast, theirs, steps=3)
    for pipe in (fast, theirs):
        pipe.scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert_same_images(fast, theirs, steps=3)
    assert_same_images(copy.deepcopy(fast), theirs, steps=3)
    assert_same_images(pickle.loads(pickle.dumps(fast)), theirs, steps=3)
    assert len(fast._samplers.kept) <= 2


@pytest.mark.parametrize("config", [{}, {"thresholding": True}], ids=["whole-loop", "step-by-step"])
def test_threads_that_share_a_pipeline_get_the_steps_that_they_asked_for(config: dict[str, Any]) -> None:
    fast = quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler(**config)))
    counts = [2, 3, 4, 5] * 2

    def draw(steps: int) -> torch.Tensor:
        return fast(seeds=[steps], num_inference_steps=steps, output_type="pt").images

    expected = {steps: draw(steps) for steps in set(counts)}
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(draw, counts))
    for steps, images in zip(counts, drawn, strict=True):
        assert torch.equal(images, expected[steps])


def test_accelerate_takes_schedulers_and_refuses_the_rest() -> None:
    theirs = DDIMScheduler()
    theirs.set_timesteps(5)
    theirs.alphas_cumprod = theirs.alphas_cumprod**2
    ours = accelerate(theirs)
    assert type(ours) is FastDDIMScheduler
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert accelerate(ours) is ours
    fast = accelerate(DDPMPipeline(tiny_unet(), DDPMScheduler()), check_finite=True)
    assert fast._options == {"check_finite": True}
    assert accelerate(fast, backend="torch")._options == {"backend": "torch"}
    for target, options, words in (
        (PNDMScheduler(), {}, "PNDMScheduler"),
        (DDPMPipeline(tiny_unet(), PNDMScheduler()), {}, "PNDMScheduler"),
        (tiny_unet(), {}, "UNet2DModel"),
        (theirs, {"compile": True}, "takes no options"),
        (tiny_dit_pipeline(), {"compile": True}, r"pipe\.transformer = torch\.compile"),
        (DDPMPipeline(tiny_unet(), DDPMScheduler()), {"compil": True}, r"'compil'.*did you mean 'compile'"),
        (tiny_dit_pipeline(), {"compil": True}, "did you mean 'compile'"),
        (object(), {}, "builtins.object"),
    ):
        with pytest.raises(TypeError, match=words):
            accelerate(target, **options)
