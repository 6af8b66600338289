"""All the numbers about a set of samples, each beside the same number of real images."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastddpm.data.datasets import Dataset
from fastddpm.evaluation import frechet
from fastddpm.evaluation.classifier import Classifier, Predictions, classify
from fastddpm.evaluation.distances import diversity, nearest_distances
from fastddpm.evaluation.estimate import Estimate, Row, bootstrapped, normal, proportion, ratio
from fastddpm.evaluation.real_images import Reference, comparable, matched, subset
from fastddpm.machine.ranks import ALONE, Ranks
from fastddpm.sampling.network import diffusion_of, num_classes_of
from fastddpm.training.likelihood import bits_per_dim
from fastddpm.unet.unet import UNet

ACCURACY, FRECHET, NEAREST, DIVERSITY = "accuracy", "frechet", "nearest", "diversity"

# Held-out images come this near to a training image in one case of a hundred.
NEAR = 0.01


@dataclass
class Measures:
    """The numbers about a set of samples.

    Attributes:
        compared: N, of the samples, the training images and the held-out ones that were compared.
        rows: accuracy: how often the classifier sees the class that was asked for (held-out images: their own class).
            frechet: distance of the classifier's features to those of held-out images.
            nearest: median distance to the nearest training image.
            diversity: mean distance between two images of a class.
        near: share of samples nearer to a training image than all but `NEAR` of the held-out images are.
        accuracy_by_class: for each class, by its name.
        fid: by the standard network.
        notes: what was not measured, and why.
    """

    compared: int
    rows: dict[str, Row] = field(default_factory=dict)
    near: float = 0.0
    accuracy_by_class: dict[str, float] = field(default_factory=dict)
    fid: float | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        values = asdict(self)
        return values.pop("rows") | values


def measure(samples: Dataset, reference: Reference, classifier: Classifier | None, ranks: Ranks = ALONE) -> Measures:
    """Measure samples against real images; with a classifier, if there are held-out images, by its features too.

    Ranks compute the features of images, and their distances, a share each. All statistics are of these joined in the
    images' order, in float64, so they are the same for any number of ranks.

    Raises:
        ValueError: samples and real images have no class in common.
    """
    sets = comparable([samples, reference.train, *([] if reference.held_out is None else [reference.held_out])])
    chosen = matched(sets)
    equal = [subset(data, k) for data, k in zip(sets, chosen, strict=True)]
    measures = Measures(compared=len(equal[0]))
    if classifier is not None and reference.held_out is not None:
        of_samples, of_held_out = (classify(classifier, data, ranks) for data in (sets[0], sets[2]))
        _add_accuracy(measures, sets[0], of_samples, sets[2], of_held_out)
        features = (
            of_samples.features[chosen[0]].numpy(),
            classify(classifier, equal[1], ranks).features.numpy(),
            of_held_out.features[chosen[2]].numpy(),
        )
        classes = None if equal[0].labels is None else equal[0].labels.numpy()
        measures.rows[FRECHET] = frechet.compare(*features, classes=classes)
    else:
        measures.notes.append("accuracy and Frechet distance; there is no classifier of these images")
    _add_nearest(measures, equal, reference.train, chosen[1], ranks)
    spread, spread_train = diversity(equal[0], ranks), diversity(equal[1], ranks)
    if spread is None or spread_train is None:
        measures.notes.append("diversity; no class has two samples")
    else:
        measures.rows[DIVERSITY] = Row(spread, spread_train, ratio(spread, spread_train), "training")
    return measures


def accuracy(predictions: Predictions, data: Dataset) -> Estimate:
    """Return how often a classifier sees the class that an image is labelled with.

    Raises:
        ValueError: the images have no labels.
    """
    if data.labels is None:
        raise ValueError(f"{data.name}: no labels, so nothing says what should be seen in the images")
    return proportion(int(predictions.classes.eq(data.labels).sum()), len(data))


def _add_accuracy(
    measures: Measures, samples: Dataset, of_samples: Predictions, held_out: Dataset, of_held_out: Predictions
) -> None:
    if samples.labels is None:
        measures.notes.append(f"accuracy; the model does not draw the classes of {held_out.name}")
        return
    measures.rows[ACCURACY] = Row(accuracy(of_samples, samples), accuracy(of_held_out, held_out), None, "held-out")
    right = of_samples.classes.eq(samples.labels)
    for label, name in enumerate(samples.classes):
        if (members := samples.labels.eq(label)).any():
            measures.accuracy_by_class[name] = float(right[members].double().mean())


def _add_nearest(measures: Measures, equal: list[Dataset], train: Dataset, chosen_train: Tensor, ranks: Ranks) -> None:
    of_samples = nearest_distances(equal[0], train, ranks)
    if len(equal) == 3:
        of_real = nearest_distances(equal[2], train, ranks)
    else:
        # As far from the others as a held-out image would be: which of the images is left out is immaterial.
        of_real = nearest_distances(equal[1], train, ranks, skip=chosen_train)
    a, b = (bootstrapped(values, lambda v: float(np.median(v))) for values in (of_samples, of_real))
    measures.rows[NEAREST] = Row(a, b, ratio(a, b), "held-out")
    measures.near = float((of_samples < np.quantile(of_real, NEAR)).mean())


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
    return {name: _bits(network, data, n, device) for name, data in sets.items() if data is not None}


def _bits(network: UNet, data: Dataset, n: int, device: torch.device) -> Estimate:
    n = min(n, len(data))
    k = torch.arange(n, device="cpu") * len(data) // n
    x_0, labels = data.x_0(k).to(device), None
    if data.labels is not None and num_classes_of(network) == len(data.classes):
        labels = data.labels[k].to(device)
    found = bits_per_dim(network, x_0, diffusion_of(network), class_labels=labels)
    return normal(found.mean, found.standard_error)
