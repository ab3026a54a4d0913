"""The meaning of --device."""

from __future__ import annotations

from typing import Literal

import torch

from vaebm_fast.runtime.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """The device that --device names. Raises ValueError where it names a GPU and torch finds none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; `vaebm-fast info` says what is missing.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
