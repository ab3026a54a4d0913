"""Resolves --device, and keeps the caller's autocast out of computations whose bits must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from vaebm_fast.runtime.errors import UserError

DeviceName = Literal["auto", "cpu", "cuda"]


def choose_device(name: DeviceName) -> torch.device:
    """The device that --device names. Raises UserError for "cuda" if torch finds no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; run `vaebm-fast info` to see what is missing.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Inside, autocast is off for this device, and one that is switched on inside keeps no casts of weights.

    Those would outlive a change of the weights: torch drops them at the end of the outermost autocast only.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False, cache_enabled=False):
        yield
