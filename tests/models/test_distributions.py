"""Laws of the latents' normals and of the three pixel distributions; the golden cases hold their measured numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from vaebm_fast.models.distributions import BernoulliPixels, GaussianPixels, LogisticMixturePixels, Normal, soft_clamp5

SIGMAS = 5.0  # statistical bounds, in standard deviations of the estimate


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Float64 normals."""
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    """Float64 uniforms in [1e-5, 1 - 1e-5], the range that sampling a mixture asks for."""
    u = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 1e-5 + (1 - 2e-5) * u


def test_soft_clamp_is_the_identity_near_zero_and_bounded_by_five() -> None:
    small = torch.linspace(-0.01, 0.01, 5, dtype=torch.float64)
    torch.testing.assert_close(soft_clamp5(small), small, rtol=1e-5, atol=0)
    assert soft_clamp5(torch.tensor([-1e6, 1e6])).tolist() == [-5.0, 5.0]


def test_raw_zeros_give_the_first_prior_with_sigma_1_01_and_temperature_scales_it() -> None:
    zeros = torch.zeros(2, dtype=torch.float64)
    prior, cool = Normal.from_raw(zeros, zeros), Normal.from_raw(zeros, zeros, 0.7)
    assert prior.mu.tolist() == [0, 0]
    assert prior.sigma.tolist() == pytest.approx([1.01, 1.01], rel=1e-15)
    assert cool.sigma.tolist() == pytest.approx([0.707, 0.707], rel=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_normal_passes_gradcheck(temperature: float) -> None:
    mu, log_sigma, x = (draw(2, 3, seed=s, scale=2.0).requires_grad_() for s in range(3))
    other_mu, other_log_sigma = (draw(2, 3, seed=s, scale=2.0).requires_grad_() for s in (3, 4))
    assert gradcheck(lambda m, ls, x: Normal.from_raw(m, ls, temperature).log_prob(x), (mu, log_sigma, x))
    assert gradcheck(lambda m, ls, e: Normal.from_raw(m, ls, temperature).sample(e), (mu, log_sigma, x))
    assert gradcheck(
        lambda m, ls, om, ols: Normal.from_raw(m, ls).kl(Normal.from_raw(om, ols, temperature)),
        (mu, log_sigma, other_mu, other_log_sigma),
    )


def test_normal_agrees_with_torch_distributions() -> None:
    p, q = (Normal.from_raw(draw(50, seed=s, scale=3.0), draw(50, seed=s + 1, scale=3.0)) for s in (0, 2))
    p_torch, q_torch = (torch.distributions.Normal(n.mu, n.sigma) for n in (p, q))
    x = draw(50, seed=4, scale=3.0)
    torch.testing.assert_close(p.log_prob(x), p_torch.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(p_torch, q_torch), rtol=1e-12, atol=1e-12)


def test_kl_is_zero_for_equal_normals_and_positive_for_others() -> None:
    p, q = (Normal.from_raw(draw(1000, seed=s, scale=4.0), draw(1000, seed=s + 1, scale=4.0)) for s in (0, 2))
    assert bool((p.kl(q) > 0).all())
    assert float(p.kl(p).abs().max()) < 1e-15


def test_kl_and_entropy_are_the_means_over_samples() -> None:
    count = 200_000
    p, q = (
        Normal.from_raw(torch.tensor(0.3), torch.tensor(-0.7)),
        Normal.from_raw(torch.tensor(-0.4), torch.tensor(0.2)),
    )
    z = p.sample(draw(count, seed=5))
    ratio = p.log_prob(z) - q.log_prob(z)
    assert abs(float(ratio.mean() - p.kl(q))) < SIGMAS * float(ratio.std()) / math.sqrt(count)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + float(p.sigma.log())
    assert abs(float(-p.log_prob(z).mean()) - entropy) < SIGMAS * float(p.log_prob(z).std()) / math.sqrt(count)


def gaussian_logits(mu: Tensor, log_sigma: Tensor) -> Tensor:
    return torch.cat([mu, log_sigma], dim=1)


@pytest.mark.parametrize("floor", [-2.0, None])
def test_gaussian_pixels_pass_gradcheck(floor: float | None) -> None:
    logits = draw(2, 6, 2, 2, seed=1, scale=2.0)
    log_sigma = soft_clamp5(logits[:, 3:])
    assert bool((log_sigma < -2.1).any()) and bool((log_sigma > -1.9).any()), "both sides of the floor"
    x = torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaf = logits.requires_grad_()
    assert gradcheck(lambda logits, x: GaussianPixels(logits).log_prob(x, floor), (leaf, x))
    assert gradcheck(lambda logits: GaussianPixels(logits).sample(draw(2, 3, 2, 2, seed=3)), (leaf,))


@pytest.mark.parametrize("floor", [-2.0, None])
def test_gaussian_density_is_torchs_normal_in_units_of_minus_one_to_one(floor: float | None) -> None:
    mu, log_sigma = draw(4, 3, 5, 5, seed=1, scale=3.0), draw(4, 3, 5, 5, seed=2, scale=3.0)
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    bounded = (5 * torch.tanh(log_sigma / 5)).clamp(min=-math.inf if floor is None else floor)
    expected = torch.distributions.Normal(5 * torch.tanh(mu / 5), bounded.exp() + 0.01).log_prob(2 * x - 1)
    actual = GaussianPixels(gaussian_logits(mu, log_sigma)).log_prob(x, floor)
    torch.testing.assert_close(actual, expected.sum(dim=(1, 2, 3)), rtol=1e-12, atol=1e-12)


def test_the_floor_at_minus_two_is_the_densitys_default_and_not_the_samples() -> None:
    at_floor = torch.full((1, 1, 2, 2), 5 * math.atanh(-2 / 5), dtype=torch.float64)
    mu, x = draw(1, 1, 2, 2), torch.rand(1, 1, 2, 2, dtype=torch.float64)
    lower, floored = GaussianPixels(gaussian_logits(mu, at_floor - 3)), GaussianPixels(gaussian_logits(mu, at_floor))
    torch.testing.assert_close(lower.log_prob(x), floored.log_prob(x), rtol=1e-12, atol=1e-12)
    assert float((lower.log_prob(x, None) - floored.log_prob(x, None)).abs()) > 1
    assert bool((lower.sigma < floored.sigma / 2).all())


def test_gaussian_samples_are_mean_plus_sigma_eps_inside_the_frame() -> None:
    pixels = GaussianPixels(gaussian_logits(draw(2, 3, 4, 4, seed=1, scale=0.3), draw(2, 3, 4, 4, seed=2)))
    eps = draw(2, 3, 4, 4, seed=3)
    expected = pixels.mean + pixels.sigma * eps
    inside = expected.abs() < 1
    torch.testing.assert_close(2 * pixels.sample(eps)[inside] - 1, expected[inside])
    assert pixels.sample(torch.full_like(eps, 1e3)).unique().tolist() == [1.0]
    assert pixels.sample(torch.full_like(eps, -1e3)).unique().tolist() == [0.0]
    torch.testing.assert_close(pixels.mean_image(), pixels.sample(torch.zeros_like(eps)))


def all_colours(bits: int) -> Tensor:
    """Every RGB colour of `bits` bits as an image of one pixel, [2^(3 bits), 3, 1, 1], red the slowest."""
    levels = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    return torch.cartesian_prod(levels, levels, levels)[:, :, None, None]


def mixture_logits(mixtures: int, *, seed: int, log_scale: float) -> Tensor:
    """Generic logits of one pixel whose log-scales are around `log_scale`, [1, 10 M, 1, 1]."""
    logits = draw(1, 10 * mixtures, 1, 1, seed=seed, scale=0.7)
    logits[:, mixtures:].unflatten(1, (3, 3, mixtures))[:, :, 1] += log_scale
    return logits


# Three bits: at eight, level 254 counts as the top one (its pixel is above 0.99), so the sum is not 1 there.
@pytest.mark.parametrize("log_scale", [-3.0, -1.5, 0.0])
@pytest.mark.parametrize("mixtures", [1, 4])
def test_probabilities_of_all_colours_sum_to_one(mixtures: int, log_scale: float) -> None:
    colours = all_colours(bits=3)
    logits = mixture_logits(mixtures, seed=1, log_scale=log_scale).expand(len(colours), -1, -1, -1)
    probabilities = LogisticMixturePixels(logits, mixtures, num_bits=3).log_prob(colours).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-4), "nearly empty bins take an approximation"


def test_red_levels_are_drawn_as_often_as_their_probabilities_say() -> None:
    mixtures, count = 3, 200_000
    logits = mixture_logits(mixtures, seed=2, log_scale=-1.5)
    log_prob = LogisticMixturePixels(logits.expand(512, -1, -1, -1), mixtures, 3).log_prob(all_colours(bits=3))
    expected = log_prob.exp().reshape(8, 64).sum(1)
    pixels = LogisticMixturePixels(logits.expand(count, -1, -1, -1), mixtures, 3)
    x = pixels.sample(uniforms(count, mixtures, 1, 1, seed=3), uniforms(count, 3, 1, 1, seed=4))
    frequency = torch.bincount((7 * x[:, 0]).round().long().flatten(), minlength=8) / count
    assert bool(((frequency - expected).abs() < SIGMAS * torch.sqrt(expected / count)).all())


def test_green_follows_red_and_blue_follows_both() -> None:
    raw = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    colours = raw[:, 1:].unflatten(1, (3, 3, 1))  # colour, (mean, log-scale, coefficient)
    colours[:, 0, 0], colours[:, :, 1] = 0.4, -20.0  # a red mean; scales of exp(-7): floored, and nearly no noise
    colours[:, :, 2] = torch.atanh(torch.tensor([0.5, -0.25, 0.75], dtype=torch.float64))[None, :, None, None, None]
    pixels = LogisticMixturePixels(raw, 1, 8)
    half = torch.full((1, 3, 1, 1), 0.5, dtype=torch.float64)
    expected = [0.4, 0.5 * 0.4, -0.25 * 0.4 + 0.75 * 0.5 * 0.4]
    assert (2 * pixels.sample(half[:, :1], half) - 1).flatten().tolist() == pytest.approx(expected)
    assert pixels.mean.flatten().tolist() == pytest.approx(expected)


def test_the_density_couples_the_colours_through_the_true_pixels() -> None:
    logits, x = mixture_logits(2, seed=5, log_scale=-1.0), torch.rand(1, 3, 1, 1, dtype=torch.float64)
    red, green = (2 * x - 1)[0, :2, 0, 0]
    means, _, coefficients = logits[0, 2:, 0, 0].reshape(3, 3, 2).unbind(1)  # [colour, M] each
    k_red, k_green, k_blue = torch.tanh(coefficients)
    uncoupled = logits.clone()
    colours = uncoupled[0, 2:, 0, 0].view(3, 3, 2)
    colours[:, 2] = 0
    colours[:, 0] = means + torch.stack([torch.zeros(2), k_red * red, k_green * red + k_blue * green])
    expected = LogisticMixturePixels(uncoupled, 2, 8).log_prob(x)
    torch.testing.assert_close(LogisticMixturePixels(logits, 2, 8).log_prob(x), expected)


def test_nearly_empty_bins_have_their_mass_to_first_order_of_their_width() -> None:
    log_scale, mean, half_bin = -2.5, -0.6, 1 / 255
    logits = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    logits[0, 1:, 0, 0] = torch.tensor([mean, log_scale, 0.0] * 3)
    level = torch.full((1, 3, 1, 1), 200 / 255, dtype=torch.float64)
    upper, lower = ((2 * level - 1 - mean + offset) / math.exp(log_scale) for offset in (half_bin, -half_bin))
    # log(sigmoid(a) - sigmoid(b)), without the cancellation
    exact = (
        torch.nn.functional.logsigmoid(upper)
        - torch.nn.functional.softplus(lower)
        + torch.log1p(-(lower - upper).exp())
    )
    assert bool((exact < math.log(1e-5)).all())
    assert float(LogisticMixturePixels(logits, 1, 8).log_prob(level)) == pytest.approx(float(exact.sum()), abs=3e-3)


def test_log_scales_are_floored_at_minus_seven() -> None:
    x = torch.rand(1, 3, 1, 1, dtype=torch.float64)
    logits = mixture_logits(2, seed=3, log_scale=0.0)
    log_scales = logits[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1]
    values = []
    for level in (-6.5, -7.0, -9.0):
        log_scales.fill_(level)
        values.append(float(LogisticMixturePixels(logits, 2, 8).log_prob(x)))
    assert values[1] == values[2] != values[0]


def test_mixture_passes_gradcheck_from_open_ends_to_nearly_empty_bins() -> None:
    colours = [[0.0, 1.0, 0.5], [1.0, 0.5, 0.0], [0.5, 0.0, 1.0], [0.2, 0.6, 0.4]]
    x = torch.tensor(colours, dtype=torch.float64).T.reshape(1, 3, 2, 2)
    for log_scale in (-4.5, -1.0):  # at -4.5 most bins have less mass than 1e-5
        logits = draw(1, 20, 2, 2, seed=6, scale=0.5)
        logits[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1] += log_scale
        assert gradcheck(lambda logits: LogisticMixturePixels(logits, 2, 8).log_prob(x), (logits.requires_grad_(),))


def test_an_empty_bin_still_pulls_its_mean_towards_the_pixel() -> None:
    logits = torch.zeros(1, 10, 1, 1)
    logits[:, 2::3] = -7.0
    logits[:, 1] = -0.9  # red is 1.7 away, at a scale of exp(-7): a mass of exp(-1864)
    logits.requires_grad_()
    value = LogisticMixturePixels(logits, 1, 8).log_prob(torch.tensor([0.9, 0.5, 0.5]).reshape(1, 3, 1, 1))
    value.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[0, 1]) == pytest.approx(math.exp(7), rel=1e-3)


@pytest.mark.parametrize("u", [1e-5, 0.5, 1 - 1e-5])
def test_extreme_uniforms_give_finite_pixels_inside_the_frame(u: float) -> None:
    pixels = LogisticMixturePixels(10 * torch.randn(2, 30, 4, 4), 3, 8)
    x = pixels.sample(torch.full((2, 3, 4, 4), u), torch.full((2, 3, 4, 4), u))
    assert bool(((x >= 0) & (x <= 1)).all())
    assert bool(((pixels.mean_image() >= 0) & (pixels.mean_image() <= 1)).all())


def test_a_mixture_has_no_single_sigma_and_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"no single sigma; sample it instead\."):
        _ = LogisticMixturePixels(torch.zeros(1, 10, 1, 1), 1, 8).sigma


def test_bernoulli_pixels_pass_gradcheck() -> None:
    x = draw(2, 1, 6, 6, seed=2).sigmoid().requires_grad_()
    logits = draw(2, 1, 6, 6, seed=1, scale=3.0).requires_grad_()
    assert gradcheck(lambda logits, x: BernoulliPixels(logits, border=2).log_prob(x), (logits, x))


def test_bernoulli_agrees_with_torch_distributions_and_survives_large_logits() -> None:
    logits, x = draw(3, 1, 4, 4, seed=1, scale=3.0), (draw(3, 1, 4, 4, seed=2) > 0).double()
    expected = torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(BernoulliPixels(logits).log_prob(x), expected.log_prob(x).sum(dim=(1, 2, 3)))
    torch.testing.assert_close(BernoulliPixels(logits).sigma, expected.stddev)
    assert BernoulliPixels(torch.full((1, 1, 1, 1), 1e4)).log_prob(torch.zeros(1, 1, 1, 1)).tolist() == [-1e4]


def test_the_border_of_a_bernoulli_image_does_not_count() -> None:
    logits, x = draw(2, 1, 32, 32, seed=1), draw(2, 1, 32, 32, seed=2).sigmoid()
    centre = BernoulliPixels(logits[..., 2:30, 2:30]).log_prob(x[..., 2:30, 2:30])
    torch.testing.assert_close(BernoulliPixels(logits, border=2).log_prob(x), centre)


def test_bernoulli_samples_are_one_with_probability_p() -> None:
    count = 100_000
    pixels = BernoulliPixels(torch.full((count, 1, 1, 1), -1.2, dtype=torch.float64))
    p = 1 / (1 + math.exp(1.2))
    x = pixels.sample(uniforms(count, 1, 1, 1, seed=7))
    assert x.unique().tolist() == [0.0, 1.0]
    assert abs(float(x.mean()) - p) < SIGMAS * math.sqrt(p * (1 - p) / count)
    torch.testing.assert_close(pixels.mean_image()[0].item(), p)
