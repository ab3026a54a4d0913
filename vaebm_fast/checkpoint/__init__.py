"""Checkpoints: safe reading of published NVAE and VAEBM files, and our own format, written atomically with a hash."""

from vaebm_fast.checkpoint.nested import flatten, unflatten
from vaebm_fast.checkpoint.networks import (
    content_sha256,
    convert,
    describe,
    load_energy,
    load_nvae,
    load_training,
    save_energy,
    save_nvae,
    save_training,
)
from vaebm_fast.checkpoint.store import CheckpointError

__all__ = [
    "CheckpointError",
    "content_sha256",
    "convert",
    "describe",
    "flatten",
    "load_energy",
    "load_nvae",
    "load_training",
    "save_energy",
    "save_nvae",
    "save_training",
    "unflatten",
]
