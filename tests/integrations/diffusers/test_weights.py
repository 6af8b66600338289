"""An accelerated pipeline made once beside a training loop: at every evaluation it draws diffusers' images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel

from fastddpm.integrations.diffusers import FastDDPMPipeline
from tests.integrations.diffusers.cases import normal, tiny_unet


class Evaluation:
    """The accelerated pipeline, made before training, and diffusers', made anew each time."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.fast = FastDDPMPipeline(unet, DDPMScheduler())
        self.fast.set_progress_bar_config(disable=True)
        self.last = self.draw(self.fast)

    @staticmethod
    def draw(pipe: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipe(batch_size=1, generator=generator, num_inference_steps=3, output_type="np").images

    def check(self, *, changed: bool = True) -> None:
        """Compare images now; `changed`: they are not those of the last time."""
        theirs = DDPMPipeline(self.unet, DDPMScheduler())
        theirs.set_progress_bar_config(disable=True)
        ours, expected = self.draw(self.fast), self.draw(theirs)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
        assert (np.abs(expected - self.last).max() > 1e-4) == changed
        self.last = expected


def train(unet: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    clean, noise = normal(4, 1, 8, 8, seed=step).clamp(-1, 1), normal(4, 1, 8, 8, seed=step + 100)
    t = torch.tensor([10, 200, 500, 900])
    output = unet.train()(DDPMScheduler().add_noise(clean, noise, t), t).sample
    torch.nn.functional.mse_loss(output, noise).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    unet.eval()


def test_training_with_diffusers_ema_is_followed() -> None:
    # The order of events in diffusers' examples/unconditional_image_generation/train_unconditional.py.
    unet = tiny_unet()
    ema = EMAModel(unet.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    evaluation = Evaluation(unet)
    for epoch in range(3):
        for step in range(2):
            train(unet, optimizer, 2 * epoch + step)
            ema.step(unet.parameters())
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        evaluation.check()
        ema.restore(unet.parameters())
        evaluation.check()
    evaluation.check(changed=False)


def test_training_with_ema_pytorch_is_followed() -> None:
    EMA = pytest.importorskip("ema_pytorch").EMA
    unet = tiny_unet()
    ema = EMA(unet, beta=0.5, update_after_step=0, update_every=1)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    of_unet, of_average = Evaluation(unet), Evaluation(ema.ema_model.eval())
    for step in range(3):
        train(unet, optimizer, step)
        ema.update()
        ema.ema_model.eval()
        of_unet.check()
        # The first update copies the network.
        of_average.check()
    ema.copy_params_from_ema_to_model()
    of_unet.check()


def test_averages_by_hand_and_loaded_weights_are_followed() -> None:
    unet, other = tiny_unet(), tiny_unet()
    evaluation = Evaluation(unet)
    for parameter in unet.parameters():
        parameter.data.mul_(0.9)
    evaluation.check()
    with torch.no_grad():
        for average, parameter in zip(unet.parameters(), other.parameters(), strict=True):
            average.lerp_(parameter, 0.5)
    evaluation.check()
    unet.load_state_dict(other.state_dict())
    evaluation.check()
    unet.conv_out = torch.nn.Conv2d(8, 1, 3, padding=1)
    evaluation.check()


class Doubling(AttnProcessor2_0):
    """An attention processor of the caller's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


def test_forwards_hooks_and_processors_replaced_after_a_call_are_used() -> None:
    unet = tiny_unet()
    evaluation = Evaluation(unet)
    hook = unet.conv_in.register_forward_hook(lambda module, args, output: 2 * output)
    evaluation.check()
    hook.remove()
    evaluation.check()
    forward = unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs, return_dict=False)[0] * 0.5
    fast = Evaluation.draw(evaluation.fast)
    unet.forward = lambda *args, **kwargs: type(forward(*args))(forward(*args).sample * 0.5)
    evaluation.check()
    np.testing.assert_allclose(fast, evaluation.last, rtol=0, atol=1e-5)
    del unet.forward
    evaluation.check()
    for module in unet.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(Doubling())
    evaluation.check()
