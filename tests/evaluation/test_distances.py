"""Distances between pictures against brute force, and the choice of what is compared."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.spatial.distance
import torch

from fastddpm.data.datasets import Dataset
from fastddpm.evaluation import distances
from fastddpm.evaluation.distances import diversity, nearest_distances
from fastddpm.evaluation.real_images import comparable, load_reference, matched, subset


def pictures(n: int, seed: int, labels: list[int] | None = None, classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 1, 4, 4), dtype=torch.uint8, generator=generator)
    names = tuple("abcdefghij"[:classes]) if labels is not None else ()
    return Dataset(f"set {seed}", images, None if labels is None else torch.tensor(labels), names)


def flat(data: Dataset) -> np.ndarray:
    return data.x_0(torch.arange(len(data))).flatten(1).double().numpy()


@pytest.fixture(params=[2**23, 16 * 3], ids=["one block", "blocks of 3 images"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "_BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
def test_nearest_distances_match_brute_force() -> None:
    data, reference = pictures(7, 0), pictures(11, 1)
    expected = scipy.spatial.distance.cdist(flat(data), flat(reference)).min(axis=1)
    np.testing.assert_allclose(nearest_distances(data, reference), expected, rtol=1e-12)


def test_nearest_distance_of_a_copy_is_0() -> None:
    data = pictures(40, 0)
    np.testing.assert_allclose(nearest_distances(subset(data, torch.tensor([5, 30])), data), 0, atol=1e-6)


@pytest.mark.usefixtures("_blocks")
def test_nearest_distances_skip_the_image_itself() -> None:
    data = pictures(8, 0)
    k = torch.tensor([1, 4, 7])
    between = scipy.spatial.distance.cdist(flat(data), flat(data))
    np.fill_diagonal(between, np.inf)
    found = nearest_distances(subset(data, k), data, skip=k)
    np.testing.assert_allclose(found, between.min(axis=1)[k], rtol=1e-12)


@pytest.mark.usefixtures("_blocks")
def test_diversity_is_the_mean_pairwise_distance_within_classes() -> None:
    data = pictures(10, 0, [0, 0, 0, 0, 0, 1, 1, 1, 1, 2])  # the only image of class 2 has no pair
    expected = np.mean([scipy.spatial.distance.pdist(flat(data)[a:b]).mean() for a, b in ((0, 5), (5, 9))])
    found = diversity(data)
    assert found is not None
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_diversity_of_unlabelled_images_is_over_all_pairs() -> None:
    data = pictures(10, 0)
    found = diversity(data)
    assert found is not None
    assert found.value == pytest.approx(scipy.spatial.distance.pdist(flat(data)).mean(), rel=1e-9)


def test_diversity_interval_has_the_error_of_repeated_draws() -> None:
    estimates = [e for e in (diversity(pictures(30, seed)) for seed in range(100)) if e is not None]
    claimed = np.mean([(e.high - e.low) / (2 * 1.96) for e in estimates])
    # The standard deviation of 100 draws is itself known to 7 %.
    assert claimed == pytest.approx(np.std([e.value for e in estimates], ddof=1), rel=0.35)


def test_diversity_needs_a_pair() -> None:
    assert diversity(pictures(2, 0, [0, 1])) is None


def test_matched_takes_equally_many_of_each_class() -> None:
    sets = [pictures(6, 0, [0, 0, 0, 1, 1, 2]), pictures(7, 1, [0, 0, 1, 1, 1, 1, 1])]
    chosen = matched(sets)
    for data, k in zip(comparable(sets), chosen, strict=True):
        assert data.labels is not None
        assert data.labels[k].tolist() == [0, 0, 1, 1]
    assert all(torch.equal(a, b) for a, b in zip(chosen, matched(sets), strict=True))


@pytest.mark.parametrize("other", [pictures(4, 1), pictures(4, 1, [0, 1, 0, 1], classes=2)], ids=["none", "others"])
def test_labels_that_not_all_share_are_dropped(other: Dataset) -> None:
    sets = comparable([pictures(6, 0, [0, 0, 0, 1, 1, 2]), other])
    assert [s.labels for s in sets] == [None, None]
    assert [len(k) for k in matched(sets)] == [4, 4]


def test_matched_needs_a_common_class() -> None:
    with pytest.raises(ValueError, match="no class in common"):
        matched([pictures(2, 0, [0, 0]), pictures(2, 1, [1, 1])])


def test_load_reference_refuses_images_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"the model draws \(1, 32, 32\), digits8x8 holds images \(1, 8, 8\)"):
        load_reference("digits8x8", (1, 32, 32))
