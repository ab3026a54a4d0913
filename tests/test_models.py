"""Laws of the networks beyond the golden cases: every cell kind and layout, fresh weights, the five energy networks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import generic, swish, wn, written_out_wn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vaebm_fast.config import CELL_PLANS, ENERGY_ARCHS, PRESETS, EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import BatchNorm, BNSwish, Cell, WNConv2d
from vaebm_fast.noise import NoiseLayout

TINY = NVAEConfig(
    image_size=16,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=8,
    num_channels_dec=8,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)
TINY_ENERGY = EnergyConfig(image_size=16, image_channels=3, width=4, blocks=parse_blocks("1-1d 1-2 2-2d"))


def noise(vae: NVAE, batch: int) -> list[Tensor]:
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in vae.latent_shapes]


# Weight normalisation, data-dependent initialisation, batch normalisation.
def test_log_weight_norm_starts_at_the_log_of_the_norm_plus_a_hundredth() -> None:
    conv = WNConv2d(3, 5, 3)
    norm = conv.weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_weight_norm.flatten(), torch.log(norm + 1e-2))
    assert conv.log_weight_norm.shape == (5, 1, 1, 1)
    assert set(conv.state_dict()) == {"weight", "bias", "log_weight_norm"}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_norm_of_the_effective_weight_is_the_exponential_of_its_log(scale: float) -> None:
    conv = WNConv2d(3, 5, 3).double()
    conv.weight.data *= scale
    nn.init.normal_(conv.log_weight_norm)
    norm = conv.weight.flatten(1).norm(dim=1)
    actual = conv.effective_weight().flatten(1).norm(dim=1)
    torch.testing.assert_close(actual, conv.log_weight_norm.flatten().exp() * norm / (norm + 1e-5))
    cosine = F.cosine_similarity(conv.effective_weight().flatten(1), conv.weight.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


def outputs_of(convs: list[WNConv2d], run: Callable[[], object]) -> list[Tensor]:
    """What each of `convs` gives during `run`, in their order."""
    outputs: dict[WNConv2d, Tensor] = {}
    hooks = [
        conv.register_forward_hook(lambda module, inputs, output: outputs.update({module: output.detach()}))
        for conv in convs
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [outputs[conv] for conv in convs]


def assert_initialised(conv: WNConv2d, output: Tensor) -> None:
    """Standard deviation 1/5 per channel and, where a bias can see to it, mean 0."""
    std, mean = output.std(dim=(0, 2, 3)), output.mean(dim=(0, 2, 3))
    torch.testing.assert_close(std, torch.full_like(std, 0.2), rtol=1e-3, atol=0)  # 1e-5 is added to each divisor
    if conv.bias is not None:
        assert float(mean.abs().max()) < 1e-9


def test_data_dependent_initialisation_normalises_every_convolution_of_an_energy_network() -> None:
    energy = EnergyNetwork(TINY_ENERGY).double()
    images, linear = torch.rand(6, 3, 16, 16, dtype=torch.float64), energy.linear.weight.detach().clone()
    energy.initialize_from_data(images)
    state = {name: value.clone() for name, value in energy.state_dict().items()}
    convs = [module for module in energy.modules() if isinstance(module, WNConv2d)]
    assert len(convs) == 1 + 2 * 3 + 3
    for conv, output in zip(convs, outputs_of(convs, lambda: energy(images)), strict=True):
        assert_initialised(conv, output)
    assert torch.equal(energy.linear.weight, linear)
    energy(1 - images)
    assert all(torch.equal(value, state[name]) for name, value in energy.state_dict().items()), "it happens only once"


def test_data_dependent_initialisation_of_an_nvae_concerns_its_res_elu_cells_alone() -> None:
    vae = NVAE(replace(TINY, arch_instance="res_elu", num_nf=1)).double()
    x, eps_q = torch.rand(6, 3, 16, 16, dtype=torch.float64), noise(vae, 6)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.initialize_from_data(x, eps_q)
    names = [name for name, module in vae.named_modules() if name.endswith("conv_0") and "_ops" in name]
    convs: list[WNConv2d] = [vae.get_submodule(name) for name in names]
    assert len(convs) == 2 * (1 + 4 + 1 + 3 + 1 + 1), "pre, encoder, down, decoder, up, post: two operations a cell"
    for conv, output in zip(convs, outputs_of(convs, lambda: vae.elbo(x, eps_q)), strict=True):
        assert_initialised(conv, output)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.{entry}" for name in names for entry in ("log_weight_norm", "bias")}


def test_data_dependent_initialisation_leaves_other_nvaes_as_they_are() -> None:
    vae = NVAE(TINY)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.initialize_from_data(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_fresh_networks_have_neutral_batch_normalisation_and_a_uniform_first_feature() -> None:
    vae = NVAE(TINY)
    for module in vae.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())
    assert vae.prior_ftr0.shape == (8 * 4, 4, 4)
    assert bool(((vae.prior_ftr0 >= 0) & (vae.prior_ftr0 < 1)).all())
    assert vae.prior_ftr0.mean().item() == pytest.approx(0.5, abs=5 / (12 * 512) ** 0.5)


def test_one_training_batch_moves_the_running_statistics_by_a_twentieth() -> None:
    vae = NVAE(TINY).double()
    norms = [module for module in vae.modules() if isinstance(module, nn.BatchNorm2d)]
    inputs: dict[nn.Module, Tensor] = {}
    for norm in norms:
        norm.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0].detach()}))
    vae.elbo(torch.rand(3, 3, 16, 16, dtype=torch.float64))
    assert len(inputs) == len(norms) > 20
    for norm in norms:
        x = inputs[norm]
        torch.testing.assert_close(norm.running_mean, 0.05 * x.mean(dim=(0, 2, 3)))
        torch.testing.assert_close(norm.running_var, 0.95 + 0.05 * x.var(dim=(0, 2, 3), unbiased=True))


def test_both_spellings_of_batch_normalisation_divide_by_the_batchs_deviation() -> None:
    x = 3 + 0.01 * torch.randn(4, 5, 6, 6, dtype=torch.float64)
    expected = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / torch.sqrt(
        x.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    )
    torch.testing.assert_close(BatchNorm(5).double()(x), expected)
    torch.testing.assert_close(BNSwish(5).double()(x), expected * torch.sigmoid(expected))


# The NVAE.
def test_an_nvae_has_the_published_keys() -> None:
    vae = NVAE(replace(TINY, num_nf=1, num_channels_enc=4, num_preprocess_cells=2, num_postprocess_cells=2))
    state = vae.state_dict()
    outside_cells = {key for key in state if not re.search(r"\._ops\.|\.skip\.|\.se\.", key)}
    expected = {"prior_ftr0"} | wn("stem") | wn("enc0.1") | wn("image_conditional.1")
    expected |= set().union(*(wn(f"enc_sampler.{g}") for g in range(4)), *(wn(f"dec_sampler.{g}.1") for g in range(3)))
    # One encoder cell, one combiner, ..., the "down" cell at 4, no combiner after the very last group.
    expected |= wn("enc_tower.1.conv") | wn("enc_tower.3.conv") | wn("enc_tower.6.conv")
    # No cell before the first group; the "up" cell at 3.
    expected |= wn("dec_tower.0.conv") | wn("dec_tower.2.conv") | wn("dec_tower.5.conv") | wn("dec_tower.7.conv")
    for cell in itertools.product(range(4), (1, 2)):
        flow = "nf_cells.{}.cell{}.".format(*cell)
        expected |= (
            wn(flow + "conv.convz.0", bias=False) | wn(flow + "conv.convz.2", bias=False) | wn(flow + "mu.conv_0")
        )
    assert outside_cells == expected
    cells = {".".join(key.split(".")[:2]) for key in state if "._ops." in key}
    towers = {"enc_tower": (0, 2, 4, 5, 7), "dec_tower": (1, 3, 4, 6), "pre_process": (0, 1), "post_process": (0, 1)}
    assert cells == {f"{tower}.{index}" for tower, indices in towers.items() for index in indices}
    resampling = {key.rsplit(".", 2)[0] for key in state if ".skip." in key}
    assert resampling == {"pre_process.1.skip", "enc_tower.4.skip", "dec_tower.3.skip", "post_process.0.skip"}


def test_channels_double_with_every_halving_on_the_encoders_and_the_decoders_own_scale() -> None:
    state = NVAE(replace(TINY, num_channels_enc=4, num_channels_dec=6)).state_dict()
    shapes = {
        "stem.weight": (4, 3, 3, 3),
        "prior_ftr0": (6 * 4, 4, 4),
        "enc0.1.weight": (16, 16, 1, 1),
        "enc_sampler.0.weight": (4, 16, 3, 3),
        "enc_sampler.3.weight": (4, 8, 3, 3),
        "dec_sampler.0.1.weight": (4, 24, 1, 1),
        "dec_sampler.2.1.weight": (4, 12, 1, 1),
        "enc_tower.1.conv.weight": (8, 12, 1, 1),
        "enc_tower.6.conv.weight": (16, 24, 1, 1),
        "dec_tower.0.conv.weight": (24, 24 + 2, 1, 1),
        "dec_tower.7.conv.weight": (12, 12 + 2, 1, 1),
        "image_conditional.1.weight": (6, 6, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({"likelihood": "gaussian"}, 6),
        ({"likelihood": "gaussian", "image_channels": 1}, 2),
        ({"likelihood": "bernoulli", "image_channels": 1}, 1),
        ({"likelihood": "logistic_mixture", "num_mixture_dec": 5}, 50),
    ],
)
def test_the_likelihood_sets_the_number_of_logits(changes: dict[str, Any], channels: int) -> None:
    vae = NVAE(replace(TINY, **changes)).eval().double()
    assert vae.decode(noise(vae, 1)).logits.shape == (1, channels, 16, 16)


def check_laws(vae: NVAE) -> None:
    """What holds for any layout: shapes, gradients in every group, independent images, and a KL that knows its zero."""
    batch, config = 2, vae.config
    eps, x = noise(vae, batch), torch.rand(batch, *vae.image_shape, dtype=torch.float64)
    eps = [tensor.requires_grad_() for tensor in eps]
    decoded = vae.decode(eps)
    assert decoded.logits.shape[0::2] == (batch, config.image_size)
    assert [tuple(z.shape) for z in decoded.z] == [(batch, *shape) for shape in config.latent_shapes]
    gradients = torch.autograd.grad(decoded.logits, eps, torch.randn_like(decoded.logits))
    assert all(float(gradient.abs().max()) > 1e-12 for gradient in gradients), "every group matters"

    with torch.no_grad():
        elbo, decoded = vae.elbo(x, eps), vae.decode(eps)
        for i in range(batch):
            alone = vae.elbo(x[i : i + 1], [e[i : i + 1] for e in eps])
            for name in ("logits", "log_q", "log_p", "kl", "reconstruction_loss"):
                torch.testing.assert_close(getattr(alone, name), getattr(elbo, name)[i : i + 1])
            decoded_alone = vae.decode([e[i : i + 1] for e in eps])
            torch.testing.assert_close(decoded_alone.logits, decoded.logits[i : i + 1])
            torch.testing.assert_close(decoded_alone.log_p_z, decoded.log_p_z[i : i + 1])
        assert elbo.logits.shape == decoded.logits.shape
        assert elbo.kl.shape == (batch, len(config.latent_shapes))
        torch.testing.assert_close(elbo.kl_diag.sum(1), elbo.kl.mean(0))
        if config.num_nf:
            torch.testing.assert_close(elbo.kl.sum(1), elbo.log_q - elbo.log_p)
            return
        assert bool((elbo.kl > 0).all())
        for sampler in vae.enc_sampler:  # an encoder that says nothing
            sampler.weight.zero_()
            sampler.bias.zero_()
        silent = vae.elbo(x, eps)
        if config.res_dist:
            assert float(silent.kl.abs().max()) < 1e-12
            torch.testing.assert_close(silent.logits, decoded.logits)
        else:
            torch.testing.assert_close(silent.kl[:, 0], torch.zeros(batch, dtype=torch.float64))
            assert bool((silent.kl[:, 1:] > 0).all())


LAYOUTS: dict[str, dict[str, Any]] = {
    "res_elu": {"image_size": 8, "image_channels": 1, "num_groups_per_scale": 3},
    "res_bnelu": {"image_size": 20, "use_se": False, "res_dist": False},
    "res_bnswish": {"image_size": 64, "num_latent_scales": 4, "num_groups_per_scale": 5, "ada_groups": True},
    "mbconv_sep": {"image_size": 24, "num_channels_enc": 5, "num_channels_dec": 3},
    "mbconv_sep11": {"image_size": 12, "num_nf": 1},
    "mbconv_den": {"image_size": 16, "num_channels_enc": 8, "num_channels_dec": 16},
    "res_mbconv": {"image_size": 8, "num_latent_scales": 1, "num_preprocess_blocks": 2, "num_postprocess_blocks": 2},
    "res53_mbconv": {"image_size": 28, "image_channels": 1, "likelihood": "bernoulli", "num_preprocess_cells": 3},
    "res35_mbconv": {"image_size": 32, "num_latent_scales": 3, "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 0},
    "res55_mbconv": {
        "image_size": 16,
        "likelihood": "logistic_mixture",
        "num_mixture_dec": 3,
        "num_latent_per_group": 1,
    },
    "mbconv_res": {"image_size": 8, "num_preprocess_blocks": 0, "num_postprocess_blocks": 0, "res_dist": False},
}


@pytest.mark.parametrize("arch", CELL_PLANS)
def test_every_arch_instance_obeys_the_laws_at_an_odd_layout(arch: str) -> None:
    check_laws(generic(NVAE(replace(TINY, arch_instance=arch, **LAYOUTS[arch]))))


@st.composite
def layouts(draw: st.DrawFn) -> NVAEConfig:
    arch, channels = draw(st.sampled_from(sorted(CELL_PLANS))), st.integers(2, 6)
    if arch == "mbconv_den":
        channels = st.just(8)
    scales, ends, groups = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 3))
    likelihood = draw(st.sampled_from(["gaussian", "bernoulli", "logistic_mixture"]))
    enc_channels = draw(channels)
    return NVAEConfig(
        image_size=2 ** (scales + ends - 1) * draw(st.integers(1, 3)),
        image_channels=3 if likelihood == "logistic_mixture" else draw(st.sampled_from([1, 3])),
        likelihood=likelihood,
        num_mixture_dec=draw(st.integers(1, 3)),
        arch_instance=arch,
        use_se=draw(st.booleans()),
        res_dist=draw(st.booleans()),
        num_latent_scales=scales,
        num_groups_per_scale=groups,
        num_latent_per_group=draw(st.integers(1, 3)),
        ada_groups=draw(st.booleans()),
        num_channels_enc=enc_channels,
        num_channels_dec=enc_channels if scales == groups == 1 else draw(channels),
        num_preprocess_blocks=ends,
        num_preprocess_cells=draw(st.integers(1, 2)),
        num_cell_per_cond_enc=draw(st.integers(0, 2)),
        num_postprocess_blocks=ends,
        num_postprocess_cells=draw(st.integers(1, 2)),
        num_cell_per_cond_dec=draw(st.integers(0, 2)),
        num_nf=draw(st.integers(0, 1)),
    )


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(layouts())
def test_any_layout_obeys_the_laws(config: NVAEConfig) -> None:
    torch.manual_seed(0)  # for every example, so that one can be repeated
    check_laws(generic(NVAE(config)))


def test_one_scale_with_one_group_is_the_vanilla_form() -> None:
    vae = generic(NVAE(replace(TINY, num_latent_scales=1, num_groups_per_scale=1)))
    top_level = {key.split(".")[0] for key in vae.state_dict()}
    assert top_level == {
        "stem", "pre_process", "enc0", "enc_sampler", "stem_decoder", "prior_ftr0", "post_process", "image_conditional"
    }  # fmt: skip
    assert {key for key in vae.state_dict() if key.startswith("stem_decoder")} == wn("stem_decoder")
    assert vae.stem_decoder.weight.shape == (16, 2, 1, 1)
    eps = noise(vae, 3)
    decoded = vae.decode(eps, temperature=0.7)
    torch.testing.assert_close(decoded.z, [0.7 * 1.01 * eps[0]])
    expected = torch.distributions.Normal(0.0, 0.7 * 1.01).log_prob(decoded.z[0]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(decoded.log_p_z, expected)


def test_temperature_scales_the_noise_of_every_group() -> None:
    vae = generic(NVAE(TINY))
    eps = noise(vae, 2)
    cool, scaled = vae.decode(eps, temperature=0.6), vae.decode([0.6 * e for e in eps])
    torch.testing.assert_close(cool.logits, scaled.logits)
    torch.testing.assert_close(cool.z, scaled.z)


def test_a_batch_of_none_and_of_one() -> None:
    vae = generic(NVAE(TINY))
    for batch in (0, 1):
        assert vae.decode(noise(vae, batch)).logits.shape == (batch, 6, 16, 16)
        assert vae.elbo(torch.rand(batch, 3, 16, 16, dtype=torch.float64)).kl.shape == (batch, 4)


def test_padding_of_binary_digits_does_not_count() -> None:
    vae = NVAE(replace(TINY, image_size=32, image_channels=1, likelihood="bernoulli", uncounted_border=2))
    logits, x = torch.randn(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    other = torch.rand(1, 1, 32, 32)
    other[..., 2:30, 2:30] = x[..., 2:30, 2:30]
    assert torch.equal(vae.pixels(logits).log_prob(other), vae.pixels(logits).log_prob(x))
    other[..., 2, 29] += 0.1
    assert not torch.equal(vae.pixels(logits).log_prob(other), vae.pixels(logits).log_prob(x))


def test_evaluation_mode_changes_no_statistics() -> None:
    vae = NVAE(TINY).eval()
    before = {name: value.clone() for name, value in vae.named_buffers()}
    vae.elbo(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in vae.named_buffers())


def test_the_importance_weighted_bound_lies_between_the_mean_and_the_best_of_its_samples() -> None:
    vae = generic(NVAE(TINY))
    x, eps_q = torch.rand(2, 3, 16, 16, dtype=torch.float64), [noise(vae, 2) for _ in range(3)]
    single = torch.stack([vae.importance_weighted_bound(x, [eps]) for eps in eps_q])
    bound = vae.importance_weighted_bound(x, eps_q)
    assert bool((bound > single.mean(0)).all()) and bool((bound < single.max(0).values).all())
    elbo = vae.elbo(x, eps_q[0], log_sigma_floor=None)
    torch.testing.assert_close(single[0], elbo.log_p - elbo.log_q - elbo.reconstruction_loss)
    torch.testing.assert_close(vae.importance_weighted_bound(x, [eps_q[0]] * 4), single[0])


# Presets and energy networks, by their published sizes; the meta device holds no numbers.
@pytest.mark.parametrize(
    ("preset", "latents"),
    [("cifar10", 153_600), ("celeba_64", 134_400), ("lsun_church_64", 134_400), ("celeba_256", 1_745_920)],
)
def test_presets_have_the_published_noise(preset: str, latents: int) -> None:
    with torch.device("meta"):
        model = VAEBM.from_preset(preset)
    layout = NoiseLayout(model.latent_shapes, model.image_shape)
    assert layout.latent_dim == latents
    assert layout.dim == latents + 3 * model.image_shape[1] ** 2
    assert not model.training


def test_the_decoder_of_celeba_256_has_44_inverted_residuals_most_weights_at_low_resolution() -> None:
    with torch.device("meta"):
        vae = NVAE(PRESETS["celeba_256"].nvae)
    cells = [cell for cell in (*vae.dec_tower, *vae.post_process) if isinstance(cell, Cell)]
    weights = [sum(m.weight.numel() for m in cell._ops.modules() if isinstance(m, nn.Conv2d)) for cell in cells]
    assert len(cells) == 44
    assert sum(weights[-20:]) / 1e6 == pytest.approx(3, abs=0.5)  # at 64x64 and above
    assert sum(weights[:24]) / 1e6 == pytest.approx(121, abs=0.5)


@pytest.mark.parametrize(
    ("arch", "millions"), [("cifar32", 5.1), ("celeba64", 4.3), ("lsun64", 5.8), ("celeba256", 14.2)]
)
def test_energy_networks_have_the_published_sizes(arch: str, millions: float) -> None:
    with torch.device("meta"):
        energy = EnergyNetwork(ENERGY_ARCHS[arch].config())
    assert round(sum(parameter.numel() for parameter in energy.parameters()) / 1e6, 1) == millions


def written_out_energy(energy: EnergyNetwork, x: Tensor) -> Tensor:
    """E by the published formulas, from the state dictionary."""
    state = energy.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        return written_out_wn(state, name, x, padding=state[f"{name}.weight"].shape[-1] // 2)

    h = swish(conv("conv1", x)) / 1.1
    for index, block in enumerate(energy.config.blocks):
        y = conv(f"blocks.{index}.conv2", swish(conv(f"blocks.{index}.conv1", h)) / 1.1)
        changes = block.downsample or block.in_channels != block.out_channels
        y = y + (conv(f"blocks.{index}.skip.0", h) if changes else h)
        h = swish(F.avg_pool2d(y, 2) if block.downsample else y) / 1.1
    return h.sum(dim=(2, 3)) @ state["linear.weight"][0] + state["linear.bias"]


@pytest.mark.parametrize(
    "config",
    [
        ENERGY_ARCHS["mnist"].config(image_channels=1, width=4),
        EnergyConfig(8, 1, 3, parse_blocks("1-1d 1-1 1-2d 2-2")),
        EnergyConfig(10, 3, 2, parse_blocks("1-3, 3-3d, 3-1d")),  # 10 -> 5 -> 2: pooling drops the odd row
        EnergyConfig(5, 2, 1, parse_blocks("1-1")),
    ],
    ids=["mnist", "digits", "odd", "single block"],
)
def test_energy_networks_of_any_blocks_compute_the_published_formulas_image_by_image(config: EnergyConfig) -> None:
    energy = EnergyNetwork(config).double()
    x = torch.rand(3, *config.image_shape, dtype=torch.float64)
    together = energy(x)
    assert together.shape == (3,)
    torch.testing.assert_close(together, written_out_energy(energy, x))
    torch.testing.assert_close(torch.cat([energy(image[None]) for image in x]), together)
    assert energy(x[:0]).shape == (0,)


def test_energy_networks_have_the_published_keys() -> None:
    expected = wn("conv1") | {"linear.weight", "linear.bias"}
    for block in range(3):
        expected |= wn(f"blocks.{block}.conv1") | wn(f"blocks.{block}.conv2")
    expected |= wn("blocks.0.skip.0", bias=False) | wn("blocks.2.skip.0", bias=False)  # block 1 changes nothing
    energy = EnergyNetwork(EnergyConfig(16, 3, 4, parse_blocks("1-1d 1-1 1-2")))
    assert set(energy.state_dict()) == expected


# What does not fit is refused in a sentence.
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch_instance": "res_relu"}, "arch_instance 'res_relu' is not known; it is one of res_elu, "),
        ({"likelihood": "laplace"}, "likelihood 'laplace' is not known"),
        ({"num_groups_per_scale": 0}, "num_groups_per_scale is 0; it must be at least 1"),
        ({"num_nf": -1}, "num_nf is -1; it must be at least 0"),
        ({"num_x_bits": 9}, "num_x_bits is 9; images are read with 1 to 8 bits"),
        ({"num_preprocess_blocks": 2}, r"num_preprocess_blocks \(2\) and num_postprocess_blocks \(1\) differ"),
        ({"image_size": 18}, "image_size 18 is not a multiple of 4"),
        ({"likelihood": "logistic_mixture", "image_channels": 1}, "it cannot model 1 channels"),
        ({"uncounted_border": 8}, "uncounted_border 8 leaves no pixel of a 16-pixel image"),
        (
            {"num_latent_scales": 1, "num_groups_per_scale": 1, "num_channels_enc": 4},
            r"num_channels_enc \(4\) and num_channels_dec \(8\) must be equal",
        ),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused_in_a_sentence(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"{words}.*\.$"):
        replace(TINY, **changes)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: parse_blocks("1-1 1x2"), "'1x2' is not of the form IN-OUT or IN-OUTd"),
        (lambda: replace(TINY_ENERGY, blocks=()), "at least one block"),
        (lambda: replace(TINY_ENERGY, blocks=parse_blocks("1-2 1-2")), "Block 1 takes 1 x width .* gives 2"),
        (lambda: replace(TINY_ENERGY, image_size=2), "image_size 2 is smaller than 4"),
        (lambda: replace(TINY_ENERGY, width=0), "width is 0"),
    ],
)
def test_energy_networks_that_cannot_be_are_refused_in_a_sentence(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"{words}.*\.$"):
        build()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ([], r"eps_z has 0 tensors; this NVAE has 4 latent groups\."),
        ([(1, 2, 4, 4)] * 4, r"eps_z\[2\] has shape \(1, 2, 4, 4\); group 2 needs \(1, 2, 8, 8\)"),
        ([(1, 2, 4, 4), (2, 2, 4, 4), (1, 2, 8, 8), (1, 2, 8, 8)], r"eps_z\[1\] .* needs \(1, 2, 4, 4\)"),
        ([(2, 4, 4), (2, 4, 4), (2, 8, 8), (2, 8, 8)], r"eps_z\[0\] .* needs \(2, 2, 4, 4\)"),
    ],
)
def test_noise_that_does_not_fit_is_refused_by_group(shapes: list[tuple[int, ...]], words: str) -> None:
    vae = NVAE(TINY).eval()
    wrong = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        vae.decode(wrong)
    with pytest.raises(ValueError, match=words):
        vae.elbo(torch.zeros(wrong[0].shape[0] if wrong else 1, 3, 16, 16), wrong)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 8), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"this NVAE takes \[N, C, H, W\] = \('N', 3, 16, 16\)\."):
        NVAE(TINY).elbo(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"this energy network takes \[N, C, H, W\] = \('N', 3, 16, 16\)\."):
        EnergyNetwork(TINY_ENERGY)(torch.zeros(shape))


def test_a_joint_model_needs_the_same_images_and_gaussian_pixels() -> None:
    vae, energy = NVAE(TINY), EnergyNetwork(TINY_ENERGY)
    assert VAEBM(vae, energy).image_shape == (3, 16, 16)
    for other in (replace(TINY_ENERGY, image_size=32), replace(TINY_ENERGY, image_channels=1)):
        with pytest.raises(
            ValueError, match=r"images of shape \(3, 16, 16\) .* takes \(.*\); load two files that belong"
        ):
            VAEBM(vae, EnergyNetwork(other))
    with pytest.raises(
        ValueError, match=r"Gaussian pixels \(num_mixture_dec = 1\); this one has logistic_mixture pixels\."
    ):
        VAEBM(NVAE(replace(TINY, likelihood="logistic_mixture")), energy)


def test_a_preset_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (VAEBM.from_preset("digits", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), untouched)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["vae.prior_ftr0"], other["vae.prior_ftr0"])
    with pytest.raises(ValueError, match=r"Preset 'mnist' is not known; there are cifar10, .*digits\."):
        VAEBM.from_preset("mnist")
