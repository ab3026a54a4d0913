"""Our own files: they are written whole or not at all, and training states come back as they were."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.checkpoint_files import Custom, refusal
from vaebm_fast.checkpoint import (
    CheckpointError,
    flatten,
    load_nvae,
    load_training,
    save_energy,
    save_training,
    store,
    unflatten,
)
from vaebm_fast.config import EnergyConfig, parse_blocks
from vaebm_fast.models import EnergyNetwork


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
