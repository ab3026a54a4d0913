"""Laws of the chain, and of the three potentials it descends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from vaebm_fast.config import POTENTIALS, EnergyConfig, NVAEConfig, Potential, parse_blocks
from vaebm_fast.langevin import LangevinSampler, NonFiniteChainError, langevin_chain, to_uint8
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import DecoderCombiner
from vaebm_fast.noise import Stream, normal, seed_tensor
from vaebm_fast.ops.langevin_update import langevin_update

TINY_NVAE = NVAEConfig(
    image_size=4,
    image_channels=1,
    num_latent_scales=2,
    num_groups_per_scale=1,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)
TINY_ENERGY = EnergyConfig(image_size=4, image_channels=1, width=3, blocks=parse_blocks("1-1d 1-2"))


def tiny_model() -> VAEBM:
    """26 noise elements per image; pixels on both sides of the clamp and log sigmas on both sides of the floor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = VAEBM(NVAE(TINY_NVAE), EnergyNetwork(TINY_ENERGY)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        model.energy.initialize_from_data(torch.rand(8, 1, 4, 4))
    for cell in model.vae.dec_tower:
        if isinstance(cell, DecoderCombiner):
            cell.conv.log_weight_norm.data += 1
    head = model.vae.image_conditional[1]
    head.log_weight_norm.data += 2.5
    head.bias.data = torch.tensor([0.5, -2.5])
    model.energy.linear.weight.data *= 50
    return model


class Bowl:
    """U = |eps|^2 / 2 in every potential: a chain model without networks."""

    latent_shapes = [(3, 4, 5), (2, 8, 10)]
    image_shape = (1, 60, 64)

    def energy_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        noise = [*eps_z, eps_x]
        return torch.stack([0.5 * (eps * eps).flatten(1).sum(1) for eps in noise]).sum(0), noise

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor:
        return eps_z[0].flatten(1).mean(1).sigmoid().reshape(-1, 1, 1, 1).expand(-1, *self.image_shape)


def noise_of(model: VAEBM, count: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Float64 noise of `count` images."""
    generator = torch.Generator().manual_seed(seed)
    *eps_z, eps_x = (
        torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        for shape in (*model.latent_shapes, model.image_shape)
    )
    return eps_z, eps_x


# The update.
@pytest.mark.parametrize("step_size", [0.3, 1.0, 3.0])
def test_stationary_variance_in_a_bowl_is_one_over_one_minus_a_quarter_step(step_size: float) -> None:
    eps = LangevinSampler(Bowl(), steps=60, step_size=step_size).run(range(16)).eps
    expected = 1 / (1 - step_size / 4)
    # 5 standard deviations of the estimates; elements are independent, and the start has decayed below 1e-8.
    assert abs(float(eps.var()) - expected) < 5 * expected * math.sqrt(2 / eps.numel())
    assert abs(float(eps.mean())) < 5 * math.sqrt(expected / eps.numel())


def test_a_chain_repeats_the_update_it_is_given_and_records_u_before_each_step() -> None:
    start, noise = torch.randn(2, 5), torch.randn(3, 2, 5)
    given, states = start.clone(), [start]

    def update(eps: Tensor, gradient: Tensor, *, draw: Tensor, nonfinite_at: Tensor) -> None:
        eps += -0.05 * gradient + math.sqrt(0.1) * noise[int(draw) - 1]

    final, potentials = langevin_chain(
        lambda eps: (eps.square().sum(1), 2 * eps),
        start,
        update,
        steps=3,
        on_step=lambda k, eps: states.append(eps.clone()),
    )
    assert torch.equal(start, given)
    for k in range(3):
        expected = states[k] - 0.05 * 2 * states[k] + math.sqrt(0.1) * noise[k]
        torch.testing.assert_close(states[k + 1], expected)
        assert torch.equal(potentials[k], states[k].square().sum(1))
    assert torch.equal(final, states[3])


def test_draw_k_of_a_seed_is_the_noise_of_step_k_and_draw_zero_its_start() -> None:
    sampler = LangevinSampler(Bowl(), steps=2, step_size=0.5)
    keys = seed_tensor([5, 2**64 - 1])
    for stream in (Stream.CHAIN, Stream.TRAIN_CHAIN):
        expected = normal(keys, 0, stream, sampler.layout.dim)
        for k in (1, 2):
            expected = expected - 0.25 * expected + math.sqrt(0.5) * normal(keys, k, stream, sampler.layout.dim)
        for seeds in ([5, 2**64 - 1], keys):
            assert torch.equal(sampler.run(seeds, stream=stream).eps, expected)


def test_noise_of_a_chain_has_the_same_bits_in_any_batch_and_order() -> None:
    sampler = LangevinSampler(Bowl(), steps=3, step_size=0.5)
    seeds = [7, 0, 123456789, 3, 2**63]
    together = sampler.run(seeds).eps
    assert torch.equal(sampler.run(seeds[::-1]).eps.flip(0), together)
    assert torch.equal(torch.cat([sampler.run([seed]).eps for seed in seeds]), together)


def test_a_given_start_replaces_the_seeds_own() -> None:
    sampler = LangevinSampler(Bowl(), steps=1, step_size=0.5)
    own = sampler.start([1, 2])
    given = own.clone()
    assert torch.equal(sampler.run([1, 2], start=own).eps, sampler.run([1, 2]).eps)
    assert torch.equal(own, given), "the caller's start is not written to"
    moved = sampler.run([1, 2], start=own + 1).eps - sampler.run([1, 2]).eps
    torch.testing.assert_close(moved, torch.full_like(moved, 0.75))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_chains_that_leave_the_numbers_are_named_with_the_first_step_after_one_wait(bad: float) -> None:
    calls = 0

    def energy_and_grad(eps: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        gradient = torch.zeros_like(eps)
        gradient[4, 1] = bad if calls == 3 else 0
        gradient[1, 0] = bad if calls == 2 else 0
        return eps.sum(1), gradient

    update = partial(langevin_update, seeds=seed_tensor(range(6)), stream=0, step_size=0.1)
    with pytest.raises(NonFiniteChainError, match=r"^2 chains .* first at step 2 \(positions \[1, 4\]\)") as caught:
        langevin_chain(energy_and_grad, torch.zeros(6, 3), update, steps=5)
    assert caught.value.images == [1, 4]
    assert calls == 5, "the host looks once, when all steps are done"


# The sampler.
def test_images_do_not_depend_on_the_batch() -> None:
    sampler = LangevinSampler(tiny_model(), steps=4, step_size=1e-2)
    seeds = list(range(10, 17))
    together = sampler.run(seeds).images
    assert together.shape == (7, 1, 4, 4)
    assert float(together.std()) > 0.1
    for split in (1, 3):
        parts = [sampler.run(seeds[at : at + split]).images for at in range(0, 7, split)]
        torch.testing.assert_close(torch.cat(parts), together, rtol=0, atol=1e-5)
    torch.testing.assert_close(sampler.run(seeds[::-1]).images.flip(0), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_samples_are_the_mean_images_as_uint8_in_the_order_of_their_seeds(batch_size: int) -> None:
    sampler = LangevinSampler(tiny_model(), steps=2, step_size=1e-2)
    images = sampler.sample((seed for seed in range(7)), batch_size)
    assert images.dtype == torch.uint8 and images.shape == (7, 4, 4, 1)
    expected = 255 * sampler.run(range(7)).images.permute(0, 2, 3, 1)
    assert float((images - expected).abs().max()) < 0.5 + 1e-2


def test_no_seeds_give_no_images() -> None:
    sampler = LangevinSampler(tiny_model(), steps=2, step_size=1e-2)
    images = sampler.sample([])
    assert images.dtype == torch.uint8 and images.shape == (0, 4, 4, 1)
    assert sampler.run([]).potentials.shape == (2, 0)


def test_zero_steps_give_the_means_of_the_nvae_itself() -> None:
    model = tiny_model()
    sampler = LangevinSampler(model, steps=0, step_size=1.0)
    chains = sampler.run([1, 2, 3])
    assert torch.equal(chains.eps, normal(seed_tensor([1, 2, 3]), 0, Stream.CHAIN, 26))
    assert chains.potentials.shape == (0, 3)
    eps_z, _ = sampler.layout.split(chains.eps)
    mean = model.vae.pixels(model.vae.decode(eps_z).logits).mean
    torch.testing.assert_close(chains.images, mean.clamp(-1, 1) / 2 + 0.5)
    assert not chains.images.requires_grad


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_sampler_descends_its_potential_at_its_temperature(potential: Potential) -> None:
    model = tiny_model()
    sampler = LangevinSampler(model, steps=1, step_size=1e-2, potential=potential, temperature=0.7)
    chains = sampler.run([4, 5])
    start = sampler.start([4, 5])
    u, gradients = model.energy_and_grad(*sampler.layout.split(start), potential, 0.7)
    noise = normal(seed_tensor([4, 5]), 1, Stream.CHAIN, 26)
    expected = start - 0.5e-2 * sampler.layout.join(gradients[:-1], gradients[-1]) + 0.1 * noise
    torch.testing.assert_close(chains.potentials, u[None])
    torch.testing.assert_close(chains.eps, expected)
    eps_z, _ = sampler.layout.split(chains.eps)
    torch.testing.assert_close(chains.images, model.mean_image([0.7 * eps for eps in eps_z]).detach())


def test_uint8_is_255_times_the_image_rounded_and_never_rescaled() -> None:
    x = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 100 / 255, 1.0, 1.5, -0.2, 254.4 / 255]).reshape(1, 2, 2, 2)
    assert to_uint8(x).tolist() == [[[[0, 255], [0, 255]], [[1, 0], [100, 254]]]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"steps": -1}, r"steps is -1; a chain has 0 steps or more\."),
        ({"step_size": 0.0}, r"step_size is 0\.0; it must be a positive number\."),
        ({"step_size": math.nan}, r"step_size is nan; it must be a positive number\."),
        ({"step_size": math.inf}, r"step_size is inf; it must be a positive number\."),
        ({"potential": "exact"}, r"'exact' is not known; it is one of energy, paper, official\."),
    ],
)
def test_settings_that_make_no_chain_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LangevinSampler(Bowl(), **{"steps": 1, "step_size": 0.1, **arguments})


def test_a_start_of_another_shape_and_an_empty_batch_size_are_refused() -> None:
    sampler = LangevinSampler(tiny_model(), steps=1, step_size=0.1)
    for shape in ((1, 26), (2, 25)):
        with pytest.raises(ValueError, match=r"start has shape .*; 2 seeds of this model need \(2, 26\)\."):
            sampler.run([1, 2], start=torch.zeros(shape))
    for batch_size in (0, -1):
        with pytest.raises(ValueError, match="batch_size is .*; it must be at least 1"):
            sampler.sample([1, 2], batch_size)


# The potentials.
@pytest.mark.parametrize("potential", POTENTIALS)
def test_potentials_pass_gradcheck_in_noise_space(potential: Potential) -> None:
    model = tiny_model().double()
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
def test_energy_and_grad_gives_the_potential_and_its_gradients(potential: Potential, temperature: float) -> None:
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 3, seed=1)
    u, gradients = model.energy_and_grad(eps_z, eps_x, potential, temperature)
    leaves = [eps.requires_grad_() for eps in (*eps_z, eps_x)]
    expected = model.potential(leaves[:-1], leaves[-1], potential, temperature)
    torch.testing.assert_close(u, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected.sum(), leaves)))


def test_paper_is_energy_plus_half_the_squared_noise() -> None:
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 3)
    u, gradients = model.energy_and_grad(eps_z, eps_x, "energy")
    u_paper, gradients_paper = model.energy_and_grad(eps_z, eps_x, "paper")
    noise = [*eps_z, eps_x]
    torch.testing.assert_close(u_paper, u + sum(eps.square().flatten(1).sum(1) / 2 for eps in noise))
    torch.testing.assert_close(gradients_paper, [g + eps for g, eps in zip(gradients, noise, strict=True)])


def test_official_is_energy_minus_the_log_densities_of_latents_and_pixels() -> None:
    model = tiny_model().double()
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
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 2)
    scaled = [0.6 * eps for eps in eps_z]
    u, gradients = model.energy_and_grad(eps_z, eps_x, "energy", temperature=0.6)
    u_scaled, gradients_scaled = model.energy_and_grad(scaled, eps_x, "energy")
    torch.testing.assert_close(u, u_scaled)
    torch.testing.assert_close(gradients, [*(0.6 * g for g in gradients_scaled[:-1]), gradients_scaled[-1]])


def test_u_and_gradient_of_an_image_do_not_depend_on_the_others() -> None:
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 4)
    u, gradients = model.energy_and_grad(eps_z, eps_x, "official")
    for i in range(4):
        alone, gradients_alone = model.energy_and_grad([eps[i : i + 1] for eps in eps_z], eps_x[i : i + 1], "official")
        torch.testing.assert_close(alone, u[i : i + 1])
        torch.testing.assert_close(gradients_alone, [g[i : i + 1] for g in gradients])


def test_energy_and_grad_leaves_no_trace() -> None:
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 2)
    noise = [eps.requires_grad_() for eps in (*eps_z, eps_x)]
    before = [eps.detach().clone() for eps in noise]
    u, gradients = model.energy_and_grad(noise[:-1], noise[-1], "official")
    assert not u.requires_grad and not any(g.requires_grad for g in gradients)
    assert all(tensor.grad is None for tensor in (*noise, *model.parameters()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(eps, old) for eps, old in zip(noise, before, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_chains_run_where_autograd_is_off(mode: type[torch.no_grad]) -> None:
    sampler = LangevinSampler(tiny_model(), steps=2, step_size=1e-2)
    expected = sampler.sample(range(3))
    with mode():
        assert torch.equal(sampler.sample(range(3)), expected)


def test_noise_that_does_not_fit_is_refused_by_name() -> None:
    model = tiny_model().double()
    eps_z, eps_x = noise_of(model, 2)
    with pytest.raises(ValueError, match=r"'exact' is not known; it is one of energy, paper, official\."):
        model.energy_and_grad(eps_z, eps_x, "exact")
    for wrong in (eps_x[:1], eps_x[:, :, :3], eps_x[0]):
        with pytest.raises(ValueError, match=r"eps_x has shape .*; this model needs \(2, 1, 4, 4\) \[N, C, H, W\]\."):
            model.energy_and_grad(eps_z, wrong)
    with pytest.raises(ValueError, match=r"eps_z has 0 tensors; this NVAE has 2 latent groups\."):
        model.energy_and_grad([], eps_x)
