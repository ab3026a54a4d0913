"""Every value of every preset, typed in from the published settings; what reads a preset gets these values."""

from __future__ import annotations

import importlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from vaebm_fast.config import (
    ENERGY_ARCHS,
    PRESETS,
    ChainConfig,
    EnergyBlock,
    EnergyTraining,
    Preset,
    ReplayBuffer,
    VAETraining,
)
from vaebm_fast.models import EnergyNetwork
from vaebm_fast.sampling import SampleOptions

PUBLISHED = ("cifar10", "celeba_64", "lsun_church_64", "celeba_256")


def table(text: str) -> dict[str, dict[str, Any]]:
    """The rows by their first cell, each a dict by the header's words; cells are numbers, yes, no or words."""
    header, *rows = (line.split() for line in text.strip().splitlines())
    return {row[0]: dict(zip(header[1:], map(value_of, row[1:]), strict=True)) for row in rows}


def value_of(cell: str) -> Any:
    if cell in ("yes", "no"):
        return cell == "yes"
    if cell.isdigit():
        return int(cell)
    return float(cell) if cell[0].isdigit() else cell


# C: channels of encoder and decoder; S: scales; groups: per scale; nf: pairs of flows; L: latents; cells: in every
# place where there are any; ends: blocks before the encoder and after the decoder.
NVAE = table("""
preset          size  image  C    S  groups  nf  bits  L   cells  ends
cifar10         32    3      128  1  30      1   8     20  2      1
celeba_64       64    3      48   3  5       1   8     20  2      1
lsun_church_64  64    3      48   3  5       1   8     20  2      1
celeba_256      256   3      32   5  4       2   5     20  2      1
stacked_mnist   32    3      32   2  5       1   8     20  2      1
digits          8     1      16   2  2       0   8     4   1      1
""")

STAGE_1 = table("""
preset          epochs  batch  GPUs  lr    warmup  wdn   anneal  mixed
cifar10         400     32     8     1e-2  5       1e-1  no      yes
celeba_64       50      32     8     1e-2  1       1e-1  no      yes
lsun_church_64  60      32     8     1e-2  1       1e-1  no      yes
celeba_256      200     8      8     6e-3  5       1e-2  yes     yes
stacked_mnist   100     32     1     1e-2  5       1e-1  no      yes
digits          60      32     1     1e-2  5       1e-1  no      no
""")

STAGE_2 = table("""
preset          steps  h     batch  GPUs  lr    iterations  alpha_s  use_mu_cd  beta1  ema   max_gap  potential
cifar10         10     8e-5  32     1     4e-5  30000       0.2      no         0.99   0.0   1e4      official
celeba_64       10     5e-6  32     1     5e-5  30000       0.2      yes        0.99   0.0   1e4      official
lsun_church_64  10     4e-6  32     1     4e-5  30000       0.2      yes        0.99   0.0   1e4      official
celeba_256      6      3e-6  4      4     4e-5  9000        0.3      yes        0.99   0.0   1e4      official
stacked_mnist   10     8e-5  32     1     4e-5  30000       0.2      no         0.99   0.0   1e4      official
digits          10     0.15  32     1     1e-4  250         0.2      no         0.5    0.98  100.0    paper
""")

BUFFERS = table("""
preset          size   max_p  anneal
lsun_church_64  10000  0.6    5000
celeba_256      2000   0.6    3000
""")

SAMPLING = table("""
preset          steps  potential
cifar10         16     official
celeba_64       20     official
lsun_church_64  20     official
celeba_256      24     official
stacked_mnist   16     official
digits          10     paper
""")

AUGMENTATION = table("""
preset          horizontal_flip  random_crop
cifar10         yes              no
celeba_64       yes              no
lsun_church_64  yes              yes
celeba_256      yes              no
stacked_mnist   no               no
digits          no               no
""")
TRANSFORMS = {"celeba_64": "celeba", "stacked_mnist": "stacked_mnist"}

# Blocks: channels in and out in units of m, d where they downsample.
ENERGY = {
    "cifar10": (128, "11d 11 12d 22 22d 22"),
    "celeba_64": (64, "11d 11 12d 22 22d 24 44d 44"),
    "lsun_church_64": (64, "11d 11 12d 22 22 22d 24 44 44d 44"),
    "celeba_256": (64, "11d 11 12d 22 22d 22 24d 44 44d 44 48d 88"),
    "stacked_mnist": (64, "11d 11 12d 22"),
    "digits": (32, "11d 11 12d 22"),
}
ENERGY_ARCH = {"cifar10": "cifar_32", "celeba_64": "celeba_64", "lsun_church_64": "lsun_64", "celeba_256": "celeba_256"}
ENERGY_PARAMETERS = {"cifar10": 5.1, "celeba_64": 4.3, "lsun_church_64": 5.8, "celeba_256": 14.2}  # millions
LATENTS = {"cifar10": 153_600, "celeba_64": 134_400, "lsun_church_64": 134_400, "celeba_256": 1_745_920}


def blocks(text: str) -> tuple[EnergyBlock, ...]:
    return tuple(EnergyBlock(int(word[0]), int(word[1]), word[2:] == "d") for word in text.split())


def expected_vae_training(name: str) -> dict[str, Any]:
    row = STAGE_1[name]
    return {
        "epochs": row["epochs"],
        "batch_size": row["batch"],
        "learning_rate": row["lr"],
        "learning_rate_min": 1e-4,
        "warmup_epochs": row["warmup"],
        "weight_decay": 3e-4,
        "adamax_eps": 1e-3,
        "weight_decay_norm": row["wdn"],
        "weight_decay_norm_anneal": row["anneal"],
        "weight_decay_norm_init": 10.0,
        "kl_anneal_portion": 0.3,
        "kl_const_portion": 1e-4,
        "kl_const_coeff": 1e-4,
        "mixed_precision": row["mixed"],
        "log_sigma_floor": None,
    }


def expected_buffer(name: str) -> dict[str, Any] | None:
    row = BUFFERS.get(name)
    return row and {
        "size": row["size"],
        "max_probability": row["max_p"],
        "anneal_steps": row["anneal"],
        "dtype": "float32",
        "placement": "device",
    }


def expected_energy_training(name: str) -> dict[str, Any]:
    row = STAGE_2[name]
    return {
        "iterations": row["iterations"],
        "batch_size": row["batch"],
        "learning_rate": row["lr"],
        "beta1": row["beta1"],
        "beta2": 0.999,
        "weight_decay": 3e-5,
        "spectral_coeff": row["alpha_s"],
        "chain": {
            "steps": row["steps"],
            "step_size": row["h"],
            "potential": row["potential"],
            "temperature": 1.0,
            "start_temperature": 1.0,
        },
        "use_mean_negatives": row["use_mu_cd"],
        "buffer": expected_buffer(name),
        "init_batches": 5,
        "ema_decay": row["ema"],
        "max_energy_gap": row["max_gap"],
        "max_rollbacks": 3,
    }


def test_there_are_these_presets_and_no_others() -> None:
    assert tuple(PRESETS) == (*PUBLISHED, "stacked_mnist", "digits")
    assert [preset.name for preset in PRESETS.values()] == list(PRESETS)
    names = {"name", "nvae", "energy", "vae_training", "energy_training", "sampling", "transform"}
    assert {entry.name for entry in fields(Preset)} == names | {*AUGMENTATION["digits"], "vae_gpus", "energy_gpus"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_nvae_of_a_preset_is_the_published_one(name: str) -> None:
    row = NVAE[name]
    cells, ends = row["cells"], row["ends"]
    assert asdict(PRESETS[name].nvae) == {
        "image_size": row["size"],
        "image_channels": row["image"],
        "likelihood": "gaussian",
        "num_mixture_dec": 10,  # which Gaussian pixels do not use
        "uncounted_border": 0,
        "num_x_bits": row["bits"],
        "arch_instance": "res_mbconv",
        "use_se": True,
        "res_dist": True,
        "num_latent_scales": row["S"],
        "num_groups_per_scale": row["groups"],
        "num_latent_per_group": row["L"],
        "ada_groups": False,
        "min_groups_per_scale": 1,
        "num_channels_enc": row["C"],
        "num_channels_dec": row["C"],
        "num_preprocess_blocks": ends,
        "num_preprocess_cells": cells,
        "num_cell_per_cond_enc": cells,
        "num_postprocess_blocks": ends,
        "num_postprocess_cells": cells,
        "num_cell_per_cond_dec": cells,
        "num_nf": row["nf"],
    }


@pytest.mark.parametrize("name", PRESETS)
def test_stage_1_of_a_preset_is_trained_as_published(name: str) -> None:
    assert asdict(PRESETS[name].vae_training) == expected_vae_training(name)
    assert PRESETS[name].vae_gpus == STAGE_1[name]["GPUs"]


@pytest.mark.parametrize("name", PRESETS)
def test_stage_2_of_a_preset_is_trained_as_published(name: str) -> None:
    assert asdict(PRESETS[name].energy_training) == expected_energy_training(name)
    assert PRESETS[name].energy_gpus == STAGE_2[name]["GPUs"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_sampled_with_the_h_that_it_is_trained_with(name: str) -> None:
    expected = {**SAMPLING[name], "step_size": STAGE_2[name]["h"], "temperature": 1.0, "start_temperature": 1.0}
    assert asdict(PRESETS[name].sampling) == expected
    job = SampleOptions(nvae=Path("v"), energy=Path("e"), seeds="0", out=Path("o"), preset=name).resolve()
    assert asdict(job.chain) == {**expected, "start_temperature": 1.0}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_augments_its_images_as_published(name: str) -> None:
    preset = PRESETS[name]
    assert {what: getattr(preset, what) for what in AUGMENTATION[name]} == AUGMENTATION[name]
    assert preset.transform == TRANSFORMS.get(name)


@pytest.mark.parametrize("name", PRESETS)
def test_the_energy_network_of_a_preset_has_the_published_blocks(name: str) -> None:
    width, text = ENERGY[name]
    energy = PRESETS[name].energy
    assert (energy.width, energy.blocks) == (width, blocks(text))
    assert (energy.image_size, energy.image_channels) == (NVAE[name]["size"], NVAE[name]["image"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_energy_networks_are_known_by_name(name: str) -> None:
    arch, (width, text) = ENERGY_ARCHS[ENERGY_ARCH[name]], ENERGY[name]
    assert (arch.image_size, arch.default_width, arch.blocks) == (NVAE[name]["size"], width, blocks(text))
    assert arch.config() == PRESETS[name].energy
    assert ENERGY_ARCHS["mnist"].blocks == blocks("11d 11 12d 22") and ENERGY_ARCHS["mnist"].default_width == 64
    assert set(ENERGY_ARCHS) == {"mnist", *ENERGY_ARCH.values()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_of_a_preset_have_the_published_sizes(name: str) -> None:
    row = NVAE[name]
    sides = [row["size"] // 2 ** (row["S"] - scale) for scale in range(row["S"]) for _ in range(row["groups"])]
    assert PRESETS[name].nvae.latent_shapes == [(20, side, side) for side in sides]
    assert sum(20 * side**2 for side in sides) == LATENTS[name]
    with torch.device("meta"):
        energy = EnergyNetwork(PRESETS[name].energy)
    assert round(sum(parameter.numel() for parameter in energy.parameters()) / 1e6, 1) == ENERGY_PARAMETERS[name]


def test_settings_without_a_preset_are_those_of_cifar10_with_means_as_negatives() -> None:
    assert asdict(VAETraining()) == expected_vae_training("cifar10")
    assert asdict(EnergyTraining()) == expected_energy_training("cifar10") | {"use_mean_negatives": True}
    assert asdict(ReplayBuffer()) == expected_buffer("lsun_church_64")
    assert ChainConfig(1, 2.0) == ChainConfig(1, 2.0, "official", 1.0)


@pytest.fixture(scope="module")
def command() -> Any:
    pytest.importorskip("tyro", reason="the command reads its options by tyro")
    return importlib.import_module("vaebm_fast.cli.train")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("stage", ["vae", "energy"])
def test_train_without_other_options_gives_a_trainer_the_preset(
    stage: str, name: str, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[tuple[Any, ...]] = []

    def trainer(*arguments: Any, **options: Any) -> Any:
        given.append((*arguments, options))

    monkeypatch.setattr(command, "open_source", lambda data, **shape: (data, shape))
    monkeypatch.setattr(command, "open_loader", lambda *arguments, **options: (*arguments, options))
    monkeypatch.setattr(command, "load_nvae", lambda path: path)
    monkeypatch.setattr(command, "VAETrainer", trainer)
    monkeypatch.setattr(command, "EnergyTrainer", trainer)
    monkeypatch.setattr(command, "finish", lambda trainer, run: 0)
    nvae = ["--nvae", "nvae.safetensors"] if stage == "energy" else []
    assert command.main([stage, "--preset", name, "--data", "here", "--device", "cpu", *nvae]) == 0
    (*networks, training, ((data, shape), loader_batch, loader_options), options) = given[0]
    row = NVAE[name]
    expected = {"image_size": row["size"], "image_channels": row["image"], "transform": TRANSFORMS.get(name)}
    assert (data, shape) == ("here", expected)
    assert options == {"seed": 0, "device": torch.device("cpu")}
    assert loader_batch == training.batch_size
    chosen = {"loader": "auto", "cache": "auto", "device": torch.device("cpu")}
    assert loader_options == {"seed": 0, **chosen, **AUGMENTATION[name]}
    if stage == "vae":
        assert networks == [PRESETS[name].nvae]
        assert asdict(training) == expected_vae_training(name)
    else:
        assert networks == [Path("nvae.safetensors"), PRESETS[name].energy]
        assert asdict(training) == expected_energy_training(name)
    published = {"vae": STAGE_1, "energy": STAGE_2}[stage][name]
    batch, gpus = published["batch"], published["GPUs"]
    note = f"Published: {gpus} processes of {batch} images; this run: 1 process of {batch}.\n"
    assert capsys.readouterr().err == (note if gpus > 1 else "")
