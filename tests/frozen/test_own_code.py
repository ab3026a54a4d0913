"""Freezing reads weights; a model with code of its own is refused by name, and sampled as it is without freezing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod, wraps
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import vaebm_fast as vf
from tests.helpers.frozen_pairs import TINY, TINY_BLOCKS, build, noise_of, tiny
from vaebm_fast.config import POTENTIALS, EnergyConfig, NVAEConfig, Potential
from vaebm_fast.frozen import FrozenNVAE, freeze
from vaebm_fast.frozen.part import StaleWeightsError, tensors_of
from vaebm_fast.models import distributions, energy, layers, nvae
from vaebm_fast.models.layers import WNConv2d

OPTIONS: dict[str, Any] = {"steps": 3, "step_size": 1e-2}


class TenTimes(vf.EnergyNetwork):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


class Sharper(vf.VAEBM):
    """Its energy counts ten times, in the potential alone."""

    def potential(self, *noise: Any, **options: Any) -> Tensor:
        return 10 * super().potential(*noise, **options)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


def of_class(kind: type, module: nn.Module) -> None:
    """Turn a module into one of a subclass, as loading into that subclass would."""
    module.__class__ = kind


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


class Conv(WNConv2d):
    pass


def wrap(model: vf.VAEBM) -> None:
    model.energy.blocks[1] = Wrapped(model.energy.blocks[1])


def patch_method(model: vf.VAEBM) -> None:
    model.vae.decode = lambda *_, **__: None  # type: ignore[assignment, method-assign]


def patch_forward(model: vf.VAEBM) -> None:
    forward = model.energy.linear.forward
    model.energy.linear.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def replace_pixels(model: vf.VAEBM) -> None:
    model.image = lambda *_: None  # type: ignore[assignment, method-assign]


# name: (change, what the error names)
CHANGES: dict[str, tuple[Callable[[vf.VAEBM], Any], str]] = {
    "subclassed energy": (lambda m: of_class(TenTimes, m.energy), "energy is a .*TenTimes, not EnergyNetwork itself"),
    "subclassed NVAE": (lambda m: of_class(type("Mine", (vf.NVAE,), {}), m.vae), "vae is a .*Mine, not NVAE itself"),
    "subclassed pair": (lambda m: of_class(Sharper, m), "the joint model is a .*Sharper, not VAEBM itself"),
    "wrapped block": (wrap, r"energy.blocks.1 is a .*Wrapped instead of a plain EnergyResidualBlock"),
    "subclassed layer": (
        lambda m: of_class(Conv, m.energy.conv1),
        r"energy.conv1 is a .*Conv instead of a",
    ),
    "identity": (lambda m: setattr(m.energy, "linear", nn.Identity()), r"energy.linear is a .*Identity"),
    "added block": (lambda m: m.energy.blocks.append(m.energy.blocks[-1]), r"energy.blocks.3 is not in its config"),
    "removed block": (lambda m: m.energy.blocks.pop(-1), r"energy.blocks.2 is missing"),
    "added module": (lambda m: setattr(m.vae.dec_tower[0], "extra", nn.ReLU()), r"vae.dec_tower.0.extra is not in"),
    "forward hook": (lambda m: m.energy.register_forward_hook(doubled), "energy has forward hooks"),
    "hook of a layer": (lambda m: m.vae.post_process[0].register_forward_hook(doubled), "vae.post_process.0 has forw"),
    "pre-hook": (lambda m: m.energy.conv1.register_forward_pre_hook(print), "energy.conv1 has forward pre hooks"),
    "backward hook": (lambda m: m.energy.register_full_backward_hook(print), "energy has backward hooks"),
    "backward pre-hook": (lambda m: m.energy.register_full_backward_pre_hook(print), "energy has backward pre hooks"),
    "hook of the pair": (lambda m: m.register_forward_hook(doubled), "the joint model has forward hooks"),
    "patched forward": (patch_forward, "energy.linear.forward is patched"),
    "patched method": (patch_method, "vae.decode is patched"),
    "patched pair": (replace_pixels, "the joint model.image is patched"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m.energy.linear), "energy.linear is a .*Parametrized"),
    "pruned": (lambda m: prune.l1_unstructured(m.energy.linear, "weight", 0.5), "energy.linear has forward pre hooks"),
    "attribute": (
        lambda m: setattr(m.energy.blocks[0], "downsample", False),
        "energy.blocks.0.downsample is False inst",
    ),
    "in place": (lambda m: setattr(m.vae.image_conditional[0], "inplace", True), "image_conditional.0.inplace is True"),
    "padding": (lambda m: setattr(m.energy.conv1, "padding_mode", "reflect"), "energy.conv1.padding_mode is 'reflect'"),
    "batch statistics": (
        lambda m: setattr(batch_norm(m), "running_var", None),
        r"vae.post_process.*.bn has the tensors \{.*instead of",
    ),
    "other shape": (lambda m: setattr(m.energy, "linear", nn.Linear(8, 2)), "energy.linear has the tensors"),
}


def batch_norm(model: vf.VAEBM) -> nn.BatchNorm2d:
    return next(module for module in model.vae.post_process.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize("change", CHANGES)
def test_code_of_its_own_is_refused_by_name_before_and_after_freezing(change: str) -> None:
    apply, named = CHANGES[change]
    model, followed = tiny(), tiny()
    sampler, frozen = vf.LangevinSampler(followed, **OPTIONS), freeze(followed)
    apply(model)
    apply(followed)
    sentence = f"^Freezing reads weights and would ignore code of this model: .*{named}.*Undo that, or.*freeze=False"
    for begin in (lambda: freeze(model), lambda: vf.LangevinSampler(model, **OPTIONS), model.freeze):
        with pytest.raises(ValueError, match=sentence):
            begin()
    for go_on in (lambda: sampler.run(range(2)), frozen.refresh):
        with pytest.raises(ValueError, match=sentence):
            go_on()


FORWARD = vf.EnergyNetwork.forward
PATCHES: dict[str, tuple[Any, str, Any, str]] = {
    "forward": (vf.EnergyNetwork, "forward", lambda self, x: 10 * FORWARD(self, x), "EnergyNetwork.forward"),
    "wrapped": (vf.EnergyNetwork, "forward", wraps(FORWARD)(lambda self, x: 10 * FORWARD(self, x)), "EnergyNetwork.f"),
    "partial": (vf.EnergyNetwork, "forward", partialmethod(FORWARD), "EnergyNetwork.forward"),
    "mock": (vf.EnergyNetwork, "forward", mock.MagicMock(), "EnergyNetwork.forward"),
    "inherited": (vf.EnergyNetwork, "__call__", lambda self, x: 10 * FORWARD(self, x), "EnergyNetwork.__call__"),
    "torch's": (nn.Linear, "forward", lambda self, x: x, "Linear.forward"),
    "method": (vf.NVAE, "decode", lambda *_, **__: None, "NVAE.decode"),
    "property": (vf.VAEBM, "noise_layout", property(lambda _: None), "VAEBM.noise_layout"),
    "function": (energy, "activation", nn.functional.silu, "vaebm_fast.models.energy.activation"),
    "imported function": (energy, "swish", torch.relu, "vaebm_fast.models.energy.swish"),
    "imported class": (nvae, "GaussianPixels", type("Mine", (distributions.GaussianPixels,), {}), ".*nvae.GaussianPix"),
    "constant": (layers, "RESIDUAL_SCALE", 1.0, "vaebm_fast.models.layers.RESIDUAL_SCALE"),
    "class method": (distributions.Normal, "from_raw", classmethod(lambda *_: None), "Normal.from_raw"),
    "torch's call": (nn.Module, "__call__", lambda self, *x: self.forward(*x), "Module.__call__"),
    "torch's convolution": (nn.Conv2d, "_conv_forward", lambda self, x, *_: x, "Conv2d._conv_forward"),
    "distribution": (distributions.GaussianPixels, "sample", lambda self, eps: eps, "GaussianPixels.sample"),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_patched_classes_and_functions_are_refused_while_they_are(patch: str) -> None:
    owner, name, replacement, named = PATCHES[patch]
    model = tiny()
    sampler = vf.LangevinSampler(model, **OPTIONS)
    expected = sampler.run(range(2)).eps
    there = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        for begin in (lambda: freeze(model), lambda: sampler.run(range(2))):
            with pytest.raises(ValueError, match=f"{named}.* is patched"):
                begin()
    finally:
        setattr(owner, name, before) if there else delattr(owner, name)
    assert torch.equal(sampler.run(range(2)).eps, expected)


def test_what_other_code_does_to_torch_and_to_classes_is_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    sampler = vf.LangevinSampler(model, **OPTIONS)
    sampler.run(range(2))
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))  # patches nn.Module.__init__
    monkeypatch.setattr(nn.Module, "count_parameters", lambda self: 0, raising=False)
    monkeypatch.setattr(vf.VAEBM, "describe", lambda self: "", raising=False)
    model.vae.train = lambda mode=True: model.vae  # type: ignore[method-assign]  # keeps it in evaluation mode
    model.teacher = nn.Linear(2, 2).bfloat16()  # type: ignore[assignment]
    model.teacher.register_forward_hook(doubled)
    model.energy.register_buffer("steps", torch.tensor(0))
    model.energy.iteration = 3  # type: ignore[assignment]
    sampler.run(range(2))
    pair = freeze(model)
    model.energy.iteration, model.teacher = 4, nn.Linear(2, 2)  # type: ignore[assignment]
    assert not pair._code.has_changed and not pair.is_stale
    sampler.run(range(2))


def test_torchs_own_observers_are_no_hooks() -> None:
    sampler = vf.LangevinSampler(tiny(), **OPTIONS)
    with FlopCounterMode(display=False):
        sampler.run(range(2))
        freeze(tiny())


# Modules replaced after freezing.
def replace_energy(model: vf.VAEBM, other: vf.VAEBM) -> None:
    model.energy = other.energy


def replace_nvae(model: vf.VAEBM, other: vf.VAEBM) -> None:
    model.vae = other.vae


def replace_layer(model: vf.VAEBM, other: vf.VAEBM) -> None:
    model.energy.linear = other.energy.linear


def tie(model: vf.VAEBM, other: vf.VAEBM) -> None:
    model.energy.blocks[2].conv2 = model.energy.blocks[2].conv1


def change_eps(model: vf.VAEBM, other: vf.VAEBM) -> None:
    batch_norm(model).eps = 1.0


@pytest.mark.parametrize("change", [replace_energy, replace_nvae, replace_layer, tie, change_eps])
def test_replaced_modules_are_sampled_and_tracked(change: Callable[[vf.VAEBM, vf.VAEBM], None]) -> None:
    model, other = tiny(), tiny()
    sampler, pair = vf.LangevinSampler(model, **OPTIONS), freeze(model)
    before = sampler.run(range(2))
    addresses = [tensor.data_ptr() for part in pair._parts for tensor in tensors_of(part.weights)]
    change(model, other)
    if change is not change_eps:
        assert pair.is_stale
        with pytest.raises(StaleWeightsError):
            pair.mean_image(noise_of(model)[0])
    pair.refresh()
    assert not pair.is_stale
    expected = vf.LangevinSampler(freeze(model), **OPTIONS).run(range(2))
    for chains in (sampler.run(range(2)), vf.LangevinSampler(pair, **OPTIONS).run(range(2))):
        assert torch.equal(chains.potentials, expected.potentials) and torch.equal(chains.images, expected.images)
        assert not torch.equal(chains.potentials, before.potentials)
    assert [tensor.data_ptr() for part in pair._parts for tensor in tensors_of(part.weights)] == addresses
    with torch.no_grad():
        model.energy.linear.bias.add_(1)
    assert pair.is_stale
    torch.testing.assert_close(sampler.run(range(2)).potentials, expected.potentials + 1)
    model.vae.train()
    with pytest.raises(ValueError, match="training mode"):
        pair.refresh()


def test_a_mask_that_appears_is_refused_and_a_parameter_that_goes_is_stale() -> None:
    model = tiny()
    sampler, pair = vf.LangevinSampler(model, **OPTIONS), freeze(model)
    sampler.run(range(1))
    model.energy.conv1.mask = torch.zeros_like(model.energy.conv1.weight)
    with pytest.raises(ValueError, match="energy.conv1 has the tensors"):
        sampler.run(range(1))
    model.energy.conv1.mask = None
    parametrizations.weight_norm(model.energy.linear)
    assert pair.is_stale
    with pytest.raises(ValueError, match="energy.linear is a .*Parametrized"):
        pair.refresh()


def of_fewer_blocks(model: vf.VAEBM) -> None:
    model.energy = vf.EnergyNetwork(EnergyConfig(8, 3, 4, TINY_BLOCKS[:2]))


def of_other_size(model: vf.VAEBM) -> None:
    model.energy = vf.EnergyNetwork(EnergyConfig(16, 3, 4, model.energy.config.blocks))


def of_other_activation(model: vf.VAEBM) -> None:
    """Whose tensors have the shapes of the other's."""
    model.vae = vf.NVAE(replace(model.vae.config, arch_instance="res_bnelu")).eval()


@pytest.mark.parametrize("change", [of_fewer_blocks, of_other_size, of_other_activation])
def test_a_network_of_another_architecture_needs_freezing_again(change: Callable[[vf.VAEBM], None]) -> None:
    model = build(NVAEConfig(**TINY, arch_instance="res_bnswish"))
    pair = freeze(model)
    change(model)
    with pytest.raises(ValueError, match="one of another architecture or device; freeze it again"):
        pair.refresh()


def test_a_module_whose_tables_were_exchanged_is_followed() -> None:
    model, other = tiny(), tiny()
    sampler, pair = vf.LangevinSampler(model, **OPTIONS), freeze(model)
    sampler.run(range(2))
    model.energy.__dict__.update(other.energy.__dict__)
    model.vae.image_conditional[1]._parameters = dict(other.vae.image_conditional[1]._parameters)
    assert pair.is_stale
    expected = vf.LangevinSampler(freeze(model), **OPTIONS).run(range(2))
    assert torch.equal(sampler.run(range(2)).eps, expected.eps)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_watches_the_code_of_its_own_model(copied: Any) -> None:
    pair = freeze(tiny())
    other = copied(pair)
    assert not other._code.has_changed
    batch_norm(other._model).eps = 1.0
    assert other._code.has_changed and not pair._code.has_changed
    other.refresh()
    noise = noise_of(pair)
    assert torch.equal(other.mean_image(noise[0]), freeze(other._model).mean_image(noise[0]))
    other._model.energy.conv1.padding_mode = "reflect"
    with pytest.raises(ValueError, match="padding_mode"):
        other.refresh()


def test_global_hooks_are_refused() -> None:
    model = tiny()
    sampler = vf.LangevinSampler(model, **OPTIONS)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        for begin in (lambda: freeze(model), lambda: sampler.run(range(1))):
            with pytest.raises(ValueError, match="global hooks"):
                begin()
    finally:
        handle.remove()
    sampler.run(range(1))


def test_the_nvae_alone_is_checked_as_well() -> None:
    vae = tiny().vae
    FrozenNVAE(vae, torch.float32, "auto")
    vae.dec_tower[0].register_forward_hook(doubled)
    with pytest.raises(ValueError, match="vae.dec_tower.0 has forward hooks. Undo that, or sample the NVAE as it is"):
        FrozenNVAE(vae, torch.float32, "auto")


@pytest.mark.parametrize(
    "keep",
    [
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(False),
        lambda m: m.double(),
        lambda m: m.share_memory(),
        lambda m: (setattr(batch_norm(m), "momentum", 0.5), m)[1],
        lambda m: (setattr(m, "note", "mine"), m)[1],
        lambda m: (m.energy.compile(), m)[1],
        lambda m: (m.energy.register_state_dict_pre_hook(lambda *_: None), m)[1],
        lambda m: (m.energy.register_forward_hook(doubled).remove(), m)[1],
    ],
)
def test_what_changes_no_result_is_taken(keep: Callable[[vf.VAEBM], vf.VAEBM]) -> None:
    freeze(keep(tiny()))


# Sampling a model as it is.
def test_what_cannot_be_sampled_is_one_sentence() -> None:
    for wrong, steps, sentence in (
        (tiny().vae, 0, "NVAE cannot be sampled: give a VAEBM"),
        (nn.DataParallel(tiny()), 3, "DataParallel cannot be sampled"),
        (FrozenNVAE(tiny().vae, torch.float32, "auto"), 3, "this model is an NVAE alone"),
    ):
        with pytest.raises(ValueError, match=sentence):
            vf.LangevinSampler(wrong, steps=steps, step_size=0.1, freeze=False)  # type: ignore[arg-type]


def test_what_is_no_pair_is_not_frozen() -> None:
    for wrong in (nn.DataParallel(tiny()), tiny().vae):
        with pytest.raises(ValueError, match=f"{type(wrong).__name__} cannot be frozen: give a VAEBM itself"):
            freeze(wrong)  # type: ignore[arg-type]


def test_a_model_of_half_precision_is_not_sampled_as_it_is() -> None:
    with pytest.raises(ValueError, match="is torch.bfloat16; .* needs float32 or float64"):
        live(tiny().bfloat16())


def test_a_model_in_training_mode_is_not_sampled_as_it_is() -> None:
    model = tiny()
    model = vf.VAEBM(model.vae, model.energy)  # whose own flag says training
    sampler = vf.LangevinSampler(model, freeze=False, **OPTIONS)
    sampler.run(range(1))
    model.vae.post_process.train()
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval\(\) first"):
        sampler.run(range(1))


def live(model: vf.VAEBM, potential: Potential = "official") -> Any:
    sampler = vf.LangevinSampler(model, potential=potential, freeze=False, **OPTIONS)
    assert sampler._graphs is None  # code of its own may not be capturable
    return sampler.run(range(3), trace_every=1)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_freezing_a_model_gives_the_chains_of_the_frozen_one(potential: Potential) -> None:
    model = tiny()
    frozen = vf.LangevinSampler(model, potential=potential, **OPTIONS).run(range(3), trace_every=1)
    plain = live(model, potential)
    for name in ("eps", "potentials", "images"):
        torch.testing.assert_close(getattr(plain, name), getattr(frozen, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.trace.gradient_norms, frozen.trace.gradient_norms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_freezing_the_models_own_potential_counts(potential: Potential) -> None:
    """Of which the energy and, with "paper", the prior's part are a tenth."""
    model = tiny()
    mine = copy.deepcopy(model)
    mine.__class__ = Sharper
    noise = noise_of(model, 3)
    u, _ = model.potential_and_grad(*noise, potential)
    start = model.noise_layout.join(*noise)
    chains = vf.LangevinSampler(mine, potential=potential, freeze=False, **OPTIONS).run(range(3), start=start)
    torch.testing.assert_close(chains.potentials[0], 10 * u, rtol=1e-5, atol=1e-4)
    assert not torch.equal(chains.eps, live(model, potential).eps)


def test_without_freezing_hooks_run() -> None:
    model = tiny()
    before = live(model, "energy").potentials[0]
    model.energy.register_forward_hook(doubled)
    torch.testing.assert_close(live(model, "energy").potentials[0], 2 * before)


def test_without_freezing_a_chain_of_no_steps_gives_the_models_mean_images() -> None:
    model = tiny()
    model.vae.image_conditional.register_forward_hook(doubled)
    sampler = vf.LangevinSampler(model, steps=0, step_size=0.1, freeze=False)
    eps_z, _ = model.noise_layout.split(sampler.start(range(2)))
    with torch.no_grad():
        assert torch.equal(sampler.run(range(2)).images, model.mean_image(eps_z))
