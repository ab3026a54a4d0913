"""Invalid networks, noise and images raise a one-sentence error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.helpers.builders import SMALL_ENERGY, SMALL_NVAE
from vaebm_fast.config import parse_blocks
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork


# Invalid configurations raise a one-sentence error.
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch_instance": "res_relu"}, "arch_instance 'res_relu' is not known; it must be one of res_elu, "),
        ({"likelihood": "laplace"}, "likelihood 'laplace' is not known"),
        ({"num_groups_per_scale": 0}, "num_groups_per_scale is 0; it must be at least 1"),
        ({"num_nf": -1}, "num_nf is -1; it must be at least 0"),
        ({"num_x_bits": 9}, "num_x_bits is 9; it must be 1 to 8"),
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
        replace(SMALL_NVAE, **changes)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: parse_blocks("1-1 1x2"), "'1x2' is not of the form IN-OUT or IN-OUTd"),
        (lambda: replace(SMALL_ENERGY, blocks=()), "at least one block"),
        (lambda: replace(SMALL_ENERGY, blocks=parse_blocks("1-2 1-2")), "Block 1 takes 1 x width .* outputs 2"),
        (lambda: replace(SMALL_ENERGY, image_size=2), "image_size 2 is smaller than 4"),
        (lambda: replace(SMALL_ENERGY, width=0), "width is 0"),
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
    vae = NVAE(SMALL_NVAE).eval()
    wrong = [torch.zeros(shape) for shape in shapes]
    with pytest.raises(ValueError, match=words):
        vae.decode(wrong)
    with pytest.raises(ValueError, match=words):
        vae.elbo(torch.zeros(wrong[0].shape[0] if wrong else 1, 3, 16, 16), wrong)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 8), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"this NVAE takes \[N, 3, 16, 16\]\."):
        NVAE(SMALL_NVAE).elbo(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"this energy network takes \[N, 3, 16, 16\]\."):
        EnergyNetwork(SMALL_ENERGY)(torch.zeros(shape))


def test_a_joint_model_needs_the_same_images_and_gaussian_pixels() -> None:
    vae, energy = NVAE(SMALL_NVAE), EnergyNetwork(SMALL_ENERGY)
    assert VAEBM(vae, energy).image_shape == (3, 16, 16)
    for other in (replace(SMALL_ENERGY, image_size=32), replace(SMALL_ENERGY, image_channels=1)):
        with pytest.raises(
            ValueError, match=r"images of shape \(3, 16, 16\) .* takes \(.*\); load two checkpoints that belong"
        ):
            VAEBM(vae, EnergyNetwork(other))
    with pytest.raises(
        ValueError, match=r"Gaussian pixels \(num_mixture_dec = 1\); this one has logistic_mixture pixels\."
    ):
        VAEBM(NVAE(replace(SMALL_NVAE, likelihood="logistic_mixture")), energy)
