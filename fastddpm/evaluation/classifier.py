"""A small classifier of images, whose predictions for samples are their accuracy and whose features are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastddpm.data.datasets import Dataset
from fastddpm.files.tensors import SafetensorsFile, read_tensors
from fastddpm.machine.ranks import ALONE, Ranks
from fastddpm.unet.load import SHIPPED

# Trained on `fastddpm.data.mnist("train")` by: python -m tests.evaluation.classifier_training FILE
SHIPPED_CLASSIFIER = SHIPPED / "digits" / "classifier.safetensors"

FEATURES = 64
_BATCH = 250
# (channels in, channels out, stride): 14.4 MFLOP an image of 32x32.
_CONVOLUTIONS = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, FEATURES, 2), (FEATURES, FEATURES, 1))


class Classifier(nn.Module):
    """Five convolutions, the mean over the picture, and a linear layer; 70 k parameters.

    GroupNorm rather than BatchNorm: what an image is taken for does not depend on the images beside it.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in _CONVOLUTIONS)
        self.norms = nn.ModuleList(nn.GroupNorm(4, o) for _, o, _ in _CONVOLUTIONS)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer, [B, FEATURES], of images x [B, 1, H, W] in [-1, 1]."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.relu(norm(convolution(x)))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, [B, classes], of images x [B, 1, H, W] in [-1, 1]."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Predictions:
    """What a classifier sees in images.

    Attributes:
        classes: [N] int64, the likeliest class.
        features: [N, FEATURES] float64.
    """

    classes: Tensor
    features: Tensor


@torch.inference_mode()
def classify(classifier: Classifier, data: Dataset, ranks: Ranks = ALONE) -> Predictions:
    """Classify every image of a set, each rank a share of them."""
    features = ranks.each(
        lambda k: classifier.features(data.x_0(k)), torch.arange(len(data), device="cpu").split(_BATCH)
    )
    return Predictions(classifier.head(features).argmax(dim=1), features.double())


def load_classifier(path: Path, classes: int = 10) -> Classifier:
    """Load a classifier for so many classes, in eval mode and float32.

    Raises:
        ValueError: the file is damaged, hostile, or of another network.
    """
    with torch.device("meta"):
        classifier = Classifier(classes)
    expected = {name: tensor.shape for name, tensor in classifier.state_dict().items()}
    classifier.load_state_dict(read_tensors(SafetensorsFile(path), expected), assign=True)
    return classifier.eval()
