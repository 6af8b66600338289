"""The networks that benchmarks run, the same weights for every provider, and how peers compile them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from fastddpm.benchmarks.harness.case import Case
from torch import Tensor, nn

from fastddpm.unet.config import UNetConfig
from fastddpm.unet.load import load
from fastddpm.unet.unet import UNet

_TINY = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
)
_SMALL = dataclasses.replace(UNetConfig.digits(), num_class_embeds=None, null_class=None)
# What the report says of a network, and its configuration.
_NETWORKS = {
    "cifar10": ("google/ddpm-cifar10-32's UNet, 35.7 M parameters, random weights", UNetConfig.cifar10()),
    "digits": ("the shipped digits model, 1.7 M parameters", UNetConfig.digits()),
    "small": ("the digits model's UNet without classes, 1.7 M parameters, random weights", _SMALL),
    "tiny": ("a tiny UNet, for trying out", _TINY),
}
TITLES = {name: title for name, (title, _) in _NETWORKS.items()}
# Those whose weights make sense.
TRAINED = ("digits",)


def config(name: str) -> UNetConfig:
    """The configuration of a named network."""
    return _NETWORKS[name][1]


def shape(name: str) -> tuple[int, ...]:
    """One sample's shape."""
    chosen = config(name)
    assert isinstance(chosen.sample_size, int)
    return (chosen.in_channels, chosen.sample_size, chosen.sample_size)


def build(name: str) -> UNet:
    """Build a named network in eval mode, float32 on the CPU: shipped weights, or the same random ones each time."""
    if name == "digits":
        return load("digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(config(name), zero_init=False).eval()


def labels(name: str, batch: int, device: str = "cpu") -> Tensor | None:
    """Labels 0, 1, 2, ... in turn, int64 [B], for a network with classes; else None."""
    chosen = config(name)
    if chosen.num_class_embeds is None:
        return None
    classes = chosen.num_class_embeds - (chosen.null_class is not None)
    return torch.arange(batch, device=device) % classes


class WithLabels(nn.Module):
    """A network with fixed labels, for loops that cannot pass them (lucidrains', OpenVINO's)."""

    def __init__(self, model: nn.Module, class_labels: Tensor | None) -> None:
        super().__init__()
        self.model, self.class_labels = model, class_labels

    def forward(self, x: Tensor, t: Any, *ignored: Any) -> Tensor:
        output = self.model(x, t, class_labels=self.class_labels)
        return output if isinstance(output, Tensor) else output.sample


def labelled(case: Case, model: nn.Module | None = None) -> WithLabels:
    """A network on its device, ours in float32 unless another is given, with the labels of a case."""
    model = build(case.network).to(case.device) if model is None else model
    return WithLabels(model, labels(case.network, case.batch, case.device)).eval()


def compile_frozen(model: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile as recommended for inference: fullgraph, channels_last weights (of a module), frozen parameters.

    Inductor's `freezing` is set while the first call compiles, and not left behind for others.
    """
    if isinstance(model, nn.Module):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    call = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
    warm = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal warm
        if warm:
            return call(*args, **kwargs)
        inductor: Any = torch._inductor.config
        with torch.no_grad(), inductor.patch(freezing=True):
            result = call(*args, **kwargs)
        warm = True
        return result

    return run


def load_compiler() -> None:
    """Load what torch.compile loads when it first compiles a network; CPU."""
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.GroupNorm(1, 1), nn.Flatten(0), nn.Linear(36, 1)).eval()
    compile_frozen(network)(torch.zeros(1, 1, 8, 8))
