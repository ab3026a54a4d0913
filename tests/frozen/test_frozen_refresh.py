"""The frozen pair follows its live model: refreshing, stale weights, and what a user can get wrong."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import vaebm_fast as vf
from tests.helpers.frozen_pairs import FLOAT32_ERROR, noise_of, tiny
from tests.helpers.golden import relative_error
from vaebm_fast.frozen import FrozenVAEBM, StaleWeightsError
from vaebm_fast.frozen.part import Part, tensors_of
from vaebm_fast.runtime import extension

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
    u, _ = frozen.potential_and_grad(*noise)
    optimizer = torch.optim.Adam(
        model.energy.train().parameters(), lr=1e-2, foreach=kind == "foreach", fused=kind == "fused"
    )
    for _ in range(2):
        model.energy(torch.rand(2, 3, 8, 8)).sum().backward()
        optimizer.step()
        if kind == "fused":  # writes without counting
            torch.autograd.graph.increment_version(model.energy.parameters())
        with pytest.raises(StaleWeightsError, match=r"call refresh\(\)"):
            frozen.potential_and_grad(*noise)
        frozen.refresh()
        assert memory(frozen) == before
        assert_same_weights(frozen, model.freeze())
    assert relative_error(frozen.potential_and_grad(*noise)[0], u) > 1e-3


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
        lambda: frozen.potential_and_grad(eps_z, eps_x),
        lambda: frozen.mean_image(eps_z),
        lambda: frozen.image(eps_z, eps_x),
    )
    for call in calls:
        with pytest.raises(StaleWeightsError):
            call()
    frozen.refresh()
    assert_same_weights(frozen, model.freeze())
    assert memory(frozen) == before
    u, _ = frozen.potential_and_grad(eps_z, eps_x)
    assert relative_error(u, model.potential_and_grad(eps_z, eps_x)[0]) < FLOAT32_ERROR


def test_a_replacement_at_the_address_of_a_freed_weight_is_seen() -> None:
    """Its version counter is 0, as the folded weight's was."""
    model = vf.VAEBM.from_preset("digits")
    frozen = model.freeze()
    conv = model.energy.conv1
    name = next(iter(conv._parameters))
    for value in range(40):
        shape = conv._parameters.pop(name).shape
        conv.register_parameter(name, nn.Parameter(torch.full(shape, value + 1.0), requires_grad=False))
        assert frozen.is_stale
        frozen.refresh()


def test_a_copy_of_a_pair_is_usable_once_refreshed() -> None:
    model = tiny()
    frozen = model.freeze()
    eps_z, eps_x = noise_of(model)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        twin.refresh()
        assert torch.equal(twin.potential_and_grad(eps_z, eps_x)[0], frozen.potential_and_grad(eps_z, eps_x)[0])


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
        frozen.potential_and_grad(*noise_of(model))


def test_precisions_backends_and_potentials_that_do_not_exist_are_refused() -> None:
    model: Any = tiny()
    with pytest.raises(ValueError, match=r"dtype is torch\.float16"):
        model.freeze(torch.float16)
    with pytest.raises(ValueError, match="Backend 'fast' is not known"):
        model.freeze(backend="fast")
    with pytest.raises(RuntimeError, match="depthwise_swish cannot run with backend='triton'"):
        model.freeze(backend="triton")
    assert model.freeze(backend="reference").backend == "reference"
    assert model.freeze().backend == ("cpp" if extension.is_available() else "reference")
    assert model.freeze(dtype=torch.bfloat16).backend == "reference"
    with pytest.raises(ValueError, match="float32"):
        model.freeze(dtype=torch.bfloat16, backend="cpp")
    with pytest.raises(ValueError, match="Potential 'kinetic' is not known"):
        model.freeze().potential_and_grad(*noise_of(model), "kinetic")


def test_live_weights_in_low_precision_or_inference_mode_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vae\.prior_ftr0 is torch\.bfloat16; weights are folded in float32"):
        tiny().bfloat16().freeze()
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(ValueError, match=r"vae\.prior_ftr0 was created under torch\.inference_mode"):
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
        frozen.potential_and_grad(eps_z[:3], eps_x)
    with pytest.raises(ValueError, match=r"group 1 needs \(2, 2, 2, 2\) \[N, L, H, W\]"):
        frozen.potential_and_grad([eps_z[0], eps_z[1][:, :1], *eps_z[2:]], eps_x)
    with pytest.raises(ValueError, match=r"eps_x has shape \(2, 8, 8, 3\); this model needs \(2, 3, 8, 8\)"):
        frozen.potential_and_grad(eps_z, eps_x.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"torch\.float64 on cpu; this pair takes noise in torch\.float32 on cpu"):
        frozen.potential_and_grad(eps_z, eps_x.double())
    with pytest.raises(ValueError, match="on meta; this pair takes noise in torch.float32 on cpu"):
        frozen.mean_image([eps_z[0].to("meta"), *eps_z[1:]])
