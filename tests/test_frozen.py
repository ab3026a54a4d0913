"""The frozen pair against the plain modules: energies, gradients, refreshing, and what a user can get wrong.

The gradients of E alone are what is compared: beside a prior's own gradient an error in them would vanish. Float32
results are held against the plain modules in float64, because the plain modules' own rounding reaches 1e-5.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from golden import ENERGY_CASES, case_path, load_expected, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vaebm_fast as vf
from vaebm_fast import _extension
from vaebm_fast.config import CELL_PLANS, POTENTIALS, EnergyBlock, EnergyConfig, NVAEConfig, Potential
from vaebm_fast.frozen import FrozenVAEBM, StaleWeightsError, freeze
from vaebm_fast.frozen.part import Part, tensors_of
from vaebm_fast.models.vaebm import VAEBM as PlainVAEBM
from vaebm_fast.noise import NoiseLayout

FLOAT32_ERROR = 1e-5
FLOAT64_ERROR = 1e-11
TINY = dict(
    image_size=8,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=8,
    num_channels_dec=8,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
    num_preprocess_cells=1,
    num_postprocess_cells=2,
)
TINY_BLOCKS = (EnergyBlock(1, 1, True), EnergyBlock(1, 2), EnergyBlock(2, 2))


@pytest.fixture(autouse=True)
def _seed_0() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(config: NVAEConfig, blocks: Sequence[EnergyBlock] = TINY_BLOCKS) -> vf.VAEBM:
    """A VAEBM with BN statistics that matter, gammas of both signs, and an energy network that is not tiny."""
    energy = vf.EnergyNetwork(EnergyConfig(config.image_size, config.image_channels, 4, tuple(blocks)))
    model = vf.VAEBM(vf.NVAE(config), energy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def tiny() -> vf.VAEBM:
    return build(NVAEConfig(**TINY))


def noise_of(model: vf.VAEBM | FrozenVAEBM, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """(eps_z, eps_x) as a chain's flat state gives them."""
    layout = NoiseLayout(model.latent_shapes, model.image_shape)
    return layout.split(torch.randn(batch, layout.dim).to(dtype))


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert len(actual) == len(expected)
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def double(noise: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return [eps.double() for eps in noise[0]], noise[1].double()


def assert_equals_plain_modules(
    model: vf.VAEBM, potentials: Sequence[Potential] = POTENTIALS, temperatures: Sequence[float] = (1.0, 0.7)
) -> None:
    """In float64 both agree to rounding, which shows the algebra; float32 stays at its own rounding."""
    truth = copy.deepcopy(model).double()
    frozen32, frozen64 = freeze(model), freeze(truth, torch.float64)
    noise = noise_of(model)
    noise64 = double(noise)
    for potential in potentials:
        for temperature in temperatures:
            u, gradients = truth.energy_and_grad(*noise64, potential, temperature)
            u64, gradients64 = frozen64.energy_and_grad(*noise64, potential, temperature)
            assert relative_error(u64, u) < FLOAT64_ERROR
            assert largest_error(gradients64, gradients) < FLOAT64_ERROR, (potential, temperature)
            u32, gradients32 = frozen32.energy_and_grad(*noise, potential, temperature)
            assert relative_error(u32, u) < FLOAT32_ERROR
            assert largest_error(gradients32, gradients) < FLOAT32_ERROR, (potential, temperature)


@cache
def golden_model(case: str) -> vf.VAEBM:
    return vf.VAEBM(vf.load_nvae(case_path(case, "nvae.pt")), vf.load_energy(case_path(case, "energy.pth")))


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("case", ENERGY_CASES)
def test_golden_gradients(case: str, potential: Potential) -> None:
    model, golden = golden_model(case), load_expected(case)
    expected, noise = golden[f"grad_{potential}"], golden["decode"]
    u, gradients = freeze(model).energy_and_grad(noise["eps_z"], noise["eps_x"], potential)
    assert largest_error(gradients, [*expected["eps_z"], expected["eps_x"]]) < 1e-4  # measured in float32
    if potential == "energy":
        noise64 = double((noise["eps_z"], noise["eps_x"]))
        truth_u, truth = copy.deepcopy(model).double().energy_and_grad(*noise64, potential)
        plain_u, _ = model.energy_and_grad(noise["eps_z"], noise["eps_x"], potential)
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
    model = tiny()
    noise = noise_of(model, batch=4)
    _, truth = model.energy_and_grad(*noise)
    with torch.autocast("cpu", torch.bfloat16):
        _, plain = model.energy_and_grad(*noise)
    u, gradients = model.freeze(torch.bfloat16).energy_and_grad(*noise)
    assert u.dtype == gradients[0].dtype == torch.float32
    for actual, autocast, expected in zip(gradients, plain, truth, strict=True):
        assert relative_error(actual, expected) < 2 * relative_error(autocast, expected) + 1e-2


def test_noise_may_lie_in_memory_in_any_order() -> None:
    frozen = tiny().freeze()
    eps_z, eps_x = noise_of(frozen)
    u, gradients = frozen.energy_and_grad(eps_z, eps_x)
    assert all(gradient.stride(1) == 1 for gradient in gradients), "gradients are NHWC, as the flat state is"
    other_u, other = frozen.energy_and_grad([eps.contiguous() for eps in eps_z], eps_x.contiguous())
    assert torch.equal(u, other_u) and largest_error(other, gradients) == 0


def test_an_empty_batch_is_a_batch() -> None:
    frozen = tiny().freeze()
    u, gradients = frozen.energy_and_grad(*noise_of(frozen, batch=0), "official")
    assert u.shape == (0,) and [tuple(g.shape[1:]) for g in gradients] == [*frozen.latent_shapes, frozen.image_shape]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_come_under_no_grad_and_inference_mode_and_reach_nothing_else(mode: Any) -> None:
    model = tiny()
    frozen = model.freeze()
    expected_u, expected = frozen.energy_and_grad(*noise_of(model))
    torch.manual_seed(0)
    model = tiny()
    with mode():
        frozen = model.freeze()
        u, gradients = frozen.energy_and_grad(*noise_of(model))
    assert torch.equal(u, expected_u) and largest_error(gradients, expected) == 0
    assert not any(tensor.requires_grad for part in frozen._parts for tensor in tensors_of(part.weights))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_chain_runs_on_the_frozen_pair_and_ends_where_the_plain_one_does() -> None:
    model = tiny()
    options: dict[str, Any] = dict(steps=3, step_size=1e-3, potential="paper")
    plain = vf.LangevinSampler(PlainVAEBM(model.vae, model.energy), **options).run(range(3))
    fast = vf.LangevinSampler(model.freeze(), **options).run(range(3))
    assert relative_error(fast.eps, plain.eps) < FLOAT32_ERROR
    assert relative_error(fast.images, plain.images) < FLOAT32_ERROR


def test_a_sampler_freezes_a_live_model_and_follows_its_weights() -> None:
    model = tiny()
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
        frozen.energy_and_grad(*noise, potential)
        with pytest.raises(AssertionError):
            noise[1].sum().item()


# Refreshing


def memory(frozen: FrozenVAEBM) -> list[int]:
    return [tensor.data_ptr() for part in frozen._parts for tensor in tensors_of(part.weights)]


def assert_same_weights(actual: FrozenVAEBM, expected: FrozenVAEBM) -> None:
    for part, other in zip(actual._parts, expected._parts, strict=True):
        for tensor, fresh in zip(tensors_of(part.weights), tensors_of(other.weights), strict=True):
            assert torch.equal(tensor, fresh), part.name


@pytest.mark.parametrize("kind", ["foreach", "fused", "loop"])
def test_refresh_after_an_optimiser_step_is_a_new_freeze_in_the_old_memory(kind: str) -> None:
    model = tiny()
    frozen = model.freeze()
    before = memory(frozen)
    noise = noise_of(model)
    u, _ = frozen.energy_and_grad(*noise)
    optimizer = torch.optim.Adam(
        model.energy.train().parameters(), lr=1e-2, foreach=kind == "foreach", fused=kind == "fused"
    )
    for _ in range(2):
        model.energy(torch.rand(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        if kind == "fused":  # writes without counting
            torch.autograd.graph.increment_version(model.energy.parameters())
        with pytest.raises(StaleWeightsError, match=r"call refresh\(\)"):
            frozen.energy_and_grad(*noise)
        frozen.refresh()
        assert memory(frozen) == before
        assert_same_weights(frozen, model.freeze())
    assert relative_error(frozen.energy_and_grad(*noise)[0], u) > 1e-3


def test_refresh_folds_nothing_but_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    frozen = model.freeze()
    refolded: list[str] = []
    original = Part.refold

    def spy(part: Part[Any]) -> None:
        refolded.append(part.name)
        original(part)

    monkeypatch.setattr(Part, "refold", spy)
    frozen.refresh()
    assert refolded == []
    with torch.no_grad():
        model.energy.blocks[1].conv1.bias.add_(1)
        model.vae.enc0[1].weight.add_(1)  # the encoder is no part of the pair
    frozen.refresh()
    assert refolded == ["energy.blocks.1"]


def edits() -> dict[str, Any]:
    def replace(model: vf.VAEBM) -> None:
        model.vae.image_conditional[1].weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def assign(model: vf.VAEBM) -> None:
        model.energy.linear.weight.data = torch.randn(1, 8)

    return {
        "a parameter": lambda model: model.vae.dec_sampler[1][1].log_weight_norm.add_(0.1),
        "running statistics": lambda model: model.vae.post_process[0]._ops[0].conv[1].bn.running_var.mul_(2),
        "prior_ftr0": lambda model: model.vae.prior_ftr0.mul_(2),
        "a state dictionary": lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()}),
        "a replaced parameter": replace,
        "assigned data": assign,
    }


@pytest.mark.parametrize("edit", edits())
def test_stale_weights_are_refused_until_refreshed(edit: str) -> None:
    model = tiny()
    frozen = model.freeze()
    eps_z, eps_x = noise_of(model)
    before = memory(frozen)
    with torch.no_grad():
        edits()[edit](model)
    assert frozen.is_stale
    calls = (
        lambda: frozen.energy_and_grad(eps_z, eps_x),
        lambda: frozen.mean_image(eps_z),
        lambda: frozen.image(eps_z, eps_x),
    )
    for call in calls:
        with pytest.raises(StaleWeightsError):
            call()
    frozen.refresh()
    assert_same_weights(frozen, model.freeze())
    assert memory(frozen) == before
    u, _ = frozen.energy_and_grad(eps_z, eps_x)
    assert relative_error(u, model.energy_and_grad(eps_z, eps_x)[0]) < FLOAT32_ERROR


# Bad use


def test_a_vae_in_training_mode_is_refused_and_an_energy_network_is_not() -> None:
    model = tiny()
    model.energy.train()
    frozen = model.freeze()
    model.vae.train()
    with pytest.raises(ValueError, match="NVAE is in training mode"):
        model.freeze()
    with torch.no_grad():
        model.vae.prior_ftr0.add_(1)
    with pytest.raises(ValueError, match="NVAE is in training mode"):
        frozen.refresh()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_stay_stale(value: float) -> None:
    model = tiny()
    frozen = model.freeze()
    with torch.no_grad():
        model.energy.blocks[0].conv2.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"energy\.blocks\.0 are not finite"):
        model.freeze()
    with pytest.raises(ValueError, match=r"energy\.blocks\.0 are not finite"):
        frozen.refresh()
    with pytest.raises(StaleWeightsError):
        frozen.energy_and_grad(*noise_of(model))


def test_precisions_backends_and_potentials_that_do_not_exist_are_refused() -> None:
    model: Any = tiny()
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        model.freeze(torch.float16)
    with pytest.raises(ValueError, match="Backend 'fast' is not known"):
        model.freeze(backend="fast")
    with pytest.raises(RuntimeError, match="depthwise_swish cannot run with backend='triton'"):
        model.freeze(backend="triton")
    assert model.freeze(backend="reference").backend == "reference"
    assert model.freeze().backend == ("cpu" if _extension.is_available() else "reference")
    assert model.freeze(dtype=torch.bfloat16).backend == "reference"
    with pytest.raises(ValueError, match="float32"):
        model.freeze(dtype=torch.bfloat16, backend="cpu")
    with pytest.raises(ValueError, match="Potential 'kinetic' is not known"):
        model.freeze().energy_and_grad(*noise_of(model), "kinetic")


def test_live_weights_in_low_precision_or_inference_mode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vae\.prior_ftr0 is torch\.bfloat16; weights are folded in float32"):
        tiny().bfloat16().freeze()
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(ValueError, match=r"vae\.prior_ftr0 was made under torch\.inference_mode"):
        model.freeze()


def test_weights_that_moved_to_another_device_are_refused() -> None:
    model = tiny()
    frozen = model.freeze()
    model.energy.to("meta")
    with pytest.raises(ValueError, match="The model is on 2 devices"):
        frozen.refresh()
    model.vae.to("meta")
    with pytest.raises(ValueError, match="is on meta but was frozen on cpu; freeze the model again"):
        frozen.refresh()


def test_noise_of_another_shape_precision_or_device_is_refused() -> None:
    frozen = tiny().freeze()
    eps_z, eps_x = noise_of(frozen)
    with pytest.raises(ValueError, match="eps_z has 3 tensors; this NVAE has 4"):
        frozen.energy_and_grad(eps_z[:3], eps_x)
    with pytest.raises(ValueError, match=r"group 1 needs \(2, 2, 2, 2\) \[N, L, H, W\]"):
        frozen.energy_and_grad([eps_z[0], eps_z[1][:, :1], *eps_z[2:]], eps_x)
    with pytest.raises(ValueError, match=r"eps_x has shape \(2, 8, 8, 3\); this model needs \(2, 3, 8, 8\)"):
        frozen.energy_and_grad(eps_z, eps_x.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"torch\.float64 on cpu; this pair takes noise in torch\.float32 on cpu"):
        frozen.energy_and_grad(eps_z, eps_x.double())
    with pytest.raises(ValueError, match="on meta; this pair takes noise in torch.float32 on cpu"):
        frozen.mean_image([eps_z[0].to("meta"), *eps_z[1:]])


@pytest.mark.skipif(not _extension.is_available(), reason="the compiled part is not built")
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
    model = vf.VAEBM(vf.NVAE(config), vf.EnergyNetwork(EnergyConfig(16, 3, 4, blocks))).eval()
    eps_z = [torch.randn(2, *shape) for shape in model.latent_shapes]
    eps_x = torch.randn(2, *model.image_shape)
    u, gradients = model.freeze(backend="cpu").energy_and_grad(eps_z, eps_x, "official")
    expected_u, expected = model.freeze(backend="reference").energy_and_grad(eps_z, eps_x, "official")
    torch.testing.assert_close(u, expected_u, rtol=1e-5, atol=1e-3)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-5
