"""Invalid, damaged or mismatched files: each raises one sentence that names the fault."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoint_files import (
    ARGS,
    Attack,
    Custom,
    assert_same_state,
    energy_content,
    nvae_content,
    refusal,
    saved,
)
from vaebm_fast.checkpoint import CheckpointError, convert, describe, load_energy, load_nvae, save_energy
from vaebm_fast.config import EnergyConfig, parse_blocks
from vaebm_fast.models import EnergyNetwork

# Bad files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"no checkpoint at all", "not a checkpoint"),
        (b"\x80\x02", "truncated"),
        (pickle.dumps([1, 2], protocol=2), "truncated, damaged, or not a checkpoint"),
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

    monkeypatch.setattr(Path, "open", denied)  # root can read any file, so chmod would not test this
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
        assert "truncated" in refusal(load_energy, path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("poison", "name"),
    [
        (lambda folder: Attack(folder / "evidence"), f"{os.system.__module__}.system"),
        (lambda _: np.float64(1), "multiarray.scalar"),
        (lambda _: Custom(), f"{Custom.__module__}.Custom"),
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
        ({"linear.bias": None}, "missing linear.bias"),
        ({"blocks.1.conv1.weight": None}, "lacks blocks.1.conv1.weight"),
        ({"conv1.weight": None}, "lacks conv1.weight"),
        ({f"extra{i}": torch.zeros(1) for i in range(5)}, "unexpected extra0, extra1, extra2 and 2 more"),
        ({"linear.weight": torch.zeros(1, 9)}, "linear.weight (is [1, 9], must be [1, 4])"),
        ({"linear.weight": torch.zeros(1, 4, dtype=torch.int64)}, "linear.weight (is integer [1, 4]"),
        ({"conv1.bias": torch.tensor([0.0, float("nan")])}, "conv1.bias has infinite or NaN values"),
        ({"conv1.bias": torch.tensor([0.0, float("-inf")])}, "conv1.bias has infinite or NaN values"),
        ({"conv1.bias": "text"}, "'conv1.bias' is a str"),
    ],
)
def test_an_energy_file_that_does_not_fit_names_the_tensor(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "e", change_energy(energy_content(), **changes))
    assert words in refusal(load_energy, path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_latent_per_group": 3}, "enc_sampler.0.weight (is [4, 8, 3, 3], must be [6, 8, 3, 3])"),
        ({"num_groups_per_scale": 3}, "missing enc_tower"),
        ({"num_groups_per_scale": 1}, "unexpected"),
        ({"arch_instance": "res_elu"}, "missing"),
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
    assert "contains a list" in refusal(load_nvae, saved(tmp_path / "n", [1]))


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
@example(offset=404, from_end=True, bit=4)  # marks a tensor as a folder, which torch.load does not read
def test_a_flipped_bit_anywhere_in_a_published_file_is_refused_or_harmless(
    offset: int, from_end: bool, bit: int, tmp_path: Path
) -> None:
    content = energy_content(width=1)  # a zip has no checksum for names and dates in its records
    data = bytearray(saved(tmp_path / "e", content).read_bytes())
    data[-1 - offset if from_end else offset] ^= 1 << bit
    (tmp_path / "e").write_bytes(data)
    try:
        loaded = load_energy(tmp_path / "e")
    except CheckpointError:
        return
    assert_same_state(loaded.state_dict(), content["model"])


# Other pickle protocols, which torch's safe loading cannot read.
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_a_newer_pickle_protocol_says_what_to_save_again_and_accuses_nobody(
    protocol: int, zipped: bool, tmp_path: Path
) -> None:
    path = tmp_path / "n.pt"
    for content, read in ((nvae_content(), load_nvae), (energy_content(), load_energy)):
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        sentence = refusal(read, path)
        named = "0 or 1" if protocol < 2 else protocol
        assert f"its pickle has protocol {named}, which safe loading does not read" in sentence
        assert "pickle_protocol=2" in sentence and "imports" not in sentence


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(6))
def test_an_attack_is_named_in_every_protocol(protocol: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "n.pt"
    content = {**nvae_content(), "extra": Attack(tmp_path / "evidence")}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert "refused, because its pickle imports " in refusal(load_nvae, path)
    assert "LongStorage" not in refusal(load_nvae, path) and not (tmp_path / "evidence").exists()


def test_noise_that_begins_like_a_pickle_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "n.pt"
    path.write_bytes(b"\x80\xc8" + bytes(range(200)))
    assert "truncated, damaged, or not a checkpoint" in refusal(load_nvae, path)


def test_a_folder_as_destination_is_not_told_to_be_overwritten(tmp_path: Path) -> None:
    source = saved(tmp_path / "n.pt", nvae_content())
    assert "Is a directory" in refusal(lambda _: convert(source, tmp_path), tmp_path)


def test_a_conversion_that_could_not_be_written_does_not_read_its_source(tmp_path: Path) -> None:
    assert f"{tmp_path}/no/out: No such file or directory" in refusal(
        lambda _: convert(tmp_path / "missing.pt", tmp_path / "no" / "out"), tmp_path
    )
