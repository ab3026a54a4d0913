"""Networks in files: every published layout loads, ours gives the same, and both are described and converted."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoint_files import ARGS, assert_same_state, energy_content, nvae_content, refusal, saved
from tests.helpers.golden import CASES, ENERGY_CASES, case_path
from vaebm_fast.checkpoint import (
    CheckpointError,
    convert,
    describe,
    load_energy,
    load_nvae,
    load_training,
    official,
    save_energy,
    save_nvae,
    save_training,
    store,
)
from vaebm_fast.config import ENERGY_ARCHS, EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.models import NVAE, EnergyNetwork

# Published files


@pytest.mark.parametrize("case", CASES)
def test_golden_nvae_survives_conversion(case: str, tmp_path: Path) -> None:
    source, ours = case_path(case, "nvae.pt"), tmp_path / "ours"
    published = load_nvae(source)
    convert(source, ours)
    converted = load_nvae(ours)
    assert converted.config == published.config
    assert_same_state(converted.state_dict(), published.state_dict())
    before, after = describe(source), describe(ours)
    assert before["content_sha256"] == after["content_sha256"]
    assert after["info"] == {**before["info"], "source_sha256": before["file_sha256"]}
    assert (before["layout"], after["layout"]) == ("published", "vaebm-fast")


@pytest.mark.parametrize("case", ENERGY_CASES)
def test_golden_energy_is_recognised_and_survives_conversion(case: str, tmp_path: Path) -> None:
    expected = {"cifar_tiny": "cifar_32", "alt_tiny": "lsun_64", "celeba64_tiny": "celeba_64", "hq_tiny": "celeba_256"}
    source, ours = case_path(case, "energy.pth"), tmp_path / "ours"
    assert describe(source)["architecture"] == expected[case]
    convert(source, ours)
    assert load_energy(ours).config == load_energy(source).config
    assert_same_state(load_energy(ours).state_dict(), load_energy(source).state_dict())


def test_loaded_weights_are_those_of_the_file_without_the_stray_entries() -> None:
    path = case_path("cifar_tiny", "nvae.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(path, weights_only=True)["state_dict"]
    loaded = load_nvae(path).state_dict()
    assert set(raw) - set(loaded) == {key for key in raw if key.endswith("weight_normalized")} != set()
    assert all(torch.equal(loaded[key], raw[key]) for key in loaded)


def test_loading_gives_trainable_parameters_in_eval_mode_and_leaves_random_numbers_alone(tmp_path: Path) -> None:
    nvae, energy = saved(tmp_path / "n", nvae_content()), saved(tmp_path / "e", energy_content())
    generator = torch.get_rng_state()
    for module in (load_nvae(nvae), load_energy(energy)):
        assert not module.training and all(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_torch_formats_load(zipped: bool, tmp_path: Path) -> None:
    nvae, energy = nvae_content(), energy_content()
    saved(tmp_path / "n", nvae, _use_new_zipfile_serialization=zipped)
    saved(tmp_path / "e", energy, _use_new_zipfile_serialization=zipped)
    assert_same_state(load_nvae(tmp_path / "n").state_dict(), nvae["state_dict"])
    assert_same_state(load_energy(tmp_path / "e").state_dict(), energy["model"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_data_parallel_prefixes_load_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    content = energy_content()
    cast = {key: value.to(dtype) for key, value in content["model"].items()}
    saved(tmp_path / "e", {"model": OrderedDict((f"module.{key}", value) for key, value in cast.items())})
    expected = {key: value.float() for key, value in cast.items()}
    assert_same_state(load_energy(tmp_path / "e").state_dict(), expected)
    convert(tmp_path / "e", tmp_path / "ours")
    assert_same_state(store.load(tmp_path / "ours")[0], expected)


@pytest.mark.parametrize(
    ("dataset", "side", "channels", "likelihood", "border"),
    [
        ("mnist", 32, 1, "bernoulli", 2),
        ("omniglot", 32, 1, "bernoulli", 2),
        ("stacked_mnist", 32, 3, "gaussian", 0),
        ("cifar10", 32, 3, "gaussian", 0),
        ("ffhq", 256, 3, "gaussian", 0),
        ("celeba_64", 64, 3, "gaussian", 0),
        ("lsun_church_64", 64, 3, "gaussian", 0),
        ("imagenet_32", 32, 3, "gaussian", 0),
    ],
)
def test_the_dataset_names_the_images(dataset: str, side: int, channels: int, likelihood: str, border: int) -> None:
    config = official.nvae_config({**ARGS, "dataset": dataset})
    found = (config.image_size, config.image_channels, config.likelihood, config.uncounted_border)
    assert found == (side, channels, likelihood, border)


def test_old_files_get_the_defaults_of_their_time() -> None:
    lacking = ("ada_groups", "min_groups_per_scale", "num_mixture_dec", "num_x_bits")
    old = official.nvae_config({key: value for key, value in ARGS.items() if key not in lacking})
    assert (old.ada_groups, old.min_groups_per_scale, old.num_x_bits) == (False, 1, 8)
    assert (old.likelihood, old.num_mixture_dec) == ("logistic_mixture", 10)


@pytest.mark.parametrize("arch", ENERGY_ARCHS)
def test_every_energy_network_is_recognised_at_any_width(arch: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "e", energy_content(arch, width=3, channels=1))
    assert load_energy(path).config == ENERGY_ARCHS[arch].config(image_channels=1, width=3)
    for spelled in (arch, arch.replace("_", "")):
        assert load_energy(path, arch=spelled).config == load_energy(path).config


def test_unknown_blocks_load_only_when_they_are_given(tmp_path: Path) -> None:
    config = EnergyConfig(16, 3, 2, parse_blocks("1-1d 1-2 2-2"))
    path = saved(tmp_path / "e", {"model": EnergyNetwork(config).state_dict()})
    message = refusal(load_energy, path)
    assert "--energy-arch" in message and all(name in message for name in ENERGY_ARCHS)
    assert "image_size" in refusal(load_energy, path, arch="1-1d 1-2 2-2")
    assert load_energy(path, arch="1-1d 1-2 2-2", image_size=16).config == config
    assert "4-4" in refusal(load_energy, path, arch="celeba256")
    assert "celeba_256" in refusal(load_energy, path, arch="celeba")


def test_the_kinds_are_not_confused(tmp_path: Path) -> None:
    nvae, energy = saved(tmp_path / "n", nvae_content()), saved(tmp_path / "e", energy_content())
    convert(nvae, tmp_path / "n2")
    convert(energy, tmp_path / "e2")
    save_training({"step": 1}, tmp_path / "t")
    for path in (nvae, tmp_path / "n2"):
        assert "holds an NVAE, not an energy network" in refusal(load_energy, path)
    for path in (energy, tmp_path / "e2"):
        assert "holds an energy network, not an NVAE" in refusal(load_nvae, path)
    assert "holds a training state, not an NVAE" in refusal(load_nvae, tmp_path / "t")
    assert "holds an NVAE, not a training state" in refusal(load_training, tmp_path / "n2")
    assert "not written by vaebm-fast" in refusal(load_training, nvae)


def test_save_and_load_return_the_same_networks_and_information(tmp_path: Path) -> None:
    vae = NVAE(NVAEConfig(8, num_latent_scales=2, num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4))
    save_nvae(vae, tmp_path / "n", {"epoch": 5})
    assert load_nvae(tmp_path / "n").config == vae.config
    assert_same_state(load_nvae(tmp_path / "n").state_dict(), vae.state_dict())
    assert describe(tmp_path / "n")["info"] == {"epoch": 5}
    assert vae.training


def test_describe_counts_what_the_network_has(tmp_path: Path) -> None:
    vae = load_nvae(saved(tmp_path / "n", nvae_content()))
    facts = describe(tmp_path / "n")
    assert facts["parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert facts["latent_shapes"] == [[2, 4, 4], [2, 4, 4]]
    assert (facts["latent_dimensions"], facts["noise_dimensions"]) == (64, 64 + 3 * 8 * 8)
    assert (facts["kind"], facts["info"]) == ("nvae", {"dataset": "toy_8", "epoch": 3, "global_step": 12})
    save_training({"m": torch.zeros(3, 4)}, tmp_path / "t", {"iteration": 9})
    facts = describe(tmp_path / "t")
    assert (facts["kind"], facts["elements"], facts["info"]) == ("training", 12, {"iteration": 9})


def test_conversion_overwrites_only_when_asked_and_never_its_source(tmp_path: Path) -> None:
    source, other = saved(tmp_path / "e", energy_content()), saved(tmp_path / "other", energy_content())
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link"):
        with pytest.raises(CheckpointError, match="same file"):
            convert(source, same, overwrite=True)
    assert source.read_bytes() == before
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, other)
    convert(source, other, overwrite=True)
    assert describe(other)["layout"] == "vaebm-fast"


def test_an_arch_that_contradicts_our_file_is_refused(tmp_path: Path) -> None:
    save_energy(EnergyNetwork(ENERGY_ARCHS["mnist"].config(width=2)), tmp_path / "e")
    assert load_energy(tmp_path / "e", arch="mnist", image_size=32).config.image_size == 32
    assert "not celeba64" in refusal(load_energy, tmp_path / "e", arch="celeba64")
    assert "32-pixel" in refusal(load_energy, tmp_path / "e", image_size=64)
