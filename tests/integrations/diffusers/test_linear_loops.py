"""Whole loops of the multistep and Euler schedulers in accelerated pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UniPCMultistepScheduler

import fastddpm
from fastddpm.integrations.diffusers import (
    FastDDPMPipeline,
    FastDPMSolverMultistepScheduler,
    FastEulerAncestralDiscreteScheduler,
    FastEulerDiscreteScheduler,
    FastUniPCMultistepScheduler,
)
from fastddpm.integrations.diffusers.schedulers import FAST_FORM
from tests.integrations.diffusers.cases import quiet, tiny_unet

TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("fast", "config"),
    [
        (FastDPMSolverMultistepScheduler, {}),
        (FastDPMSolverMultistepScheduler, {"solver_order": 3, "prediction_type": "v_prediction"}),
        (FastDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (FastDPMSolverMultistepScheduler, {"thresholding": True}),
        (FastEulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
        (FastEulerAncestralDiscreteScheduler, {"prediction_type": "v_prediction"}),
    ],
)
def test_pipelines_draw_diffusers_images(fast: Any, config: dict[str, Any]) -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), fast._original(**config)))
    ours = fastddpm.accelerate(theirs)
    assert isinstance(ours, FastDDPMPipeline)
    for steps in (6, 9):
        results = []
        for pipe in (ours, theirs):
            generator = torch.Generator().manual_seed(5)
            images = pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="pt").images
            results.append((images, torch.randn(4, generator=generator)))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-4)
        assert torch.equal(results[0][1], results[1][1])
    assert (ours._samplers is None) == ("thresholding" in config)


@pytest.mark.parametrize("config", [{}, {"solver_order": 3}, {"disable_corrector": [1]}, {"solver_order": 1}])
def test_whole_loops_of_unipc_are_its_steps(config: dict[str, Any]) -> None:
    unet, theirs = tiny_unet(), FastUniPCMultistepScheduler._original(**config, prediction_type="v_prediction")
    # DDPMPipeline passes a generator, which UniPC's step does not take: diffusers itself cannot run it.
    fast = quiet(fastddpm.accelerate(DDPMPipeline(unet, theirs)))
    generator = torch.Generator().manual_seed(5)
    images = fast(batch_size=2, generator=generator, num_inference_steps=8, output_type="pt").images
    theirs.set_timesteps(8)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(unet(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    together = fast(seeds=[1, 2], num_inference_steps=8, output_type="pt").images
    alone = fast(seeds=[2], num_inference_steps=8, output_type="pt").images
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)


def test_seeds_work_wherever_a_step_is_linear() -> None:
    noisy_end = {"algorithm_type": "sde-dpmsolver++", **TO_SIGMA_MIN}
    images = []
    for scheduler_class in (FastDPMSolverMultistepScheduler, type("Custom", (FastDPMSolverMultistepScheduler,), {})):
        # A subclass may change the step, so the pipeline calls it.
        fast = quiet(FastDDPMPipeline(tiny_unet(), scheduler_class(**noisy_end)))
        images.append(fast(seeds=[1, 2], num_inference_steps=5, output_type="pt").images)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-4)
    thresholded = quiet(FastDDPMPipeline(tiny_unet(), FastDPMSolverMultistepScheduler(thresholding=True)))
    with pytest.raises(ValueError, match="pass a generator"):
        thresholded(seeds=[1], num_inference_steps=3)


@pytest.mark.usefixtures("still_generators")
@pytest.mark.parametrize("original", FAST_FORM, ids=lambda original: original.__name__)
def test_seeds_leave_every_global_generator_alone(original: Any) -> None:
    fast = quiet(fastddpm.accelerate(DDPMPipeline(tiny_unet(), original())))
    fast(seeds=[1, 2], num_inference_steps=3, output_type="pt")


# diffusers' own UniPC fails there: it solves a float64 system for a float32 right side.
@pytest.mark.parametrize(
    "original", [kind for kind in FAST_FORM if kind is not UniPCMultistepScheduler], ids=lambda kind: kind.__name__
)
def test_default_dtype_changes_nothing(original: Any) -> None:
    fast = quiet(fastddpm.accelerate(DDPMPipeline(tiny_unet(), original(prediction_type="v_prediction"))))
    expected = fast(seeds=[1, 2], num_inference_steps=3, output_type="pt").images
    torch.set_default_dtype(torch.float64)
    try:
        again = quiet(fastddpm.accelerate(DDPMPipeline(fast.unet, original(prediction_type="v_prediction"))))
        images = again(seeds=[1, 2], num_inference_steps=3, output_type="pt").images
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
