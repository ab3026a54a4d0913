"""Files: every layout loads, whatever is wrong gives one sentence, and no write or flipped bit goes unnoticed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden import CASES, ENERGY_CASES, case_path
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vaebm_fast.checkpoint import (
    CheckpointError,
    convert,
    describe,
    flatten,
    load_energy,
    load_nvae,
    load_training,
    official,
    save_energy,
    save_nvae,
    save_training,
    store,
    unflatten,
)
from vaebm_fast.config import ENERGY_ARCHS, EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.models import NVAE, EnergyNetwork

torch.set_num_threads(1)

ARGS = {
    "dataset": "toy_8", "use_se": True, "res_dist": True, "num_x_bits": 8, "num_latent_scales": 1,
    "num_groups_per_scale": 2, "num_latent_per_group": 2, "ada_groups": False, "min_groups_per_scale": 1,
    "num_channels_enc": 4, "num_channels_dec": 4, "num_preprocess_blocks": 1, "num_preprocess_cells": 1,
    "num_cell_per_cond_enc": 1, "num_postprocess_blocks": 1, "num_postprocess_cells": 1, "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 1, "num_nf": 0, "arch_instance": "res_mbconv",
}  # fmt: skip


class Custom:
    """A class no checkpoint may ask for."""


class Attack:
    """Unpickled carelessly, it leaves a file behind."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.evidence}'",)


def nvae_content(**changed_args: Any) -> dict[str, Any]:
    """The dictionary of a published file holding a fresh small NVAE."""
    args = {**ARGS, **changed_args}
    state = NVAE(official.nvae_config(args)).state_dict()
    return {"epoch": 3, "global_step": 12, "state_dict": state, "args": argparse.Namespace(**args)}


def energy_content(arch: str = "mnist", width: int = 2, channels: int = 3) -> dict[str, Any]:
    state = EnergyNetwork(ENERGY_ARCHS[arch].config(image_channels=channels, width=width)).state_dict()
    return {"model": state, "optimizer": {}}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def refusal(read: Any, path: Path, **options: Any) -> str:
    """The message of the CheckpointError that reading must raise: one line that names the file."""
    with pytest.raises(CheckpointError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and message.endswith(".")
    return message


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
    expected = {"cifar_tiny": "cifar32", "alt_tiny": "lsun64", "celeba64_tiny": "celeba64", "hq_tiny": "celeba256"}
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
    assert load_energy(path, arch=arch).config == load_energy(path).config


def test_unknown_blocks_load_only_when_they_are_given(tmp_path: Path) -> None:
    config = EnergyConfig(16, 3, 2, parse_blocks("1-1d 1-2 2-2"))
    path = saved(tmp_path / "e", {"model": EnergyNetwork(config).state_dict()})
    message = refusal(load_energy, path)
    assert "--energy-arch" in message and all(name in message for name in ENERGY_ARCHS)
    assert "image_size" in refusal(load_energy, path, arch="1-1d 1-2 2-2")
    assert load_energy(path, arch="1-1d 1-2 2-2", image_size=16).config == config
    assert "4-4" in refusal(load_energy, path, arch="celeba256")
    assert "celeba256" in refusal(load_energy, path, arch="celeba")


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


# Bad files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"no checkpoint at all", "no checkpoint"),
        (b"\x80\x02", "cut off"),
        (pickle.dumps([1, 2], protocol=2), "cut off, damaged, or no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "nvae.pt"
    path.write_bytes(content)
    for read in (load_nvae, load_energy, describe):
        assert words in refusal(read, path)


def test_a_missing_file_and_a_folder_say_so(tmp_path: Path) -> None:
    assert "no such file" in refusal(load_nvae, tmp_path / "none.pt")
    assert "folder" in refusal(load_nvae, tmp_path)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "n", nvae_content())

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # a root user may read everything, so chmod would prove nothing
    assert "Permission denied" in refusal(load_nvae, path)


@pytest.mark.parametrize("layout", ["zip", "legacy", "ours"])
def test_a_truncated_file_is_refused_wherever_it_ends(layout: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "e", energy_content(), _use_new_zipfile_serialization=layout != "legacy")
    if layout == "ours":
        convert(path, tmp_path / "ours")
        path = tmp_path / "ours"
    whole = path.read_bytes()
    for length in (1, 7, 8, 9, 50, 300, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "cut off" in refusal(load_energy, path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("poison", "name"),
    [
        (lambda folder: Attack(folder / "evidence"), f"{os.system.__module__}.system"),
        (lambda _: np.float64(1), "multiarray.scalar"),
        (lambda _: Custom(), f"{__name__}.Custom"),
        (lambda _: SimpleNamespace(dataset="mnist"), "types.SimpleNamespace"),
    ],
)
def test_a_pickle_that_asks_for_more_is_refused_by_name(
    poison: Any, name: str, protocol: int, zipped: bool, tmp_path: Path
) -> None:
    content = {**nvae_content(), "extra": poison(tmp_path)}
    path = saved(tmp_path / "n", content, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    message = refusal(load_nvae, path)
    assert name.replace("builtins.", "") in message and "refused" in message
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_is_refused_by_name(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "n"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "evidence"), protocol=protocol))
    assert f"{os.system.__module__}.system" in refusal(load_energy, path)
    assert not (tmp_path / "evidence").exists()


def change_energy(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    state = {**content["model"], **changes}
    return {"model": {key: value for key, value in state.items() if value is not None}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linear.bias": None}, "lacks linear.bias"),
        ({"blocks.1.conv1.weight": None}, "lacks blocks.1.conv1.weight"),
        ({"conv1.weight": None}, "lacks conv1.weight"),
        ({f"extra{i}": torch.zeros(1) for i in range(5)}, "extra0, extra1, extra2 and 2 more too many"),
        ({"linear.weight": torch.zeros(1, 9)}, "linear.weight (is [1, 9], must be [1, 4])"),
        ({"linear.weight": torch.zeros(1, 4, dtype=torch.int64)}, "linear.weight (is integer [1, 4]"),
        ({"conv1.bias": torch.tensor([0.0, float("nan")])}, "conv1.bias has values"),
        ({"conv1.bias": torch.tensor([0.0, float("-inf")])}, "conv1.bias has values"),
        ({"conv1.bias": "text"}, "'conv1.bias', a str"),
    ],
)
def test_an_energy_file_that_does_not_fit_names_the_tensor(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "e", change_energy(energy_content(), **changes))
    assert words in refusal(load_energy, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_latent_per_group": 3}, "enc_sampler.0.weight (is [4, 8, 3, 3], must be [6, 8, 3, 3])"),
        ({"num_groups_per_scale": 3}, "lacks enc_tower"),
        ({"num_groups_per_scale": 1}, "too many"),
        ({"arch_instance": "res_elu"}, "lacks"),
        ({"arch_instance": "res_new"}, "'res_new' is not known"),
        ({"dataset": "toy"}, "dataset 'toy'"),
        ({"dataset": "toy_9"}, "image_size 9"),
        ({"num_nf": "two"}, "num_nf is 'two'"),
    ],
)
def test_args_that_do_not_fit_the_weights_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = {**nvae_content(), "args": argparse.Namespace(**{**ARGS, **changes})}
    assert words in refusal(load_nvae, saved(tmp_path / "n", content))


def test_missing_args_are_named(tmp_path: Path) -> None:
    kept = {key: value for key, value in ARGS.items() if key not in ("use_se", "num_nf")}
    path = saved(tmp_path / "n", {**nvae_content(), "args": argparse.Namespace(**kept)})
    assert "use_se" in (message := refusal(load_nvae, path)) and "num_nf" in message
    path = saved(tmp_path / "n", {"state_dict": {}})
    assert "args" in refusal(load_nvae, path)
    assert "neither" in refusal(load_nvae, saved(tmp_path / "n", {"weights": {}}))
    assert "holds a list" in refusal(load_nvae, saved(tmp_path / "n", [1]))


# Our layout


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small energy network in our layout."""
    path = tmp_path_factory.mktemp("ours") / "e"
    save_energy(EnergyNetwork(EnergyConfig(8, 1, 1, parse_blocks("1-1d"))), path, {"step": 7})
    return path.read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_loads(position: float, bit: int, ours: bytes, tmp_path: Path) -> None:
    damaged = bytearray(ours)
    damaged[int(position * len(ours))] ^= 1 << bit
    (tmp_path / "e").write_bytes(damaged)
    refusal(load_energy, tmp_path / "e")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_published_tensor_never_loads(index: int, bit: int, tmp_path: Path) -> None:
    content = energy_content(width=1)
    data = bytearray(saved(tmp_path / "e", content).read_bytes())
    weight = content["model"]["blocks.2.conv1.weight"].numpy().tobytes()
    data[data.index(weight) + index % len(weight)] ^= 1 << bit
    (tmp_path / "e").write_bytes(data)
    assert "checksum" in refusal(load_energy, tmp_path / "e")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 4000), from_end=st.booleans(), bit=st.integers(0, 7))
@example(offset=404, from_end=True, bit=4)  # makes a tensor a folder, which torch.load does not read
def test_a_flipped_bit_anywhere_in_a_published_file_is_refused_or_harmless(
    offset: int, from_end: bool, bit: int, tmp_path: Path
) -> None:
    content = energy_content(width=1)  # names and dates in a zip's own records have no checksum
    data = bytearray(saved(tmp_path / "e", content).read_bytes())
    data[-1 - offset if from_end else offset] ^= 1 << bit
    (tmp_path / "e").write_bytes(data)
    try:
        loaded = load_energy(tmp_path / "e")
    except CheckpointError:
        return
    assert_same_state(loaded.state_dict(), content["model"])


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


def test_weights_that_could_not_be_loaded_again_are_not_saved(tmp_path: Path) -> None:
    energy = EnergyNetwork(EnergyConfig(8, 1, 1, parse_blocks("1-1d")))
    save_energy(energy, tmp_path / "e")
    good = (tmp_path / "e").read_bytes()
    with torch.no_grad():
        energy.linear.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="linear.weight"):
        save_energy(energy, tmp_path / "e")
    assert (tmp_path / "e").read_bytes() == good


def test_foreign_and_newer_files_of_the_same_container_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    assert "did not write it" in refusal(load_nvae, tmp_path / "foreign")
    with monkeypatch.context() as later:
        later.setattr(store, "FORMAT_VERSION", store.FORMAT_VERSION + 1)
        save_training({}, tmp_path / "newer")
    assert "newer" in refusal(load_training, tmp_path / "newer")


# Atomic writes


@pytest.mark.parametrize("failing", ["os.replace", "os.fsync", "vaebm_fast.checkpoint.store.save_file"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_training({"step": 1}, tmp_path / "t")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(failing, fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        save_training({"step": 2}, tmp_path / "t")
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]
    assert load_training(tmp_path / "t") == ({"step": 1}, {})


def test_a_full_disk_is_one_sentence_and_changes_nothing(tmp_path: Path) -> None:
    save_training({"step": 1}, tmp_path / "t")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write beyond this
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save_training({"big": torch.zeros(1 << 16)}, tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == ["t"]
    assert load_training(tmp_path / "t") == ({"step": 1}, {})


def test_the_bytes_are_on_disk_before_the_name_is_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recorded(name: str, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    save_training({"step": 1}, tmp_path / "t")
    assert calls == ["fsync", "replace", "fsync"]


def test_writing_respects_links_and_the_umask_and_explains_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    umask = os.umask(0o027)
    try:
        save_training({"step": 1}, tmp_path / "latest")
    finally:
        os.umask(umask)
    assert (tmp_path / "latest").is_symlink() and load_training(tmp_path / "real")[0] == {"step": 1}
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    with pytest.raises(CheckpointError, match="none"):
        save_training({}, tmp_path / "none" / "t")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_training({}, tmp_path)


# Training state


def test_training_state_keeps_every_type_key_dtype_and_shape(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.Adamax([weight])
    weight.sum().backward()
    optimizer.step()
    base = torch.randn(6, 4)
    state = {
        "optimizer": optimizer.state_dict(),
        "a.b": {"": None, 0: True, "0": -(2**80), "list": [1, 1.5, "x", [], (), (1, (2,))], "nan_free": float("inf")},
        "tensors": [
            base.t(), base[1:3], base, base.bfloat16(), torch.tensor(3), torch.empty(0, 5), torch.tensor([True, False]),
            torch.arange(3, dtype=torch.uint8), torch.get_rng_state(), torch.tensor(float("nan")).double(),
        ],
    }  # fmt: skip
    save_training(state, tmp_path / "t")
    loaded, _ = load_training(tmp_path / "t")
    assert_equal_nested(loaded, state)
    loaded["tensors"][2].add_(1)
    assert_equal_nested(load_training(tmp_path / "t")[0], state)
    fresh = torch.optim.Adamax([torch.nn.Parameter(torch.zeros(3, 2))])
    fresh.load_state_dict(loaded["optimizer"])
    assert_equal_nested(fresh.state_dict(), optimizer.state_dict())


def assert_equal_nested(actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in actual] == [(type(key), key) for key in expected]
        for key in expected:
            assert_equal_nested(actual[key], expected[key])
    else:
        assert type(actual) is type(expected)
        if isinstance(expected, (list, tuple)):
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                assert_equal_nested(one, other)
        else:
            assert actual == expected


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
STATES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(state=STATES)
def test_any_plain_state_makes_the_round_trip_through_json(state: Any) -> None:
    tensors, structure = flatten(state)
    assert_equal_nested(unflatten(tensors, json.loads(json.dumps(structure))), state)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": [np.float64(1)]}, r"state\['a'\]\[0\] is a float64"),
        ({"a": {1.5: 0}}, "key 1.5"),
        ({"a": {True: 0}}, "key True"),
        ({"a": {1, 2}}, r"state\['a'\] is a set"),
        (Custom(), "state is a Custom"),
    ],
)
def test_state_that_would_not_come_back_the_same_is_refused(state: Any, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        flatten(state)


def test_flatten_names_tensors_by_their_subscript() -> None:
    state = {"optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    tensors, structure = flatten(state)
    assert list(tensors) == ["['optimizer']['state'][0]['step']"]
    assert_equal_nested(unflatten(tensors, structure), state)
