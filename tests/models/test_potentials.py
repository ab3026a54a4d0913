"""The three potentials that a chain descends: their values, gradients, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from tests.helpers.builders import noise_of, tiny_grey_model
from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.config import POTENTIALS, Potential


# The potentials.
@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_pass_gradcheck_in_noise_space(potential: Potential) -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 2)
    pixels = model.vae.pixels(model.vae.decode(eps_z).logits)
    unclamped = (pixels.mean + pixels.sigma * eps_x).abs()
    from_floor = pixels.sigma - (math.exp(-2) + 0.01)
    for values in (unclamped - 1, from_floor):
        assert bool((values > 1e-4).any() and (values < -1e-4).any()), "the point is on both sides of the kink"
        assert float(values.detach().abs().min()) > 1e-4, "and not on it"
    leaves = [eps.requires_grad_() for eps in (*eps_z, eps_x)]
    assert gradcheck(lambda *eps: model.potential(eps[:-1], eps[-1], potential), leaves)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_potential_and_grad_gives_the_potential_and_its_gradients(potential: Potential, temperature: float) -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 3, seed=1)
    u, gradients = model.potential_and_grad(eps_z, eps_x, potential, temperature)
    leaves = [eps.requires_grad_() for eps in (*eps_z, eps_x)]
    expected = model.potential(leaves[:-1], leaves[-1], potential, temperature)
    torch.testing.assert_close(u, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected.sum(), leaves)))


def test_paper_is_energy_plus_half_the_squared_noise() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 3)
    u, gradients = model.potential_and_grad(eps_z, eps_x, "energy")
    u_paper, gradients_paper = model.potential_and_grad(eps_z, eps_x, "paper")
    noise = [*eps_z, eps_x]
    torch.testing.assert_close(u_paper, u + sum(eps.square().flatten(1).sum(1) / 2 for eps in noise))
    torch.testing.assert_close(gradients_paper, [g + eps for g, eps in zip(gradients, noise, strict=True)])


def test_official_is_energy_minus_the_log_densities_of_latents_and_pixels() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 3)
    with torch.no_grad():
        difference = model.potential(eps_z, eps_x, "official") - model.potential(eps_z, eps_x, "energy")
        decoded = model.vae.decode(eps_z)
        # The second prior's sigma, from the law z = mu + sigma eps: two values of eps differ by it.
        raised = model.vae.decode([eps_z[0], eps_z[1] + 1])
        sigma = [torch.full_like(eps_z[0], 1.01), raised.z[1] - decoded.z[1]]
        log_p_z = [
            torch.distributions.Normal(0.0, 1.0).log_prob(e) - s.log() for e, s in zip(eps_z, sigma, strict=True)
        ]
        x = model.image(eps_z, eps_x)
        log_p_x = model.vae.pixels(decoded.logits).log_prob(x, log_sigma_floor=-2.0)
    expected = -sum(log_p.flatten(1).sum(1) for log_p in log_p_z) - log_p_x
    torch.testing.assert_close(difference, expected)


def test_temperature_scales_the_latents_noise_and_its_gradient_but_not_the_pixels() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 2)
    scaled = [0.6 * eps for eps in eps_z]
    u, gradients = model.potential_and_grad(eps_z, eps_x, "energy", temperature=0.6)
    u_scaled, gradients_scaled = model.potential_and_grad(scaled, eps_x, "energy")
    torch.testing.assert_close(u, u_scaled)
    torch.testing.assert_close(gradients, [*(0.6 * g for g in gradients_scaled[:-1]), gradients_scaled[-1]])


def test_u_and_gradient_of_an_image_do_not_depend_on_the_others() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 4)
    u, gradients = model.potential_and_grad(eps_z, eps_x, "official")
    for i in range(4):
        alone, gradients_alone = model.potential_and_grad(
            [eps[i : i + 1] for eps in eps_z], eps_x[i : i + 1], "official"
        )
        torch.testing.assert_close(alone, u[i : i + 1])
        torch.testing.assert_close(gradients_alone, [g[i : i + 1] for g in gradients])


def test_potential_and_grad_leaves_no_trace() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 2)
    noise = [eps.requires_grad_() for eps in (*eps_z, eps_x)]
    before = [eps.detach().clone() for eps in noise]
    u, gradients = model.potential_and_grad(noise[:-1], noise[-1], "official")
    assert not u.requires_grad and not any(g.requires_grad for g in gradients)
    assert all(tensor.grad is None for tensor in (*noise, *model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(eps, old) for eps, old in zip(noise, before, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_chains_run_where_autograd_is_off(mode: type[torch.no_grad]) -> None:
    sampler = LangevinSampler(tiny_grey_model(), steps=2, step_size=1e-2)
    expected = sampler.sample(range(3))
    with mode():
        assert torch.equal(sampler.sample(range(3)), expected)


def test_noise_that_does_not_fit_is_refused_by_name() -> None:
    model = tiny_grey_model().double()
    eps_z, eps_x = noise_of(model, 2)
    with pytest.raises(ValueError, match=r"'exact' is not known; it must be one of energy, paper, official\."):
        model.potential_and_grad(eps_z, eps_x, "exact")
    for wrong in (eps_x[:1], eps_x[:, :, :3], eps_x[0]):
        with pytest.raises(ValueError, match=r"eps_x has shape .*; this model needs \(2, 1, 4, 4\) \[N, C, H, W\]\."):
            model.potential_and_grad(eps_z, wrong)
    with pytest.raises(ValueError, match=r"eps_z has 0 tensors; this NVAE has 2 latent groups\."):
        model.potential_and_grad([], eps_x)
