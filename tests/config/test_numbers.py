"""Settings given as scalars or arrays of NumPy and torch, or as fractions, are Python's numbers from then on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vaebm_fast as vf
from tests.helpers.frozen_pairs import noise_of, tiny
from tests.helpers.trainers import SOURCE, TINY
from vaebm_fast.chain.noise import step_seeds
from vaebm_fast.checkpoint import CheckpointError, describe, load_training, save_training
from vaebm_fast.config import (
    PRESETS,
    ChainConfig,
    EnergyConfig,
    EnergyTraining,
    NVAEConfig,
    ReplayBuffer,
    VAETraining,
    parse_blocks,
)
from vaebm_fast.data import TorchLoader
from vaebm_fast.evaluation.likelihood import evaluate_likelihood
from vaebm_fast.frozen import freeze
from vaebm_fast.sampling import SampleOptions
from vaebm_fast.training import RunOptions, VAETrainer

QUARTER = [  # 1/4 is exact in each
    *(np.float16(0.25), np.float32(0.25), np.float64(0.25), np.array(0.25), np.array(0.25, np.float32)),
    *(torch.tensor(0.25), torch.tensor(0.25, dtype=torch.bfloat16), Fraction(1, 4), Decimal("0.25")),
]
CPU = torch.device("cpu")
THREE = [np.int8(3), np.uint64(3), np.array(3), torch.tensor(3)]


@pytest.mark.parametrize("size", QUARTER)
@pytest.mark.parametrize("steps", THREE)
def test_a_chain_takes_any_scalar(steps: Any, size: Any) -> None:
    config = ChainConfig(steps, size, temperature=size, start_temperature=size)
    assert config == ChainConfig(3, 0.25, temperature=0.25, start_temperature=0.25)
    assert json.loads(json.dumps(asdict(config)))["step_size"] == 0.25
    assert config.step_sizes == (0.25, 0.25, 0.25) and all(type(each) is float for each in config.step_sizes)


@pytest.mark.parametrize(
    "sizes", [np.array([0.25, 0.5]), torch.tensor([0.25, 0.5]), [np.float32(0.25), Fraction(1, 2)], [0.25, 0.5]]
)
def test_a_schedule_is_any_sequence_of_scalars(sizes: Any) -> None:
    assert ChainConfig(2, sizes).step_sizes == (0.25, 0.5)
    assert vf.LangevinSampler(tiny(), steps=2, step_size=sizes).step_sizes == (0.25, 0.5)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"steps": 3.0}, "steps is 3.0; it must be a whole number"),
        ({"steps": np.float64(2)}, "steps is 2.0; it must be a whole number"),
        ({"steps": "3"}, "steps is '3'; it must be a whole number"),
        ({"step_size": "a"}, "step_size is a; it must be a positive number"),
        ({"step_size": 1j}, "step_size is 1j; it must be a positive number"),
        ({"step_size": None}, "step_size is None; it must be a positive number"),
        ({"step_size": np.float32("nan")}, "step_size is nan"),
        ({"temperature": "warm"}, "temperature is 'warm'; it must be a number"),
    ],
)
def test_what_is_no_number_is_one_sentence(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ChainConfig(**{"steps": 2, "step_size": 0.1, **wrong})


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: VAETraining(epochs=2.5), "epochs is 2.5; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: EnergyTraining(iterations=np.float64(2)), "iterations is 2.0; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: EnergyConfig(8.0, 3, 4, parse_blocks("1-1")), "image_size is 8.0; it must be a whole number"),  # type: ignore[arg-type]
        (lambda: VAETraining(learning_rate=None), "learning_rate is None; it must be a number"),  # type: ignore[arg-type]
        (lambda: RunOptions(Path("x"), save_every="5"), "save_every is '5'; it must be a whole number"),  # type: ignore[arg-type]
    ],
)
def test_fields_of_every_configuration_are_checked(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_paths_may_be_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    options = SampleOptions(nvae="~/n", seeds="0", out="o", energy=None)  # type: ignore[arg-type]
    assert (options.nvae, options.out, options.energy) == (Path("/home/ada/n"), Path("o"), None)
    assert RunOptions("runs").out == Path("runs")  # type: ignore[arg-type]


def test_seeds_that_are_not_whole_are_refused() -> None:
    sampler = vf.LangevinSampler(tiny(), steps=1, step_size=0.1)
    for ask in (lambda: sampler.run(torch.tensor([0.5, 1.0])), lambda: sampler.sample([0.5])):  # type: ignore[list-item]
        with pytest.raises(ValueError, match="must be (a )?whole number"):
            ask()


def test_a_sampler_takes_numpys_integers_as_seeds_steps_and_sizes() -> None:
    model = tiny()
    expected = vf.LangevinSampler(model, steps=3, step_size=0.25).run([0, 1, 2**63], trace_every=2)
    sampler = vf.LangevinSampler(model, steps=np.int32(3), step_size=np.float32(0.25))  # type: ignore[arg-type]
    found = sampler.run(np.array([0, 1, 2**63], np.uint64), trace_every=np.int64(2))  # type: ignore[arg-type]
    assert torch.equal(found.eps, expected.eps) and found.trace is not None and found.trace.steps == [1, 3]
    assert torch.equal(sampler.run(torch.tensor([0, 1], dtype=torch.int32)).eps, expected.eps[:2])
    images = sampler.sample(np.arange(5), batch_size=np.int64(2))  # type: ignore[arg-type]
    assert torch.equal(images, vf.LangevinSampler(model, steps=3, step_size=0.25).sample(range(5), batch_size=2))
    with pytest.raises(ValueError, match=r"batch_size is 2.5; it must be a whole number"):
        sampler.sample(range(2), batch_size=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", QUARTER)
def test_potentials_take_any_scalar_as_temperature(temperature: Any) -> None:
    model = tiny()
    noise, pair = noise_of(model), freeze(model)
    for each in (model, pair):
        for compute in (
            lambda t, each=each: each.potential_and_grad(*noise, temperature=t)[0],
            lambda t, each=each: each.image(*noise, temperature=t),
            lambda t, each=each: each.mean_image(noise[0], temperature=t),
        ):
            assert torch.equal(compute(temperature), compute(0.25))


def test_every_configuration_holds_pythons_numbers() -> None:
    nvae = replace(TINY, num_groups_per_scale=np.int64(1), num_x_bits=np.uint8(5))
    energy = EnergyConfig(torch.tensor(8), np.int64(1), np.int32(4), list(parse_blocks("1-1d")))  # type: ignore[arg-type]
    buffer = ReplayBuffer(np.int64(64), np.float32(0.25))  # type: ignore[arg-type]
    training = replace(PRESETS["digits"].energy_training, learning_rate=np.float32(0.25), buffer=buffer)
    run = RunOptions(Path("x"), save_every=np.int64(3))  # type: ignore[arg-type]
    options = SampleOptions(
        nvae=Path("a"), seeds="0-3", out=Path("b"), steps=np.int64(2), step_size=[np.float32(0.25)] * 2,
        batch_size=np.int64(4), temperature=torch.tensor(0.25),
    )  # type: ignore[arg-type]  # fmt: skip
    for each in (nvae, energy, training, run, options):
        for name, value in asdict(each).items():
            assert not hasattr(value, "tolist"), name
    assert options.step_size == (0.25, 0.25) and hash(energy) == hash(EnergyConfig(8, 1, 4, parse_blocks("1-1d")))
    assert isinstance(nvae, NVAEConfig) and json.dumps([asdict(nvae), asdict(training), asdict(energy)])


def test_trainers_and_loaders_take_numpys_integers_as_seeds() -> None:
    """A shift by 40 bits overflows NumPy's integers."""
    training = replace(PRESETS["digits"].vae_training, batch_size=np.int64(64))

    def trainer(seed: Any) -> VAETrainer:
        return VAETrainer(TINY, training, TorchLoader(SOURCE, np.int32(64), seed=seed), seed=seed)

    mine, expected = trainer(np.int64(2**30)), trainer(2**30)
    assert all(torch.equal(a, b) for a, b in zip(mine.noise(3), expected.noise(3), strict=True))
    numbers = np.int64(2**30), np.int64(3), np.int64(4)
    assert torch.equal(step_seeds(*numbers, CPU), step_seeds(2**30, 3, 4, CPU))  # type: ignore[arg-type]
    assert torch.equal(mine.images(3), expected.images(3)) and json.dumps(mine.settings())
    with pytest.raises(ValueError, match=r"seed is 1.5; it must be a whole number"):
        trainer(1.5)


@pytest.mark.parametrize("seed", THREE)
def test_models_of_presets_take_any_whole_number_as_seed(seed: Any) -> None:
    found, expected = (vf.VAEBM.from_preset("digits", seed=each) for each in (seed, 3))
    assert torch.equal(found.energy.conv1.weight, expected.energy.conv1.weight)
    assert not torch.equal(found.energy.conv1.weight, vf.VAEBM.from_preset("digits").energy.conv1.weight)


def test_checkpoints_take_scalars_of_other_libraries_as_information(tmp_path: Path) -> None:
    info = {"steps": np.int64(3), "loss": np.float32(0.25), "sizes": np.arange(2), "more": [torch.tensor(1)]}
    vf.save_nvae(vf.NVAE(TINY), tmp_path / "nvae", info)
    plain = {"steps": 3, "loss": 0.25, "sizes": [0, 1], "more": [1]}
    assert describe(tmp_path / "nvae")["info"] == plain
    save_training({"step": 3}, tmp_path / "state", info)
    assert load_training(tmp_path / "state") == ({"step": 3}, plain)
    with pytest.raises(CheckpointError, match="must be JSON values, but PosixPath"):
        vf.save_nvae(vf.NVAE(TINY), tmp_path / "nvae", {"path": [tmp_path / "x"]})
    with pytest.raises(CheckpointError, match="must be JSON values .keys must be str"):
        vf.save_nvae(vf.NVAE(TINY), tmp_path / "nvae", {np.int64(3): 1})  # type: ignore[dict-item]
    assert describe(tmp_path / "nvae")["info"] == plain


def test_loaders_take_numpys_booleans_and_steps() -> None:
    loader = TorchLoader(SOURCE, 200, horizontal_flip=np.bool_(True))  # type: ignore[arg-type]
    assert loader.settings()["horizontal_flip"] is True
    expected = loader.batch(3)
    assert torch.equal(loader.batch(np.uint8(3)), expected) and torch.equal(loader.batch(torch.tensor(3)), expected)  # type: ignore[arg-type]


def test_likelihoods_take_numpys_integers() -> None:
    vae, counts = vf.NVAE(TINY).eval(), {"importance_samples": 1, "batch_size": 500, "seed": 3}
    facts = evaluate_likelihood(vae, SOURCE, **{name: np.int64(value) for name, value in counts.items()})
    assert json.dumps(asdict(facts)) and facts == evaluate_likelihood(vae, SOURCE, **counts)
