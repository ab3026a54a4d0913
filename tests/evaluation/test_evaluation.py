"""The Frechet distance against its closed forms, the features that the demo judges with, and likelihood bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.trainers import TINY
from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import PRESETS
from vaebm_fast.data import digits
from vaebm_fast.evaluation.digit_features import everything, train_digit_classifier
from vaebm_fast.evaluation.fidelity import frechet_distance
from vaebm_fast.evaluation.likelihood import evaluate_likelihood, unit
from vaebm_fast.models import NVAE


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


@pytest.mark.parametrize("num_nf", [0, 1])
def test_the_importance_weighted_bound_is_the_elbo_at_one_sample_and_never_worse_with_more(num_nf: int) -> None:
    vae = NVAE(replace(TINY, num_nf=num_nf)).eval()
    source = digits(split="held_out")
    one = evaluate_likelihood(vae, source, importance_samples=1, batch_size=300)
    assert one.elbo_bits_per_dim == one.importance_weighted_bits_per_dim
    many = evaluate_likelihood(vae, source, importance_samples=4, batch_size=450)
    assert many.importance_weighted_bits_per_dim < many.elbo_bits_per_dim
    assert many.importance_weighted_bits_per_dim < one.importance_weighted_bits_per_dim
    assert many.elbo_bits_per_dim == pytest.approx(one.elbo_bits_per_dim, abs=0.05)
    assert (many.total_images, many.importance_samples) == (899, 4)


def test_the_likelihood_is_the_elbo_of_its_noise_whatever_the_batch_size() -> None:
    vae, source = NVAE(replace(TINY, num_nf=1)).eval(), digits(split="held_out")  # with flows the KL is at the sample
    layout = vae.noise_layout
    noise = layout.split(normal(seed_tensor(range(9, 908), "cpu"), 0, Stream.TRAIN_POSTERIOR, layout.dim))[0]
    with torch.no_grad():
        elbo = vae.elbo(everything(source)[0], noise, log_sigma_floor=None)
    expected = float((elbo.reconstruction_loss + elbo.kl.sum(1)).mean()) / (64 * math.log(2))
    for batch_size in (899, 100):
        found = evaluate_likelihood(vae, source, batch_size=batch_size, seed=9)
        assert found.elbo_bits_per_dim == pytest.approx(expected, rel=1e-5)
        assert "density over pixels in [-1, 1]" in found.unit and "not comparable" in found.unit


def test_bits_per_dim_of_bernoulli_pixels_are_those_of_the_pixels_that_count() -> None:
    config = replace(TINY, image_size=16, likelihood="bernoulli", uncounted_border=2)
    vae, source = NVAE(config).eval(), digits(image_size=16, split="held_out")
    whole = NVAE(replace(config, uncounted_border=0)).eval()
    for module in (vae, whole):
        for parameter in module.parameters():
            parameter.data.zero_()  # every pixel is 1 with probability 1/2, and the posterior is the prior
    for module, side in ((vae, 12), (whole, 16)):
        found = evaluate_likelihood(module, source, batch_size=899)
        assert found.elbo_bits_per_dim == pytest.approx(1)
        assert f"1 x {side} x {side} binary pixels" in found.unit


def test_the_unit_of_discrete_pixels_names_their_levels() -> None:
    config = replace(PRESETS["celeba_256"].nvae, likelihood="logistic_mixture")
    assert unit(config) == "bits per dimension of 3 x 256 x 256 pixels with 32 levels each"


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": -4}, {"importance_samples": 0}])
def test_a_likelihood_of_nothing_is_refused(wrong: dict[str, int]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        evaluate_likelihood(NVAE(TINY), digits(split="held_out"), **wrong)


def test_integers_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"x is torch.uint8; .* in \[0, 1\]"):
        NVAE(TINY).elbo(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x has shape \[1, 8, 8\]; this NVAE takes \[N, 1, 8, 8\]"):
        NVAE(TINY).elbo(torch.zeros(1, 8, 8))
