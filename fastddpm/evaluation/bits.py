"""Bits per dimension of real images under the model, of unseen ones beside training images."""

from __future__ import annotations

import copy

import torch

from fastddpm.data.datasets import Dataset
from fastddpm.evaluation.estimate import Estimate, normal
from fastddpm.evaluation.real_images import Reference, subset
from fastddpm.sampling.network import diffusion_of, num_classes_of
from fastddpm.training.likelihood import bits_per_dim
from fastddpm.unet.unet import UNet


def real_bits(model: UNet, reference: Reference, n: int, device: torch.device) -> dict[str, Estimate]:
    """Estimate the bound of n images, or as many as there are, of each kind.

    Args:
        model: the network; a class-conditional one is told the images' classes where it has as many.
        reference: the images; n of a set are taken at equal distances, which spreads them over its classes.
        n: how many.
        device: where to run a copy of the network.

    Returns:
        "held_out", where there are such images, and "train"; the further apart, the more the model knows by heart.
    """
    network = copy.deepcopy(model).to(device)
    sets = {"held_out": reference.held_out, "train": reference.train}
    return {name: _bits(network, _thinned(data, n), device) for name, data in sets.items() if data is not None}


def _thinned(data: Dataset, n: int) -> Dataset:
    n = min(n, len(data))
    return subset(data, torch.arange(n, device="cpu") * len(data) // n)


def _bits(network: UNet, data: Dataset, device: torch.device) -> Estimate:
    same = data.labels is not None and num_classes_of(network) == len(data.classes)
    x_0 = data.x_0(torch.arange(len(data), device="cpu")).to(device)
    labels = data.labels.to(device) if same and data.labels is not None else None
    found = bits_per_dim(network, x_0, diffusion_of(network), class_labels=labels)
    return normal(found.mean, found.standard_error)
