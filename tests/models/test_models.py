"""Laws of the NVAE beyond the golden cases: every cell kind and layout, fresh weights."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.builders import SMALL_NVAE, double_noise, generic, wn
from vaebm_fast.config import CELL_PLANS, NVAEConfig
from vaebm_fast.models import NVAE, VAEBM


# The NVAE.
def test_an_nvae_has_the_published_keys() -> None:
    vae = NVAE(replace(SMALL_NVAE, num_nf=1, num_channels_enc=4, num_preprocess_cells=2, num_postprocess_cells=2))
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
    state = NVAE(replace(SMALL_NVAE, num_channels_enc=4, num_channels_dec=6)).state_dict()
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
    vae = NVAE(replace(SMALL_NVAE, **changes)).eval().double()
    assert vae.decode(double_noise(vae, 1)).logits.shape == (1, channels, 16, 16)


def check_laws(vae: NVAE) -> None:
    """What holds for any layout: shapes, gradients in every group, independent images, and a KL that knows its zero."""
    batch, config = 2, vae.config
    eps, x = double_noise(vae, batch), torch.rand(batch, *vae.image_shape, dtype=torch.float64)
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
    check_laws(generic(NVAE(replace(SMALL_NVAE, arch_instance=arch, **LAYOUTS[arch]))))


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
    vae = generic(NVAE(replace(SMALL_NVAE, num_latent_scales=1, num_groups_per_scale=1)))
    top_level = {key.split(".")[0] for key in vae.state_dict()}
    assert top_level == {
        "stem", "pre_process", "enc0", "enc_sampler", "stem_decoder", "prior_ftr0", "post_process", "image_conditional"
    }  # fmt: skip
    assert {key for key in vae.state_dict() if key.startswith("stem_decoder")} == wn("stem_decoder")
    assert vae.stem_decoder.weight.shape == (16, 2, 1, 1)
    eps = double_noise(vae, 3)
    decoded = vae.decode(eps, temperature=0.7)
    torch.testing.assert_close(decoded.z, [0.7 * 1.01 * eps[0]])
    expected = torch.distributions.Normal(0.0, 0.7 * 1.01).log_prob(decoded.z[0]).sum(dim=(1, 2, 3))
    torch.testing.assert_close(decoded.log_p_z, expected)


def test_temperature_scales_the_noise_of_every_group() -> None:
    vae = generic(NVAE(SMALL_NVAE))
    eps = double_noise(vae, 2)
    cool, scaled = vae.decode(eps, temperature=0.6), vae.decode([0.6 * e for e in eps])
    torch.testing.assert_close(cool.logits, scaled.logits)
    torch.testing.assert_close(cool.z, scaled.z)


def test_a_batch_of_none_and_of_one() -> None:
    vae = generic(NVAE(SMALL_NVAE))
    for batch in (0, 1):
        assert vae.decode(double_noise(vae, batch)).logits.shape == (batch, 6, 16, 16)
        assert vae.elbo(torch.rand(batch, 3, 16, 16, dtype=torch.float64)).kl.shape == (batch, 4)


def test_padding_of_binary_digits_does_not_count() -> None:
    vae = NVAE(replace(SMALL_NVAE, image_size=32, image_channels=1, likelihood="bernoulli", uncounted_border=2))
    logits, x = torch.randn(1, 1, 32, 32), torch.rand(1, 1, 32, 32)
    other = torch.rand(1, 1, 32, 32)
    other[..., 2:30, 2:30] = x[..., 2:30, 2:30]
    assert torch.equal(vae.pixels(logits).log_prob(other), vae.pixels(logits).log_prob(x))
    other[..., 2, 29] += 0.1
    assert not torch.equal(vae.pixels(logits).log_prob(other), vae.pixels(logits).log_prob(x))


def test_evaluation_mode_changes_no_statistics() -> None:
    vae = NVAE(SMALL_NVAE).eval()
    before = {name: value.clone() for name, value in vae.named_buffers()}
    vae.elbo(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in vae.named_buffers())


def test_the_importance_weighted_bound_lies_between_the_mean_and_the_best_of_its_samples() -> None:
    vae = generic(NVAE(SMALL_NVAE))
    x, eps_q = torch.rand(2, 3, 16, 16, dtype=torch.float64), [double_noise(vae, 2) for _ in range(3)]
    single = torch.stack([vae.importance_weighted_bound(x, [eps]) for eps in eps_q])
    bound = vae.importance_weighted_bound(x, eps_q)
    assert bool((bound > single.mean(0)).all()) and bool((bound < single.max(0).values).all())
    elbo = vae.elbo(x, eps_q[0], log_sigma_floor=None)
    torch.testing.assert_close(single[0], elbo.log_p - elbo.log_q - elbo.reconstruction_loss)
    torch.testing.assert_close(vae.importance_weighted_bound(x, [eps_q[0]] * 4), single[0])


def test_a_preset_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (VAEBM.from_preset("digits", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), untouched)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["vae.prior_ftr0"], other["vae.prior_ftr0"])
    with pytest.raises(ValueError, match=r"Preset 'mnist' is not known; it must be one of cifar10, .*digits\."):
        VAEBM.from_preset("mnist")
