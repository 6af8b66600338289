"""Steps of the fast schedulers under torch.compile(fullgraph=True), and without a read from the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch._dynamo.testing import CompileCounterWithBackend

from fastddpm.integrations.diffusers import FastDDIMScheduler, FastDDPMScheduler
from fastddpm.integrations.diffusers.schedulers import fast_scheduler
from tests.integrations.diffusers.cases import SHAPE, normal, tiny_dit_pipeline, tiny_unet

VARIANTS = {
    "ddpm": (FastDDPMScheduler, {}, {}),
    "learned_range": (FastDDPMScheduler, {"variance_type": "learned_range"}, {}),
    "learned": (FastDDPMScheduler, {"variance_type": "learned"}, {}),
    "dynamic": (FastDDPMScheduler, {"thresholding": True}, {}),
    "ddim": (FastDDIMScheduler, {}, {}),
    "ddim-eta": (FastDDIMScheduler, {}, {"eta": 0.5, "use_clipped_model_output": True}),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def output_for(config: dict[str, Any], device: str = "cpu") -> torch.Tensor:
    channels = 6 if str(config.get("variance_type")).startswith("learned") else 3
    return normal(SHAPE[0], channels, *SHAPE[2:], seed=1).abs().to(device)


@pytest.mark.parametrize(
    ("variant", "kind"), [*((variant, "tensor") for variant in VARIANTS), ("ddpm", "int"), ("ddim", "int")]
)
def test_step_compiles_to_one_graph_with_the_bits_of_eager(variant: str, kind: str) -> None:
    scheduler_class, config, options = VARIANTS[variant]
    compiled_one, eager_one = scheduler_class(**config), scheduler_class(**config)
    counter = CompileCounterWithBackend("aot_eager")
    x, m = normal(*SHAPE, seed=2), output_for(config)

    def step(m: torch.Tensor, t: Any, x: torch.Tensor) -> Any:
        return compiled_one.step(m, t, x, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for scheduler in (compiled_one, eager_one):
        scheduler.set_timesteps(4)
    for t in eager_one.timesteps:
        torch.manual_seed(3)
        expected = eager_one.step(m, t, x, **options)
        torch.manual_seed(3)
        actual = compiled(m, int(t) if kind == "int" else t, x)
        assert torch.equal(actual.prev_sample, expected.prev_sample)
        assert torch.equal(actual.pred_original_sample, expected.pred_original_sample)
    # With ints: one graph for the first t, one for any other, and one for t = 0, which draws nothing. With eta, the
    # first graph makes the rows and the second finds them.
    assert counter.frame_count <= (3 if kind == "int" else 2 if "eta" in options else 1)


def test_inductor_draws_the_numbers_of_eager() -> None:
    # Its own generator would draw others. Known timesteps and a linear model leave it no C++ to compile.
    scheduler = FastDDPMScheduler()
    scheduler.set_timesteps(4)

    def loop(x: torch.Tensor) -> torch.Tensor:
        for t in (750, 500):
            x = scheduler.step(x, t, x).prev_sample
        return x

    x = normal(*SHAPE, seed=2)
    torch.manual_seed(3)
    expected = loop(x)
    torch.manual_seed(3)
    assert torch.equal(torch.compile(loop, fullgraph=True)(x), expected)


def unconditional(pipeline_class: Any, scheduler: Any) -> Any:
    return pipeline_class(tiny_unet(block_out_channels=(4, 8), norm_num_groups=2), scheduler)


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (lambda: unconditional(DDPMPipeline, DDPMScheduler()), {"batch_size": 2}),
        (lambda: unconditional(DDIMPipeline, DDIMScheduler()), {"batch_size": 2, "eta": 0.5}),
        (tiny_dit_pipeline, {"class_labels": [1, 3]}),
    ],
    ids=["ddpm", "ddim", "conditional"],
)
def test_diffusers_pipelines_run_with_a_compiled_step(build: Any, call: dict[str, Any]) -> None:
    theirs = build()
    ours = copy.copy(theirs)
    ours.scheduler = fast_scheduler(theirs.scheduler)
    ours.scheduler.step = torch.compile(ours.scheduler.step, fullgraph=True, backend="aot_eager")
    images = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(3)
        images.append(pipe(**call, num_inference_steps=4, output_type="np").images)
    np.testing.assert_allclose(images[0], images[1], rtol=0, atol=1e-4)


def test_noising_compiles_to_one_graph_with_the_bits_of_eager() -> None:
    scheduler = FastDDPMScheduler()
    x, eps, t = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), torch.tensor([3, 700])

    def noising(x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scheduler.add_noise(x, eps, t), scheduler.get_velocity(x, eps, t)

    actual = torch.compile(noising, fullgraph=True, backend="aot_eager")(x, eps, t)
    expected = noising(x, eps, t)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_compiled_step_follows_set_timesteps() -> None:
    scheduler = FastDDPMScheduler()
    compiled = torch.compile(lambda m, t, x: scheduler.step(m, t, x).prev_sample, fullgraph=True, backend="aot_eager")
    x, m, t = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2), torch.tensor(500)
    for steps in (20, 4):
        scheduler.set_timesteps(steps)
        torch.manual_seed(3)
        actual = compiled(m, t, x)
        torch.manual_seed(3)
        assert torch.equal(actual, scheduler.step(m, t, x).prev_sample)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_reads_nothing_from_the_device(variant: str) -> None:
    scheduler_class, config, options = VARIANTS[variant]
    scheduler = scheduler_class(**config)
    # Reading a value of a meta tensor raises, wherever it happens.
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(1, device="meta").item()
    scheduler.set_timesteps(5, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    x, m = torch.empty(SHAPE, device="meta"), output_for(config, "meta")
    known = []
    for t in scheduler.timesteps:
        x = scheduler.step(m, t, x, **options).prev_sample
        known.append(scheduler.host_timestep(t))
    assert known == [800, 600, 400, 200, 0]
    foreign = torch.empty((), dtype=torch.int64, device="meta")
    assert scheduler.host_timestep(foreign) is None
    assert scheduler.step(m, foreign, x, **options).prev_sample.shape == x.shape
    assert scheduler.step(m, 400, x, **options).prev_sample.shape == x.shape
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert scheduler.add_noise(x, x, t).shape == scheduler.get_velocity(x, x, t).shape == x.shape


def test_unlisted_timestep_gives_nan_where_the_host_cannot_see_it() -> None:
    scheduler = FastDDPMScheduler()
    scheduler.set_timesteps(10)
    x, m = normal(*SHAPE, seed=1), normal(*SHAPE, seed=2)
    compiled = torch.compile(lambda m, t, x: scheduler.step(m, t, x).prev_sample, fullgraph=True, backend="aot_eager")
    for t, is_listed in ((500, True), (501, False), (-1, False), (1000, False), (2**40, False)):
        result = compiled(m, torch.tensor(t), x)
        assert bool(result.isfinite().all()) if is_listed else bool(result.isnan().all())
