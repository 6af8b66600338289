"""Training of the classifier, on images turned, scaled, sheared and shifted anew each time they are shown.

python -m tests.evaluation.classifier_training FILE trains the one that ships.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastddpm.data.datasets import Dataset, mnist
from fastddpm.evaluation.classifier import Classifier, classify, load_classifier
from fastddpm.evaluation.measures import accuracy
from fastddpm.files.atomic import write_files
from fastddpm.machine.devices import plain_torch

EPOCHS = 40
BATCH = 50
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
LABEL_SMOOTHING = 0.05

# As hands differ: up to 15 degrees, 12 % in size, 0.15 in slant, and 1/16 of the side (2 of 32 pixels) in place.
MAX_ANGLE, MAX_SCALE, MAX_SHEAR, MAX_SHIFT = math.radians(15), 0.12, 0.15, 1 / 16


def train_classifier(
    data: Dataset, *, epochs: int = EPOCHS, seed: int = 0, progress: Callable[[float], None] = lambda loss: None
) -> Classifier:
    """Train a classifier on labelled grey images.

    Args:
        epochs: how often each image is shown.
        seed: of weights, order and distortions.
        progress: called with the loss after each gradient step (see `count_steps`).

    Returns:
        The classifier, in eval mode.

    Raises:
        ValueError: the images have no labels, or are not grey.
    """
    if data.labels is None or data.shape[0] != 1:
        raise ValueError(f"{data.name}: a classifier is trained on grey images with labels")
    with torch.random.fork_rng(devices=[]), plain_torch():
        torch.manual_seed(seed)
        classifier = Classifier(len(data.classes))
    generator = np.random.Generator(np.random.Philox(key=seed))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=count_steps(data, epochs), pct_start=0.1
    )
    for _ in range(epochs):
        for k in torch.from_numpy(generator.permutation(len(data))).split(BATCH):
            x = distort(data.x_0(k), generator)
            loss = nn.functional.cross_entropy(classifier(x), data.labels[k], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress(loss.item())
    return classifier.eval()


def count_steps(data: Dataset, epochs: int = EPOCHS) -> int:
    """Return how many gradient steps a training takes."""
    return epochs * math.ceil(len(data) / BATCH)


def distort(x: Tensor, generator: np.random.Generator) -> Tensor:
    """Turn, scale, shear and shift each image [B, C, H, W] by random amounts; the border continues outwards."""
    angle, shear = (generator.uniform(-limit, limit, len(x)) for limit in (MAX_ANGLE, MAX_SHEAR))
    scale = np.exp(generator.uniform(-MAX_SCALE, MAX_SCALE, len(x)))
    # Coordinates run from -1 to 1, so a shift by a fraction of the side is twice as much.
    shift = generator.uniform(-2 * MAX_SHIFT, 2 * MAX_SHIFT, (len(x), 2))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    # [[cos, -sin], [sin, cos]] @ [[1, shear], [0, 1]], and the shift as third column
    rows = [[cos, shear * cos - sin, shift[:, 0]], [sin, shear * sin + cos, shift[:, 1]]]
    theta = torch.from_numpy(np.array(rows).transpose(2, 0, 1)).to(x.dtype)  # [B, 2, 3]
    grid = nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write the weights as float16 safetensors, atomically."""
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in classifier.state_dict().items()}
    write_files({path: save(tensors)})


def main(path: Path) -> None:
    """Train on the digits, write the weights, and print how many held-out images they recognise."""
    train, held_out = mnist("train"), mnist("test")
    with tqdm(total=count_steps(train), unit="step", desc="training") as bar:
        save_classifier(path, train_classifier(train, progress=lambda loss: bar.update() and None))
    # Of what was saved: the weights were rounded.
    print(accuracy(classify(load_classifier(path), held_out), held_out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
