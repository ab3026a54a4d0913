"""Weight normalisation, data-dependent initialisation and batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.builders import SMALL_ENERGY, SMALL_NVAE, double_noise
from vaebm_fast.models import NVAE, EnergyNetwork
from vaebm_fast.models.layers import BatchNorm, BNSwish, WNConv2d


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
    energy = EnergyNetwork(SMALL_ENERGY).double()
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
    vae = NVAE(replace(SMALL_NVAE, arch_instance="res_elu", num_nf=1)).double()
    x, eps_q = torch.rand(6, 3, 16, 16, dtype=torch.float64), double_noise(vae, 6)
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
    vae = NVAE(SMALL_NVAE)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.initialize_from_data(torch.rand(2, 3, 16, 16))
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_fresh_networks_have_neutral_batch_normalisation_and_a_uniform_first_feature() -> None:
    vae = NVAE(SMALL_NVAE)
    for module in vae.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())
    assert vae.prior_ftr0.shape == (8 * 4, 4, 4)
    assert bool(((vae.prior_ftr0 >= 0) & (vae.prior_ftr0 < 1)).all())
    assert vae.prior_ftr0.mean().item() == pytest.approx(0.5, abs=5 / (12 * 512) ** 0.5)


def test_one_training_batch_moves_the_running_statistics_by_a_twentieth() -> None:
    vae = NVAE(SMALL_NVAE).double()
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
