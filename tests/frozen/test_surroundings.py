"""What the caller set for torch changes no bit of a frozen pair, a chain or a loaded network; copies are whole."""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from tests.helpers.checkpoint_files import energy_content, nvae_content, saved
from tests.helpers.frozen_pairs import noise_of, tiny
from tests.helpers.trainers import energy_trainer, vae_trainer
from vaebm_fast.chain.langevin import Chains
from vaebm_fast.config import ReplayBuffer
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.frozen.part import StaleWeightsError
from vaebm_fast.ops import _backend
from vaebm_fast.training import VAETrainer

OPTIONS: dict[str, Any] = {"steps": 3, "step_size": 1e-2}


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    """Anything that is made without a device has no values and fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": autocast,
    "default dtype": default_dtype,
    "default device": default_device,
}


def tensors(chains: Chains) -> list[Tensor]:
    assert chains.trace is not None
    return [chains.eps, chains.potentials, chains.images, chains.trace.gradient_norms, chains.trace.images]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("potential", ["official", "paper"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_chains_are_bit_equal_whatever_the_caller_set(name: str, potential: Any, backend: Any) -> None:
    if _backend.why_absent(backend):
        pytest.skip("not built")
    model = tiny()

    def chains(pair: FrozenVAEBM | vf.VAEBM) -> list[Tensor]:
        sampler = vf.LangevinSampler(pair, potential=potential, **OPTIONS)
        return tensors(sampler.run(range(3), trace_every=1, nonfinite="redo"))

    before = freeze(model, backend=backend)
    expected = chains(before)
    with SURROUNDINGS[name]():
        assert_same(chains(before), expected)
        assert_same(chains(freeze(model, backend=backend)), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0)  # stale, with the same weights
        before.refresh()
        assert_same(chains(before), expected)
        assert_same(chains(model), chains(freeze(model)))
        assert vf.LangevinSampler(before, **OPTIONS).sample([]).device.type == "cpu"


@pytest.mark.parametrize("potential", ["official", "energy"])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_chains_of_a_model_that_is_not_frozen_are_bit_equal_too(name: str, potential: Any) -> None:
    sampler = vf.LangevinSampler(tiny(), potential=potential, freeze=False, **OPTIONS)
    expected = tensors(sampler.run(range(3), trace_every=1))
    with SURROUNDINGS[name]():
        assert_same(tensors(sampler.run(range(3), trace_every=1)), expected)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_loaded_and_built_networks_are_the_same_whatever_the_caller_set(name: str, tmp_path: Path) -> None:
    model = vf.VAEBM.from_preset("digits", seed=3)
    vf.save_nvae(model.vae, tmp_path / "nvae.safetensors")
    vf.save_energy(model.energy, tmp_path / "energy.safetensors")
    published = saved(tmp_path / "nvae.pt", nvae_content()), saved(tmp_path / "energy.pth", energy_content())
    expected = vf.load_nvae(published[0]), vf.load_energy(published[1])
    with SURROUNDINGS[name]():
        assert_equal_networks(vf.VAEBM.from_preset("digits", seed=3), model)
        assert_equal_networks(vf.load_nvae(tmp_path / "nvae.safetensors"), model.vae)
        assert_equal_networks(vf.load_energy(tmp_path / "energy.safetensors"), model.energy)
        assert_equal_networks(vf.load_nvae(published[0]), expected[0])
        assert_equal_networks(vf.load_energy(published[1]), expected[1])


def assert_equal_networks(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    here, there = ([*m.named_parameters(), *m.named_buffers()] for m in (actual, expected))
    assert [name for name, _ in here] == [name for name, _ in there]
    assert_same([tensor.detach() for _, tensor in here], [tensor.detach() for _, tensor in there])


@pytest.mark.parametrize("changes", [{"mixed_precision": False}, {"mixed_precision": True}, None])
@pytest.mark.parametrize("surroundings", [autocast, default_dtype])
def test_training_steps_are_bit_equal_whatever_the_caller_set(changes: Any, surroundings: Any) -> None:
    def trained() -> tuple[list[dict[str, float]], list[Tensor]]:
        trainer = vae_trainer(**changes) if changes else energy_trainer(buffer=ReplayBuffer(size=16, anneal_steps=0))
        scalars = [trainer.step(step) for step in range(4)]
        network = trainer.vae if isinstance(trainer, VAETrainer) else trainer.model.energy
        tensors = [*network.state_dict().values(), trainer.sample_images()]
        return [{name: float(value) for name, value in each.items()} for each in scalars], tensors

    expected = trained()
    with surroundings():
        found = trained()
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


def test_the_callers_random_state_and_defaults_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    with default_dtype():
        vf.VAEBM.from_preset("digits")
        assert torch.get_default_dtype() == torch.float64
    assert torch.equal(torch.get_rng_state(), before)


# Threads.
def in_threads(*bodies: Callable[[], object]) -> list[BaseException]:
    """Run each body twenty times, all at once; the exceptions."""
    failures: list[BaseException] = []

    def repeat(body: Callable[[], object]) -> None:
        try:
            for _ in range(20):
                body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_building_and_loading_neither_use_nor_disturb_the_random_numbers_of_other_threads(tmp_path: Path) -> None:
    path = saved(tmp_path / "nvae.pt", nvae_content())
    expected = vf.VAEBM.from_preset("digits", seed=3)
    torch.manual_seed(5)
    alone = torch.cat([torch.rand(50) for _ in range(200)])
    torch.manual_seed(5)
    drawn: list[Tensor] = []

    def draw() -> None:
        drawn.extend(torch.rand(50) for _ in range(10))

    def build() -> None:
        assert_equal_networks(vf.VAEBM.from_preset("digits", seed=3), expected)
        vf.load_nvae(path)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert in_threads(draw, build) == []
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(torch.cat(drawn), alone)


def test_networks_load_in_several_threads_at_once(tmp_path: Path) -> None:
    nvae, energy = saved(tmp_path / "nvae.pt", nvae_content()), saved(tmp_path / "energy.pth", energy_content())
    expected = vf.load_nvae(nvae)
    state = torch.get_rng_state()

    def load() -> None:
        assert_equal_networks(vf.load_nvae(nvae), expected)

    assert in_threads(load, load, load, lambda: vf.load_energy(energy)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_a_namespace_that_the_caller_allowed_stays_allowed(tmp_path: Path) -> None:
    path = saved(tmp_path / "nvae.pt", nvae_content())
    with torch.serialization.safe_globals([argparse.Namespace]):
        vf.load_nvae(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    vf.load_nvae(path)


def test_models_built_in_several_threads_have_the_weights_of_their_seeds() -> None:
    expected = [vf.VAEBM.from_preset("digits", seed=seed) for seed in range(3)]

    def build(seed: int) -> Callable[[], None]:
        return lambda: assert_equal_networks(vf.VAEBM.from_preset("digits", seed=seed), expected[seed])

    assert in_threads(*map(build, range(3))) == []


# Copies.
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_works_and_follows_its_own_model(copied: Callable[[FrozenVAEBM], FrozenVAEBM]) -> None:
    model = tiny()
    pair, noise = freeze(model), noise_of(model)
    u, gradients = pair.potential_and_grad(*noise)
    other = copied(pair)
    assert not other.is_stale
    again, more = other.potential_and_grad(*noise)
    assert_same([again, *more], [u, *gradients])
    with torch.no_grad():
        model.energy.linear.bias.add_(1)
    assert pair.is_stale and not other.is_stale
    pair.refresh()
    torch.testing.assert_close(pair.potential_and_grad(*noise)[0], u + 1)
    assert torch.equal(other.potential_and_grad(*noise)[0], u)
    own = other._model
    assert own is not model and isinstance(own, vf.VAEBM)
    with torch.no_grad():
        own.energy.linear.bias.add_(2)
    assert other.is_stale and not pair.is_stale
    other.refresh()
    torch.testing.assert_close(other.potential_and_grad(*noise)[0], u + 2)


def test_a_copy_of_a_stale_pair_is_stale() -> None:
    model = tiny()
    pair = freeze(model)
    with torch.no_grad():
        model.energy.linear.bias.add_(1)
    other = copy.deepcopy(pair)
    assert other.is_stale
    other.refresh()
    noise = noise_of(model)
    assert torch.equal(other.potential_and_grad(*noise)[0], freeze(model).potential_and_grad(*noise)[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copied_sampler_samples_its_own_model_and_takes_no_graphs_along(copied: Any) -> None:
    sampler = vf.LangevinSampler(tiny(), **OPTIONS)
    assert sampler._graphs is not None
    sampler._graphs._recordings["key"] = threading.Lock()  # type: ignore[assignment]  # like a graph, it cannot be copied
    other = copied(sampler)
    assert other._graphs._recordings == {} and torch.equal(other.sample(range(3)), sampler.sample(range(3)))


def test_copying_in_inference_mode_is_one_sentence() -> None:
    pair = freeze(tiny())
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be copied under torch.inference_mode"):
        copy.deepcopy(pair)


def test_weights_that_moved_in_memory_are_said_to_have_moved() -> None:
    model = tiny()
    pair, noise = freeze(model), noise_of(model)
    u, _ = pair.potential_and_grad(*noise)
    model.share_memory()
    with pytest.raises(StaleWeightsError, match="changed, or moved in memory"):
        pair.potential_and_grad(*noise)
    pair.refresh()
    assert torch.equal(pair.potential_and_grad(*noise)[0], u)
