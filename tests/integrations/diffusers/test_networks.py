"""Which network a pipeline calls: ours on the UNet's parameters, or the UNet as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
)

from fastddpm.integrations import accelerate
from fastddpm.integrations.diffusers import (
    FastDDPMPipeline,
    native_unet,
)
from fastddpm.unet.inference import UNetInference
from fastddpm.unet.unet import UNet
from tests.integrations.diffusers.cases import (
    assert_same_images,
    generate,
    normal,
    quiet,
    tiny_unet,
)


def test_unet_in_data_parallel_is_looked_through() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    wrapped = DDPMPipeline(torch.nn.DataParallel(theirs.unet), DDPMScheduler())
    assert_same_images(quiet(accelerate(wrapped)), theirs, steps=3)
    fast = quiet(FastDDPMPipeline(tiny_unet(), DDPMScheduler()))
    fast.unet = torch.nn.DataParallel(theirs.unet)
    assert_same_images(fast, theirs, steps=3)


def test_compiled_unet_is_called_as_it_is() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    compiled = DDPMPipeline(torch.compile(theirs.unet, backend="eager"), DDPMScheduler())
    assert_same_images(quiet(accelerate(compiled)), theirs, steps=3)


def test_network_errors_reach_the_caller_as_they_were_raised() -> None:
    class Failing(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> None:
            raise KeyError("lost")

    unet = tiny_unet()
    unet.mid_block = Failing()
    with pytest.raises(KeyError, match="lost"):
        quiet(FastDDPMPipeline(unet, DDPMScheduler()))(num_inference_steps=2)


def test_pipeline_runs_half_precision_with_a_float32_state() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(), DDPMScheduler()))
    expected, _ = generate(theirs, 4)
    low = quiet(FastDDPMPipeline(tiny_unet().to(torch.bfloat16), DDPMScheduler()))
    actual, _ = generate(low, 4)
    assert actual.dtype == np.float32
    # The network alone rounds to 8 bits, and so does the noise that it is given.
    assert np.abs(actual - expected).mean() < 0.02


def test_native_unet_shares_parameters_and_computes_the_same() -> None:
    unet = tiny_unet(num_class_embeds=3, resnet_time_scale_shift="scale_shift")
    native = native_unet(unet)
    assert isinstance(native, UNet)
    theirs = dict(unet.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in native.named_parameters())
    x, t, labels = normal(2, 1, 8, 8, seed=1), torch.tensor([3, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        torch.testing.assert_close(native(x, t, labels), unet(x, t, labels).sample, rtol=1e-5, atol=1e-5)


def test_pipelines_run_the_sampling_form_of_a_unet_that_is_ours_too() -> None:
    fast = accelerate(quiet(DDPMPipeline(tiny_unet(), DDPMScheduler())))
    generate(fast, steps=2)
    sampler = fast._samplers.kept[0].sampler
    (step,) = sampler._steps._idle
    assert isinstance(step.network, UNetInference)


def test_native_unet_leaves_alone_what_it_cannot_express() -> None:
    assert native_unet(torch.nn.Linear(2, 2)) is None
    assert native_unet(tiny_unet(time_embedding_type="fourier")) is None
    assert native_unet(tiny_unet(class_embed_type="timestep")) is None
    hooked = tiny_unet()
    hooked.mid_block.register_forward_hook(lambda *_: None)
    assert native_unet(hooked) is None
    replaced = tiny_unet()
    replaced.conv_out = torch.nn.Sequential(replaced.conv_out)
    assert native_unet(replaced) is None
    patched = tiny_unet()
    patched.conv_in.forward = lambda x: x
    assert native_unet(patched) is None


def test_whole_loop_takes_any_unet2d_model() -> None:
    theirs = quiet(DDPMPipeline(tiny_unet(time_embedding_type="fourier"), DDPMScheduler()))
    fast = accelerate(theirs)
    assert_same_images(fast, theirs, steps=4)
    assert fast._native == (theirs.unet, None)
