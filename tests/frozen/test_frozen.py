"""The frozen pair against the plain modules: energies, gradients, refreshing, and what a user can get wrong.

The gradients of E alone are what is compared: beside a prior's own gradient an error in them would vanish. Float32
results are held against the plain modules in float64, because the plain modules' own rounding reaches 1e-5.
"""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import vaebm_fast as vf
import vaebm_fast.models.vaebm
from benchmarks.step.sensitive import make_sensitive
from tests.helpers.frozen_pairs import (
    FLOAT32_ERROR,
    TINY,
    assert_equals_plain_modules,
    build,
    double,
    largest_error,
    noise_of,
    tiny,
)
from tests.helpers.golden import ENERGY_CASES, case_path, load_expected, relative_error
from vaebm_fast.config import CELL_PLANS, POTENTIALS, EnergyBlock, EnergyConfig, NVAEConfig, Potential, parse_blocks
from vaebm_fast.frozen import FrozenVAEBM, energy, fold, freeze
from vaebm_fast.frozen.part import tensors_of
from vaebm_fast.models import EnergyNetwork
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.runtime import extension


@cache
def golden_model(case: str) -> vf.VAEBM:
    return vf.VAEBM(vf.load_nvae(case_path(case, "nvae.pt")), vf.load_energy(case_path(case, "energy.pth")))


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("case", ENERGY_CASES)
def test_golden_gradients(case: str, potential: Potential) -> None:
    model, golden = golden_model(case), load_expected(case)
    expected, noise = golden[f"grad_{potential}"], golden["decode"]
    u, gradients = freeze(model).potential_and_grad(noise["eps_z"], noise["eps_x"], potential)
    assert largest_error(gradients, [*expected["eps_z"], expected["eps_x"]]) < 1e-4  # measured in float32
    if potential == "energy":
        noise64 = double((noise["eps_z"], noise["eps_x"]))
        truth_u, truth = copy.deepcopy(model).double().potential_and_grad(*noise64, potential)
        plain_u, _ = model.potential_and_grad(noise["eps_z"], noise["eps_x"], potential)
        # E is a sum that cancels: in hq_tiny float32 puts the plain modules off by up to 6e-5, so they are the measure.
        assert relative_error(u, truth_u) < max(1e-6, relative_error(plain_u, truth_u))
        assert largest_error(gradients, truth) < FLOAT32_ERROR


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("case", ENERGY_CASES)
def test_golden_images(case: str, temperature: float) -> None:
    model, noise = golden_model(case), load_expected(case)["decode"]
    frozen = freeze(model)
    with torch.no_grad():
        mean = frozen.mean_image(noise["eps_z"], temperature)
        assert relative_error(mean, model.mean_image(noise["eps_z"], temperature)) < FLOAT32_ERROR
        image = frozen.image(noise["eps_z"], noise["eps_x"], temperature)
        assert relative_error(image, model.image(noise["eps_z"], noise["eps_x"], temperature)) < FLOAT32_ERROR


@pytest.mark.parametrize("use_se", [True, False], ids=["se", "plain"])
@pytest.mark.parametrize("arch_instance", CELL_PLANS)
def test_every_kind_of_cell(arch_instance: str, use_se: bool) -> None:
    assert_equals_plain_modules(build(NVAEConfig(**TINY, arch_instance=arch_instance, use_se=use_se)))


def test_the_vanilla_form() -> None:
    assert_equals_plain_modules(build(NVAEConfig(**TINY | dict(num_latent_scales=1, num_groups_per_scale=1))))


@st.composite
def configurations(draw: st.DrawFn) -> tuple[NVAEConfig, list[EnergyBlock]]:
    scales, blocks = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    side = 2 ** (scales - 1 + blocks) * draw(st.integers(1, 3))
    config = NVAEConfig(
        image_size=side,
        image_channels=draw(st.sampled_from([1, 3])),
        arch_instance=draw(st.sampled_from(list(CELL_PLANS))),
        use_se=draw(st.booleans()),
        num_latent_scales=scales,
        num_groups_per_scale=draw(st.integers(1, 3)),
        ada_groups=draw(st.booleans()),
        num_latent_per_group=draw(st.integers(1, 3)),
        num_channels_enc=8,
        num_channels_dec=8,
        num_preprocess_blocks=blocks,
        num_preprocess_cells=1,
        num_postprocess_blocks=blocks,
        num_postprocess_cells=draw(st.integers(1, 2)),
        num_cell_per_cond_enc=1,
        num_cell_per_cond_dec=draw(st.integers(0, 2)),
    )
    width, energy = 1, []
    for _ in range(draw(st.integers(1, 3))):
        downsample, out = side > 1 and draw(st.booleans()), draw(st.integers(1, 2))
        energy.append(EnergyBlock(width, out, downsample))
        width, side = out, side // 2 if downsample else side
    return config, energy


@settings(max_examples=25, derandomize=True, deadline=None)
@given(configurations(), st.sampled_from(POTENTIALS), st.sampled_from([1.0, 0.7, 1.3]))
def test_any_configuration(
    configuration: tuple[NVAEConfig, list[EnergyBlock]], potential: Potential, temperature: float
) -> None:
    torch.manual_seed(1)
    assert_equals_plain_modules(build(*configuration), [potential], [temperature])


def test_bfloat16_is_no_further_from_the_truth_than_the_plain_modules_in_bfloat16() -> None:
    model = make_sensitive(tiny())
    noise = noise_of(model, batch=4)
    _, truth = model.potential_and_grad(*noise)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = model.potential_and_grad(*noise)
    u, gradients = model.freeze(torch.bfloat16).potential_and_grad(*noise)
    assert u.dtype == gradients[0].dtype == torch.float32
    for actual, autocast, expected in zip(gradients, plain, truth, strict=True):
        assert relative_error(actual, expected) < 2 * relative_error(autocast, expected) + 1e-2


def test_noise_may_lie_in_memory_in_any_order() -> None:
    frozen = tiny().freeze()
    eps_z, eps_x = noise_of(frozen)
    u, gradients = frozen.potential_and_grad(eps_z, eps_x)
    assert all(gradient.stride(1) == 1 for gradient in gradients), "gradients are NHWC, as the flat state is"
    other_u, other = frozen.potential_and_grad([eps.contiguous() for eps in eps_z], eps_x.contiguous())
    assert torch.equal(u, other_u) and largest_error(other, gradients) == 0


def test_an_empty_batch_is_a_batch() -> None:
    frozen = tiny().freeze()
    u, gradients = frozen.potential_and_grad(*noise_of(frozen, batch=0), "official")
    assert u.shape == (0,) and [tuple(g.shape[1:]) for g in gradients] == [*frozen.latent_shapes, frozen.image_shape]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_come_under_no_grad_and_inference_mode_and_reach_nothing_else(mode: Any) -> None:
    model = tiny()
    frozen = model.freeze()
    expected_u, expected = frozen.potential_and_grad(*noise_of(model))
    torch.manual_seed(0)
    model = tiny()
    with mode():
        frozen = model.freeze()
        u, gradients = frozen.potential_and_grad(*noise_of(model))
    assert torch.equal(u, expected_u) and largest_error(gradients, expected) == 0
    assert not any(tensor.requires_grad for part in frozen._parts for tensor in tensors_of(part.weights))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_model_freeze_is_short_for_freeze() -> None:
    model = tiny()
    eps_z, eps_x = noise_of(model)
    pairs = vf.freeze(model, torch.bfloat16, "reference"), model.freeze(torch.bfloat16, "reference")
    u, other = (pair.potential_and_grad(eps_z, eps_x)[0] for pair in pairs)
    assert torch.equal(u, other) and all(pair.dtype == torch.bfloat16 for pair in pairs)
    official, energy = (pairs[0].potential_and_grad(eps_z, eps_x, potential)[0] for potential in ("official", "energy"))
    assert torch.equal(u, official) and not torch.equal(u, energy)  # official is the default
    assert torch.equal(model.potential(eps_z, eps_x), model.potential(eps_z, eps_x, "official"))


class PlainModules:
    """A model without its compiled form, so that a sampler runs on the modules themselves."""

    def __init__(self, model: vf.VAEBM) -> None:
        self.device, self.noise_layout = model.device, model.noise_layout
        self.potential_and_grad, self.mean_image = model.potential_and_grad, model.mean_image


def test_a_chain_runs_on_the_frozen_pair_and_ends_where_the_plain_one_does() -> None:
    model = tiny()
    options: dict[str, Any] = dict(steps=3, step_size=1e-3, potential="paper")
    plain = vf.LangevinSampler(PlainModules(model), **options).run(range(3))
    fast = vf.LangevinSampler(model.freeze(), **options).run(range(3))
    assert relative_error(fast.eps, plain.eps) < FLOAT32_ERROR
    assert relative_error(fast.images, plain.images) < FLOAT32_ERROR


@pytest.mark.parametrize("kind", [vf.VAEBM, vaebm_fast.models.vaebm.VAEBM])
def test_a_sampler_freezes_a_live_model_and_follows_its_weights(kind: Any) -> None:
    model = kind(tiny().vae, tiny().energy)
    assert isinstance(model, vf.VAEBM)  # there is one class, by whatever path
    sampler = vf.LangevinSampler(model, steps=2, step_size=1e-3)
    assert isinstance(sampler.model, FrozenVAEBM)
    before = sampler.run(range(2))
    assert torch.equal(before.eps, vf.LangevinSampler(model.freeze(), steps=2, step_size=1e-3).run(range(2)).eps)
    with torch.no_grad():
        model.energy.linear.weight.mul_(100)
    after = sampler.run(range(2))
    assert torch.equal(after.eps, vf.LangevinSampler(model.freeze(), steps=2, step_size=1e-3).run(range(2)).eps)
    assert not torch.equal(after.eps, before.eps)


class ForbidReadback(TorchDispatchMode):
    """Raises on every operation by which the host reads a number off the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        assert func.overloadpacket not in (torch.ops.aten.nonzero, torch.ops.aten.equal), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_step_reads_nothing_back_to_the_host(potential: Potential) -> None:
    frozen = tiny().freeze()
    noise = noise_of(frozen)
    with ForbidReadback():
        frozen.potential_and_grad(*noise, potential)
        with pytest.raises(AssertionError):
            noise[1].sum().item()


@pytest.mark.skipif(not extension.is_available(), reason="the compiled part is not built")
@pytest.mark.parametrize("arch", CELL_PLANS)
def test_compiled_and_reference_pairs_agree(arch: str) -> None:
    """Only convolutions are the same code: compiled are depthwise of stride 1, gates, latents, pixels, epilogues."""
    config = NVAEConfig(
        image_size=16,
        arch_instance=arch,
        num_latent_scales=2,
        num_groups_per_scale=2,
        num_latent_per_group=2,
        num_channels_enc=8,
        num_channels_dec=8,
    )
    blocks = (EnergyBlock(1, 1, True),)
    model = make_sensitive(vf.VAEBM(vf.NVAE(config), vf.EnergyNetwork(EnergyConfig(16, 3, 4, blocks))).eval())
    eps_z = [torch.randn(2, *shape) for shape in model.latent_shapes]
    eps_x = torch.randn(2, *model.image_shape)
    u, gradients = model.freeze(backend="cpp").potential_and_grad(eps_z, eps_x, "official")
    expected_u, expected = model.freeze(backend="reference").potential_and_grad(eps_z, eps_x, "official")
    torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=1e-3)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-5


class PassesBesideKernels(TorchDispatchMode):
    """Counts what a compiled pair leaves to passes of their own on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[2] is not None:
            self.counts["bias"] += 1
        if func in (torch.ops.aten.elu.default, torch.ops.aten.elu_backward.default):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not extension.is_available(), reason="the compiled part is not built")
def test_biases_and_elus_are_passes_of_their_own_at_the_image_s_head_alone() -> None:
    frozen = tiny().freeze(backend="cpp")
    with PassesBesideKernels() as passes:
        frozen.potential_and_grad(*noise_of(frozen), "official")
    assert passes.counts == {"bias": 1, "aten::elu": 1, "aten::elu_backward": 1}


def test_a_pooled_skip_is_one_convolution_where_pooling_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, in float64: average pool and 1x1 are a 2x2 convolution at stride 2."""
    network = EnergyNetwork(EnergyConfig(16, 3, 8, parse_blocks("1-1d 1-2 2-3d"))).double()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    monkeypatch.setattr(energy, "pools_in_convolution", lambda device: True)
    frozen = energy.FrozenEnergy(network, torch.float64, OpBackends.of("reference"))
    skips = [part.weights.skip for part in frozen.parts[1:-1]]
    assert [isinstance(skip, fold.Conv) for skip in skips] == [True, False, True]
    torch.testing.assert_close(frozen(x), network(x))
