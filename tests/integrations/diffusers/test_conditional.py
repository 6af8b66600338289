"""Labels, guidance and conditional pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    UNet2DConditionModel,
)

from fastddpm.integrations import accelerate
from fastddpm.integrations.diffusers import (
    FastDDPMPipeline,
    FastDDPMScheduler,
)
from fastddpm.integrations.diffusers.schedulers import FAST_FORM
from tests.integrations.diffusers.cases import (
    DDPM_VARIANTS,
    LOOP_ATOL,
    generate,
    normal,
    quiet,
    tiny_dit_pipeline,
    tiny_unet,
)


def test_class_labels_reach_the_network() -> None:
    unet = tiny_unet(num_class_embeds=4)
    fast = quiet(FastDDPMPipeline(unet, DDPMScheduler()))
    labelled = fast(seeds=[1, 1], class_labels=[0, 3], num_inference_steps=4, output_type="np").images
    assert np.abs(labelled[0] - labelled[1]).max() > 1e-3
    one = fast(seeds=[1], class_labels=3, num_inference_steps=4, output_type="np").images
    np.testing.assert_allclose(one[0], labelled[1], rtol=0, atol=LOOP_ATOL)
    stepwise = quiet(FastDDPMPipeline(unet, DDPMScheduler(thresholding=True)))
    assert stepwise(seeds=[1, 2], class_labels=[0, 3], num_inference_steps=2, output_type="np").images.shape[0] == 2
    for pipe in (fast, DDPMPipeline(unet, DDPMScheduler())):
        with pytest.raises(ValueError, match="class_labels should be provided"):
            pipe(num_inference_steps=2)
    with pytest.raises(ValueError, match="no class embedding"):
        quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler()))(class_labels=1, num_inference_steps=2)


@pytest.mark.parametrize("variant", ["default", "learned_range", "dynamic"])
def test_guidance_mixes_the_predictions_with_and_without_a_label(variant: str) -> None:
    config, unet_options = DDPM_VARIANTS[variant]
    unet, w, label, null = tiny_unet(num_class_embeds=4, **unet_options), 2.5, 1, 3
    fast = accelerate(quiet(DDPMPipeline(unet, DDPMScheduler(**config))), null_class=null)
    images, state = generate(fast, steps=4, class_labels=label, guidance=w)
    generator, theirs = torch.Generator().manual_seed(5), DDPMScheduler(**config)
    theirs.set_timesteps(4)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    for t in theirs.timesteps:
        with torch.no_grad():
            m, m_null = (unet(x, t, class_labels=torch.full((2,), k)).sample for k in (label, null))
        m[:, :1] = m_null[:, :1] + w * (m[:, :1] - m_null[:, :1])
        x = theirs.step(m, t, x, generator=generator).prev_sample
    np.testing.assert_allclose(images[..., 0], (x[:, 0] / 2 + 0.5).clamp(0, 1), rtol=0, atol=LOOP_ATOL)
    assert torch.equal(state, generator.get_state())


def test_guidance_says_what_it_lacks() -> None:
    fast = quiet(FastDDPMPipeline(tiny_unet(num_class_embeds=4), DDPMScheduler()))
    for call, words in (
        ({"class_labels": 1, "guidance": 2.0}, r"null_class= to fastddpm\.accelerate"),
        ({"class_labels": 1, "guidance": float("nan")}, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            fast(num_inference_steps=2, **call)
    with pytest.raises(ValueError, match="needs class_labels"):
        quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler()))(num_inference_steps=2, guidance=2.0)


def test_unet_with_labels_of_its_own_runs_as_in_diffusers() -> None:
    unet, labels = tiny_unet(num_class_embeds=4), torch.tensor([0, 3])
    forward = unet.forward
    unet.forward = lambda x, t, **options: forward(x, t, class_labels=labels, **options)
    images, state = generate(quiet(FastDDPMPipeline(unet, DDPMScheduler())))
    expected, expected_state = generate(quiet(DDPMPipeline(unet, DDPMScheduler())))
    np.testing.assert_allclose(images, expected, rtol=0, atol=LOOP_ATOL)
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("original", FAST_FORM, ids=lambda original: original.__name__)
def test_conditional_pipeline_runs_with_our_scheduler(original: Any) -> None:
    theirs = quiet(tiny_dit_pipeline())
    theirs.scheduler = original.from_config(theirs.scheduler.config)
    ours = accelerate(theirs)
    assert type(ours) is DiTPipeline
    assert type(ours.scheduler) is FAST_FORM[original]
    assert type(theirs.scheduler) is original
    images = []
    for pipe in (ours, theirs):
        torch.manual_seed(1)
        images.append(pipe([1, 3], num_inference_steps=5, output_type="np").images)
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=LOOP_ATOL)


def test_conditional_unet_runs_in_a_guided_loop_with_our_scheduler() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=4,
    ).eval()
    prompts = normal(2, 3, 4, seed=1)
    images = []
    for scheduler in (FastDDPMScheduler(), DDPMScheduler()):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(1, 1, 8, 8, generator=generator)
        for t in scheduler.timesteps:
            with torch.no_grad():
                conditional, unconditional = unet(torch.cat([x, x]), t, prompts).sample.chunk(2)
            x = scheduler.step(unconditional + 3 * (conditional - unconditional), t, x, generator=generator).prev_sample
        images.append(x)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=LOOP_ATOL)
