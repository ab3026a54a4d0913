"""Files that checkpoints are read from: published ones of fresh small networks, and what a bad one must raise."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from vaebm_fast.checkpoint import CheckpointError, official
from vaebm_fast.config import ENERGY_ARCHS
from vaebm_fast.models import NVAE, EnergyNetwork

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
