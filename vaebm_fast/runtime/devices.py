"""Resolves --device."""

from __future__ import annotations

from typing import Literal

import torch

from vaebm_fast.runtime.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """The device that --device names. Raises UserError for "cuda" if torch finds no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; run `vaebm-fast info` to see what is missing.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
