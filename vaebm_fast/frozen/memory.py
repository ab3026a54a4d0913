"""Memory that a frozen pair uses again and again on a CPU, instead of asking the system for it at every step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vaebm_fast.runtime import extension

_owners: set[int] = set()


@contextmanager
def reused_memory(owner: object, device: torch.device) -> Iterator[None]:
    """Inside, CPU tensors come from blocks that are kept when they are freed, until the last owner is gone.

    Tensors made inside may be used anywhere. Does nothing for another device, or without the compiled part.
    """
    if device.type != "cpu" or not extension.is_available():
        yield
        return
    if id(owner) not in _owners:
        _owners.add(id(owner))
        weakref.finalize(owner, _forget, id(owner))
    torch.ops.vaebm_fast.reuse_memory(True)
    try:
        yield
    finally:
        torch.ops.vaebm_fast.reuse_memory(False)


def _forget(owner: int) -> None:
    """Give everything back with the last owner; blocks of its that are still in use follow when they are freed."""
    _owners.remove(owner)
    if not _owners:
        torch.ops.vaebm_fast.release_memory()
