"""A wrong part of the pair shows in the whole pair's gradient, beyond what the checks of frozen pairs allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import vaebm_fast as vf
from benchmarks.step.sensitive import decoder_cells, make_sensitive
from tests.helpers.golden import relative_error
from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.models import EnergyNetwork

CONFIG = NVAEConfig(
    image_size=16, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=4, num_channels_enc=16,
    num_channels_dec=32, num_preprocess_cells=1, num_postprocess_cells=2, num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=2,
)  # fmt: skip
CELLS = 9  # 6 below conditions, one that upsamples between the scales, two behind


class Checked:
    """A pair with sensitive weights, noise, its true gradient, and what a check in bfloat16 allows."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            energy = EnergyNetwork(EnergyConfig(16, 3, 16, parse_blocks("1-1d 1-2d 2-2")))
            self.model = make_sensitive(vf.VAEBM(vf.NVAE(CONFIG).eval(), energy))
            self.layout = self.model.noise_layout
            self.eps = torch.randn(3, self.layout.dim)
        self.truth = self.gradient(self.model)
        self.allowed = 2 * relative_error(self.gradient(self.model.freeze(torch.bfloat16, "reference")), self.truth)
        self.allowed += 0.01

    def gradient(self, pair: vf.VAEBM | vf.FrozenVAEBM) -> Tensor:
        _, gradients = pair.potential_and_grad(*self.layout.split(self.eps), "official")
        return self.layout.join(gradients[:-1], gradients[-1])

    def error(self) -> float:
        """Of the model as it now is."""
        return relative_error(self.gradient(self.model), self.truth)


@pytest.fixture(scope="module")
def checked() -> Checked:
    return Checked()


@contextmanager
def edited(*tensors: Tensor) -> Iterator[None]:
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors, kept, strict=True):
                tensor.copy_(values)


def last_norm(checked: Checked, index: int) -> nn.BatchNorm2d:
    norm: nn.BatchNorm2d = decoder_cells(checked.model)[index]._ops[0].conv[-1].bn
    return norm


def test_the_right_pair_passes(checked: Checked) -> None:
    assert len(decoder_cells(checked.model)) == CELLS and checked.allowed < 0.06
    assert relative_error(checked.gradient(checked.model.freeze()), checked.truth) < 1e-5


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
@pytest.mark.parametrize("index", range(CELLS))
def test_a_branch_that_is_missing_or_scaled_shows(checked: Checked, index: int, factor: float) -> None:
    norm = last_norm(checked, index)
    with edited(norm.weight, norm.bias):
        norm.weight.mul_(factor)
        norm.bias.mul_(factor)
        assert checked.error() > checked.allowed


@pytest.mark.parametrize("index", [0, 4])
def test_two_cells_swapped_show(checked: Checked, index: int) -> None:
    """Neighbours of one shape."""
    pair = decoder_cells(checked.model)[index : index + 2]
    first, second = ([*cell.parameters(), *cell.buffers()] for cell in pair)
    assert [tensor.shape for tensor in first] == [tensor.shape for tensor in second]
    with edited(*first, *second):
        for one, other in zip(first, second, strict=True):
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)
        assert checked.error() > checked.allowed


def test_a_missing_energy_network_shows(checked: Checked) -> None:
    weight = checked.model.energy.linear.weight
    with edited(weight):
        weight.zero_()
        assert checked.error() > 0.3


@pytest.mark.parametrize("index", range(3))
def test_a_wrong_block_of_the_energy_network_shows(checked: Checked, index: int) -> None:
    conv = checked.model.energy.blocks[index].conv2
    with edited(conv.log_weight_norm):
        conv.log_weight_norm.add_(-20.0)
        assert checked.error() > checked.allowed
