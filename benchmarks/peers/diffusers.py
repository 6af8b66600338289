"""diffusers around a network of ours: its UNet, its schedulers and its pipelines."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from fastddpm.benchmarks.harness.inputs import T
from fastddpm.benchmarks.peers import networks
from torch import Tensor, nn

NEEDS = {"diffusers": "diffusers"}


def network(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of a case as diffusers' UNet2DModel, with the same weights."""
    ours = networks.build(case.network)
    values = {key: value for key, value in ours.config.to_dict().items() if key != "null_class"}
    model = importlib.import_module("diffusers").UNet2DModel(**values)
    model.load_state_dict(ours.state_dict())
    # Its own `to` warns of every dtype, float32 included.
    return nn.Module.to(model.eval(), case.device, dtype)


def scheduler(name: str, **options: Any) -> Any:
    """A scheduler such as "DDPMScheduler", of Ho et al.'s linear betas."""
    return getattr(importlib.import_module("diffusers"), name)(num_train_timesteps=T, **options)


def pipeline(case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """DDPMPipeline or DDIMPipeline of a case, with labels, which they cannot pass; options are of the scheduler."""
    unet: Any = network(case, dtype)
    labels, forward = networks.labels(case.network, case.batch, case.device), unet.forward
    if labels is not None:
        unet.forward = lambda x, t, **kwargs: forward(x, t, class_labels=labels, **kwargs)
    kind = case.sampler.upper()
    pipe = getattr(importlib.import_module("diffusers"), f"{kind}Pipeline")
    return pipe(unet=unet, scheduler=scheduler(f"{kind}Scheduler", **options))


def images(case: Case, pipe: Any, seed: int) -> Tensor:
    """What a pipeline draws from a generator of that seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(case.device).manual_seed(seed)
    # "pt": the bfloat16 pipeline cannot return arrays.
    return pipe(batch_size=case.batch, generator=generator, num_inference_steps=case.steps, output_type="pt").images
