"""Chooses the loader and the cache for a source."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch

from vaebm_fast.data.loader import Loader, TorchLoader
from vaebm_fast.data.resident import ResidentLoader
from vaebm_fast.data.sources import ArraySource, ImageSource, StoredImages
from vaebm_fast.runtime.errors import UserError

LoaderName = Literal["auto", "torch", "dali"]
CacheName = Literal["auto", "none", "host", "device"]


def open_loader(
    source: ImageSource,
    batch_size: int,
    *,
    loader: LoaderName = "auto",
    cache: CacheName = "auto",
    device: torch.device | str = "cpu",
    **options: Any,
) -> Loader:
    """The training batches of a source for a network on `device`; options: those of `PlannedLoader`.

    cache: "none" decodes images on each read; "host" keeps decoded ones in memory, as many as the source's cache_bytes
    allows; "device" keeps all on the device. loader: "dali" decodes with NVIDIA DALI, which caches nothing.
    "auto": DALI if it is installed, the source holds encoded images, and they do not all fit into the host's cache;
    otherwise the torch loader with that cache. Raises UserError for a choice that cannot be had.
    """
    device = torch.device(device)
    if options.get("random_crop") and isinstance(source, ArraySource):
        warnings.warn(
            f"Images of {source.name} are square, so random crops have no effect; `prepare --format shards` keeps the "
            "long side.",
            stacklevel=2,
        )
    if cache == "device":
        if loader == "dali":
            raise UserError("Images cached on the device are decoded only once; leave --loader dali away.")
        return ResidentLoader(source, batch_size, device=device, **options)
    if loader == "dali" and cache == "host":
        raise UserError("DALI decodes images on each read and caches none; use --cache none or device.")
    channels, size, _ = source.image_shape
    is_encoded = isinstance(source, StoredImages) and source.container.is_encoded
    if loader == "auto" and cache != "host" and is_encoded and why_no_dali() is None:
        keeps = isinstance(source, StoredImages) and cache == "auto" and source.cache_bytes
        loader = "torch" if len(source) * size * size * channels <= keeps else "dali"
    if isinstance(source, StoredImages) and (cache == "none" or loader == "dali"):
        source.cache_bytes = 0
    if loader == "dali":
        reason = why_no_dali()
        if reason is not None:
            raise UserError(f"--loader dali cannot be used: {reason}.")
        from vaebm_fast.data.dali import DaliLoader

        return DaliLoader(source, batch_size, device=device, **options)
    return TorchLoader(source, batch_size, pinned=device.type == "cuda", **options)


def why_no_dali() -> str | None:
    """Why NVIDIA DALI cannot be used and how to get it, as a clause; None if it can."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:
        return (
            f"NVIDIA DALI cannot be imported ({error}); `pip install nvidia-dali-cuda130` installs it, for CUDA 12 "
            "`pip install nvidia-dali-cuda120`"
        )
    return None
