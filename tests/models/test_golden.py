"""Every number of the golden cases, at the tolerances of their README: relative error in norm, float32 on a CPU."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vaebm_fast as vf
from tests.helpers.golden import CASES, ENERGY_CASES, REPOSITORY, case_path, load_expected, relative_error
from vaebm_fast import reference
from vaebm_fast.chain.langevin import langevin_chain
from vaebm_fast.chain.noise import seed_tensor
from vaebm_fast.config import EnergyTraining, NVAEConfig, VAETraining
from vaebm_fast.data import quantise
from vaebm_fast.models.distributions import GaussianPixels, LogisticMixturePixels
from vaebm_fast.models.layers import effective_weight
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.training.energy import EnergyUpdate
from vaebm_fast.training.losses import (
    batchnorm_loss,
    kl_alpha,
    kl_balance,
    kl_coeff,
    reconstruction_and_kl,
    regulariser_coeff,
)
from vaebm_fast.training.spectral import SpectralRegulariser

GAUSSIAN_CASES = ENERGY_CASES


@cache
def expected_of(case: str) -> dict[str, Any]:
    return load_expected(case)


@cache
def nvae_of(case: str) -> vf.NVAE:
    return vf.load_nvae(case_path(case, "nvae.pt"))


@cache
def model_of(case: str) -> vf.VAEBM:
    return vf.VAEBM(nvae_of(case), vf.load_energy(case_path(case, "energy.pth")))


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    assert len(actual) == len(expected)
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_decoding_noise_gives_logits_latents_and_log_prior(case: str, temperature: float) -> None:
    expected = expected_of(case)["decode"]
    with torch.no_grad():
        decoded = nvae_of(case).decode(expected["eps_z"], temperature)
    assert relative_error(decoded.logits, expected[f"logits_t{temperature}"]) < 1e-5
    assert largest_error(decoded.z, expected[f"z_t{temperature}"]) < 1e-5
    assert relative_error(decoded.log_p_z, expected[f"log_p_z_t{temperature}"]) < 1e-5


@pytest.mark.parametrize("case", GAUSSIAN_CASES)
def test_gaussian_pixels_give_mean_sigma_sample_and_density(case: str) -> None:
    expected = expected_of(case)["decode"]
    pixels = nvae_of(case).pixels(expected["logits_t1.0"])
    assert isinstance(pixels, GaussianPixels)
    assert relative_error(pixels.mean, expected["x_mean"]) < 1e-5
    assert relative_error(pixels.sigma, expected["x_sigma"]) < 1e-5
    assert relative_error(pixels.sample(expected["eps_x"]), expected["x"]) < 1e-5
    assert relative_error(pixels.log_prob(expected["x"]), expected["log_p_x"]) < 1e-5


def test_bernoulli_pixels_give_their_mean() -> None:
    expected = expected_of("mnist_tiny")["decode"]
    pixels = nvae_of("mnist_tiny").pixels(expected["logits_t1.0"])
    assert relative_error(pixels.mean, expected["bernoulli_mean"]) < 1e-5


def test_logistic_mixture_pixels_give_a_sample_from_uniforms() -> None:
    expected = expected_of("dml_tiny")["decode"]
    pixels = nvae_of("dml_tiny").pixels(expected["logits_t1.0"])
    assert isinstance(pixels, LogisticMixturePixels)
    assert relative_error(pixels.sample(expected["u_mixture"], expected["u_logistic"]), expected["x"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_elbo_in_evaluation_mode(case: str) -> None:
    expected, vae = expected_of(case)["elbo_eval"], nvae_of(case)
    if vae.config.likelihood != "bernoulli":
        assert relative_error(quantise(expected["image"], vae.config.num_x_bits), expected["x"]) < 1e-6
    with torch.no_grad():
        elbo = vae.elbo(expected["x"], expected["eps_q"])
    for name in ("logits", "log_q", "log_p", "kl", "kl_diag", "reconstruction_loss"):
        assert relative_error(getattr(elbo, name), expected[name]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_elbo_in_training_mode_with_gradients_and_running_statistics(case: str) -> None:
    evaluation, expected = expected_of(case)["elbo_eval"], expected_of(case)["elbo_train"]
    vae = vf.load_nvae(case_path(case, "nvae.pt")).train()
    elbo = vae.elbo(evaluation["x"], evaluation["eps_q"])
    for name in ("logits", "log_q", "log_p", "kl", "kl_diag", "reconstruction_loss"):
        assert relative_error(getattr(elbo, name), expected[name]) < 1e-5, name
    alpha = kl_alpha(vae.config.groups_per_scale)
    assert relative_error(alpha, expected["kl_alpha"]) < 1e-6
    assert relative_error(kl_balance(elbo.kl, alpha), expected["kl_balance"]) < 1e-5
    loss = reconstruction_and_kl(elbo, expected["kl_coeff"], alpha)
    assert relative_error(loss, expected["loss"]) < 1e-5
    loss.backward()
    norms = {name: float(parameter.grad.norm()) for name, parameter in vae.named_parameters()}
    assert set(norms) == set(expected["grad_norm"])
    largest = float(max(expected["grad_norm"].values()))
    for name, norm in expected["grad_norm"].items():
        assert abs(norms[name] - float(norm)) <= 1e-4 * float(norm) + 1e-6 * largest, name
    buffers = dict(vae.named_buffers())
    for name, buffer in expected["buffers"].items():
        assert relative_error(buffers[name].double(), buffer.double()) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_nvae_spectral_norms_and_batchnorm_loss(case: str) -> None:
    expected, vae = expected_of(case), nvae_of(case)
    convs = {name: module for name, module in vae.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(convs) == set(expected["spectral"])
    for name, conv in convs.items():
        norm = torch.linalg.matrix_norm(effective_weight(conv).flatten(1), ord=2)
        assert relative_error(norm, expected["spectral"][name]) < 1e-5, name
    converged = SpectralRegulariser(vae, first_iterations=500)()
    assert relative_error(converged, torch.stack(list(expected["spectral"].values())).sum()) < 1e-5
    assert relative_error(batchnorm_loss(vae), expected["batchnorm_loss"]) < 1e-5


@pytest.mark.parametrize("case", ENERGY_CASES)
def test_energies_and_their_spectral_norms(case: str) -> None:
    expected, energy = expected_of(case)["energy"], model_of(case).energy
    with torch.no_grad():
        assert relative_error(energy(expected["x"]), expected["E"]) < 1e-4
    convs = {name: module for name, module in energy.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(convs) == set(expected["spectral"])
    for name, conv in convs.items():
        norm = torch.linalg.matrix_norm(effective_weight(conv).flatten(1), ord=2)
        assert relative_error(norm, expected["spectral"][name]) < 1e-5, name


@pytest.mark.parametrize("potential", ["energy", "official", "paper"])
@pytest.mark.parametrize("case", ENERGY_CASES)
def test_gradients_of_the_potential_in_noise_space(case: str, potential: Any) -> None:
    noise, expected = expected_of(case)["decode"], expected_of(case)[f"grad_{potential}"]
    _, gradients = model_of(case).potential_and_grad(noise["eps_z"], noise["eps_x"], potential=potential)
    assert largest_error(gradients, [*expected["eps_z"], expected["eps_x"]]) < 1e-4


@pytest.mark.parametrize("potential", ["official", "paper"])
@pytest.mark.parametrize("case", ENERGY_CASES)
def test_chain_on_given_noise(case: str, potential: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference of the update with recorded noise in place of its own."""
    golden, model = expected_of(case), model_of(case)
    expected, start = golden[f"chain_{potential}"], golden["decode"]
    layout = model.noise_layout
    noise = [layout.join([eps.float() for eps in eps_z], eps_x.float()) for *eps_z, eps_x in golden["chain_noise"]]
    monkeypatch.setattr(reference, "philox_normal", lambda seeds, draw, **_: noise[int(draw) - 1])
    seeds = seed_tensor(range(noise[0].shape[0]))
    update = partial(langevin_update, seeds=seeds, stream=0, backend="reference")
    energies: list[Tensor] = []

    def potential_and_grad(eps: Tensor) -> tuple[Tensor, Tensor]:
        eps_z, eps_x = layout.split(eps)
        energies.append(model.potential_and_grad(eps_z, eps_x, potential="energy")[0])
        u, gradients = model.potential_and_grad(eps_z, eps_x, potential=potential)
        return u, layout.join(gradients[:-1], gradients[-1])

    eps = langevin_chain(
        potential_and_grad,
        layout.join(start["eps_z"], start["eps_x"]),
        update,
        step_sizes=[expected["step_size"]] * expected["num_steps"],
    ).eps
    eps_z, eps_x = layout.split(eps)
    assert relative_error(torch.stack(energies), expected["energies"]) < 1e-4
    assert largest_error([*eps_z, eps_x], [*expected["eps_z"], expected["eps_x"]]) < 1e-5
    mean = model.vae.pixels(model.vae.decode(eps_z).logits).mean
    assert relative_error(mean, expected["x_mean"]) < 1e-5
    assert relative_error(model.mean_image(eps_z), expected["x_mean"].clamp(-1, 1) / 2 + 0.5) < 1e-5


def fresh_energy(case: str, state: dict[str, Tensor] | None = None) -> vf.EnergyNetwork:
    energy = vf.load_energy(case_path(case, "energy.pth")).train()
    if state is not None:
        energy.load_state_dict(state)
    return energy


@pytest.mark.parametrize("case", ENERGY_CASES)
def test_data_dependent_initialisation(case: str) -> None:
    expected = expected_of(case)["data_init"]
    energy = fresh_energy(case, expected["before"])
    energy.initialize_from_data(expected["images"].float())
    for name, tensor in energy.state_dict().items():
        assert relative_error(tensor, expected["after"][name]) < 1e-4, name


@pytest.mark.parametrize("entry", ["energy_train", "energy_train_spectral"])
@pytest.mark.parametrize("case", [case for case in ENERGY_CASES if case != "hq_tiny"])
def test_three_iterations_of_energy_training(case: str, entry: str) -> None:
    expected = expected_of(case)[entry]
    energy = fresh_energy(case)
    training = EnergyTraining(
        learning_rate=expected["lr"],
        beta1=expected["betas"][0],
        beta2=expected["betas"][1],
        weight_decay=expected["weight_decay"],
        spectral_coeff=expected["alpha_s"],
    )
    update = EnergyUpdate(energy, training)
    start = expected["power_iteration_start"]
    if start:
        vectors = {side: {name: pair[i] for name, pair in start.items()} for i, side in enumerate("uv")}
        update.spectral.load_state_dict(vectors)
    batches = zip(expected["positive"], expected["negative"], strict=True)
    scalars = [update(positive.float(), negative.float()) for positive, negative in batches]
    assert relative_error(torch.stack([s["loss"] for s in scalars]), expected["loss"]) < 1e-4
    assert relative_error(torch.stack([s["spectral"] for s in scalars]), expected["spectral_loss"]) < 1e-4
    for name, tensor in energy.state_dict().items():
        assert relative_error(tensor, expected["after"][name]) < 1e-4, name


def test_schedules() -> None:
    schedules = json.loads((REPOSITORY / "tests" / "golden" / "schedules.json").read_text())
    kl = schedules["kl_coeff"]
    for step, value in kl["values"].items():
        coeff = kl_coeff(
            int(step), kl["total_iterations"], kl["anneal_portion"], kl["const_portion"], kl["const_coeff"]
        )
        assert coeff == pytest.approx(value, rel=1e-9)
    for groups, weights in schedules["kl_alpha"].items():
        assert kl_alpha(json.loads(groups)).tolist() == pytest.approx(weights)
    for arguments, groups in schedules["groups_per_scale"].items():
        scales, per_scale, adaptive, least = arguments.strip("()").split(", ")
        config = NVAEConfig(
            image_size=64,
            num_latent_scales=int(scales),
            num_groups_per_scale=int(per_scale),
            ada_groups=adaptive == "True",
            min_groups_per_scale=int(least),
        )
        assert list(config.groups_per_scale) == groups
    anneal = schedules["weight_decay_norm_anneal"]
    training = VAETraining(
        weight_decay_norm=anneal["final"], weight_decay_norm_anneal=True, weight_decay_norm_init=anneal["init"]
    )
    for coefficient, value in anneal["values"].items():
        assert regulariser_coeff(float(coefficient), training) == pytest.approx(value, rel=1e-9)
