"""The Frechet distance against its closed forms, and the features that the demo judges with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vaebm_fast.data import digits
from vaebm_fast.evaluation.digit_features import everything, train_digit_classifier
from vaebm_fast.evaluation.fidelity import frechet_distance


def sample(count: int, scale: np.ndarray, shift: float, seed: int) -> np.ndarray:
    """Features whose sample mean and covariance are exactly `shift` and diag(scale^2)."""
    raw = np.random.default_rng(seed).standard_normal((count, len(scale)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return white * scale + shift


def test_distance_of_a_set_to_itself_is_zero() -> None:
    features = sample(50, np.array([1.0, 2.0, 3.0]), 0.5, seed=0)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)


def test_distance_of_axis_aligned_gaussians_is_the_closed_form() -> None:
    first, second = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.25, 0.5])
    distance = frechet_distance(sample(40, first, 0.0, seed=1), sample(60, second, 1.5, seed=2))
    assert distance == pytest.approx(3 * 1.5**2 + ((first - second) ** 2).sum())


def test_distance_is_symmetric_and_does_not_see_rotations() -> None:
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((30, 4)) @ rng.standard_normal((4, 4)), rng.standard_normal((35, 4)) + 1
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    distance = frechet_distance(first, second)
    assert frechet_distance(second, first) == pytest.approx(distance)
    assert frechet_distance(first @ rotation, second @ rotation) == pytest.approx(distance)


def test_distance_survives_features_that_never_vary() -> None:
    features = np.zeros((20, 3))
    features[:, 0] = np.arange(20)
    shifted = features + np.array([0.0, 2.0, 0.0])
    assert frechet_distance(features, shifted) == pytest.approx(4.0)


@pytest.mark.parametrize(("first", "second"), [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5,))])
def test_features_that_do_not_fit_are_refused(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Features|samples"):
        frechet_distance(np.zeros(first), np.zeros(second))


def test_classifier_reads_held_out_digits_and_its_features_tell_noise_from_digits() -> None:
    train, held_out = digits(split="train"), digits(split="held_out")
    classifier = train_digit_classifier(train)
    assert classifier.accuracy(held_out) > 0.95
    reference = classifier.features(everything(held_out)[0])
    real = frechet_distance(classifier.features(everything(train)[0]), reference)
    noise = torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(classifier.features(noise), reference) > 20 * real
