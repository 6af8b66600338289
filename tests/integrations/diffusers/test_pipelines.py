"""diffusers' pipelines with our schedulers, and the pipelines that run the whole loop."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
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
    DiTPipeline,
    PNDMScheduler,
    UNet2DConditionModel,
)

from fastddpm.integrations import accelerate
from fastddpm.integrations.diffusers import (
    FastDDIMPipeline,
    FastDDIMScheduler,
    FastDDPMPipeline,
    FastDDPMScheduler,
    native_unet,
)
from fastddpm.sampling.sampler import StepResult
from fastddpm.unet.inference import UNetInference
from fastddpm.unet.unet import UNet
from tests.integrations.diffusers.cases import normal, tiny_dit_pipeline, tiny_unet

# Images in [0, 1] of whole loops, of the same seed.
LOOP_ATOL = 1e-4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, steps: int = 8, batch: int = 2, seed: int = 5, **options: Any) -> Any:
    """Draw images; return them and what the generator would draw next."""
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(
        batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np", **options
    ).images
    return images, generator.get_state()


def assert_same_images(ours: Any, theirs: Any, steps: int = 8, **options: Any) -> None:
    (actual, left), (expected, expected_left) = (generate(pipe, steps, **options) for pipe in (ours, theirs))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LOOP_ATOL)
    assert torch.equal(left, expected_left)


DDPM_VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "trailing-large": ({"timestep_spacing": "trailing", "variance_type": "fixed_large"}, {}),
    "offset": ({"steps_offset": 1}, {}),
    "learned_range": ({"variance_type": "learned_range"}, {"out_channels": 2}),
    "v-snr": ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
    "epsilon-snr": ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    "sample-free": ({"prediction_type": "sample", "clip_sample": False}, {}),
    "dynamic": ({"thresholding": True}, {}),
}
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


def test_unet_with_labels_of_its_own_runs_as_in_diffusers() -> None:
    unet, labels = tiny_unet(num_class_embeds=4), torch.tensor([0, 3])
    forward = unet.forward
    unet.forward = lambda x, t, **options: forward(x, t, class_labels=labels, **options)
    images, state = generate(quiet(FastDDPMPipeline(unet, DDPMScheduler())))
    expected, expected_state = generate(quiet(DDPMPipeline(unet, DDPMScheduler())))
    np.testing.assert_allclose(images, expected, rtol=0, atol=LOOP_ATOL)
    assert torch.equal(state, expected_state)


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


def test_network_errors_reach_the_caller_as_they_were_raised() -> None:
    class Failing(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> None:
            raise KeyError("lost")

    unet = tiny_unet()
    unet.mid_block = Failing()
    with pytest.raises(KeyError, match="lost"):
        quiet(FastDDPMPipeline(unet, DDPMScheduler()))(num_inference_steps=2)


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
    ((step, _),) = sampler._steps._idle
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


def test_conditional_pipeline_runs_with_our_scheduler() -> None:
    theirs = quiet(tiny_dit_pipeline())
    ours = accelerate(theirs)
    assert type(ours) is DiTPipeline
    assert isinstance(ours.scheduler, FastDDIMScheduler)
    assert type(theirs.scheduler) is DDIMScheduler
    images = [
        pipe([1, 3], generator=torch.Generator().manual_seed(1), num_inference_steps=5, output_type="np").images
        for pipe in (ours, theirs)
    ]
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
