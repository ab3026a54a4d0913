"""Memory that a frozen pair reuses between steps on a CPU instead of requesting it from the system at every step."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vaebm_fast.runtime import extension

_owners: set[int] = set()


@contextmanager
def reused_memory(owner: object, device: torch.device) -> Iterator[None]:
    """Inside, CPU tensors are allocated from blocks that are kept after they are freed, until the last owner is gone.

    Tensors made inside may be used anywhere. Does nothing on other devices or without the compiled extension.
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
    """Release all memory with the last owner; blocks still in use are released when they are freed."""
    _owners.remove(owner)
    if not _owners:
        torch.ops.vaebm_fast.release_memory()
