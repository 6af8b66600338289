"""The classifier: what it learns from, what it is stored as, and that the shipped one is good enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastddpm.data.datasets import Dataset, mnist
from fastddpm.evaluation.classifier import SHIPPED_CLASSIFIER, Classifier, classify, load_classifier
from fastddpm.evaluation.measures import accuracy
from tests.evaluation import classifier_training
from tests.evaluation.classifier_training import distort, save_classifier, train_classifier


def bars() -> Dataset:
    """Upright bars and level ones, a few pixels from the middle: two classes that no distortion confuses."""
    images = torch.zeros(40, 1, 16, 16, dtype=torch.uint8)
    for i in range(20):
        place = 5 + i % 6
        images[2 * i, 0, 2:14, place] = 255
        images[2 * i + 1, 0, place, 2:14] = 255
    return Dataset("bars", images, torch.tensor([0, 1] * 20), ("upright", "level"))


@pytest.fixture(scope="module")
def untrained() -> Classifier:
    torch.manual_seed(0)
    return Classifier(10).eval()


def test_shipped_classifier_recognises_held_out_digits() -> None:
    held_out = mnist("test")
    assert accuracy(classify(load_classifier(SHIPPED_CLASSIFIER), held_out), held_out).value >= 0.965
    assert SHIPPED_CLASSIFIER.stat().st_size < 700_000


def test_training_learns_and_repeats() -> None:
    losses: list[list[float]] = [[], []]
    data = bars()
    first, second = (train_classifier(data, epochs=25, seed=1, progress=found.append) for found in losses)
    assert accuracy(classify(first, data), data).value == 1.0
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert len(losses[0]) == classifier_training.count_steps(data, 25)


def test_training_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train_classifier(bars(), epochs=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "data",
    [Dataset("unlabelled", torch.zeros(2, 1, 4, 4)), Dataset("colour", torch.zeros(1, 3, 4, 4), torch.tensor([0]))],
    ids=lambda data: data.name,
)
def test_training_needs_grey_images_with_labels(data: Dataset) -> None:
    with pytest.raises(ValueError, match="grey images with labels"):
        train_classifier(data)


def test_distort_by_nothing_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_ANGLE", "MAX_SCALE", "MAX_SHEAR", "MAX_SHIFT"):
        monkeypatch.setattr(classifier_training, name, 0.0)
    x = bars().x_0(torch.arange(4))
    torch.testing.assert_close(distort(x, np.random.default_rng(0)), x, rtol=0, atol=1e-5)


def test_distort_keeps_the_ground_and_differs_by_image() -> None:
    x = torch.full((8, 1, 16, 16), -1.0)
    x[:, :, 5:10, 5:8] = 1.0
    distorted = distort(x, np.random.default_rng(0))
    assert distorted.shape == x.shape
    # Four equal pixels are averaged with weights that sum to 1 but for their rounding.
    assert (distorted[:, :, [0, -1]] + 1).abs().max() < 1e-6
    assert len(distorted.unique(dim=0)) == 8


def test_classifier_judges_an_image_by_itself(untrained: Classifier) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 1, 8, 8, generator=generator) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(untrained(x)[3:], untrained(x[3:]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(untrained.head(untrained.features(x)), untrained(x))


def test_classifier_is_stored_in_half_precision(untrained: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_classifier(path, untrained)
    loaded = load_classifier(path)
    assert not loaded.training
    for stored, own in zip(loaded.parameters(), untrained.parameters(), strict=True):
        assert torch.equal(stored, own.half().float())


def test_load_refuses_other_weights(untrained: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_classifier(path, untrained)
    with pytest.raises(ValueError, match=r"2 of another shape: 'head.weight'"):
        load_classifier(path, classes=3)
    save_file({"head.weight": torch.zeros(10, 64)}, path)
    with pytest.raises(ValueError, match="missing"):
        load_classifier(path)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="truncated, or no safetensors file"):
        load_classifier(path)


def test_accuracy_needs_labels(untrained: Classifier) -> None:
    data = Dataset("unlabelled", torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="no labels"):
        accuracy(classify(untrained, data), data)
