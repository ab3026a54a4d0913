"""Network files: load published files and ours; save ours; describe; convert.

Files are fully read and checked (keys, shapes, finite values) before the network is built, so loading is never partial.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaebm_fast.checkpoint import official, store
from vaebm_fast.checkpoint.nested import flatten, unflatten
from vaebm_fast.checkpoint.store import CheckpointError, Kind, Layout
from vaebm_fast.config import (
    ENERGY_ARCHS,
    EnergyConfig,
    NVAEConfig,
    energy_from_json,
    format_blocks,
    nvae_from_json,
    to_json,
)
from vaebm_fast.models import NVAE, EnergyNetwork
from vaebm_fast.models.building import building, skeleton
from vaebm_fast.runtime.files import file_sha256, require_writable

_CALLED: Mapping[Kind, str] = {"nvae": "an NVAE", "energy": "an energy network", "training": "a training state"}


@dataclass(frozen=True)
class NetworkFile:
    """Validated content of a network file, on the CPU, before a module is built."""

    layout: Layout
    config: NVAEConfig | EnergyConfig
    state: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """ "nvae" or "energy"."""
        return "nvae" if isinstance(self.config, NVAEConfig) else "energy"


def load_nvae(path: str | Path, *, device: str | torch.device = "cpu") -> NVAE:
    """Load the NVAE of a published file or of ours, in eval mode. Raises CheckpointError if the file is invalid."""
    file = _read(Path(path), "nvae")
    assert isinstance(file.config, NVAEConfig)
    with building():
        vae = NVAE(file.config)
    vae.load_state_dict(file.state)
    return vae.to(device).eval()


def load_energy(
    path: str | Path, *, arch: str | None = None, image_size: int | None = None, device: str | torch.device = "cpu"
) -> EnergyNetwork:
    """Load the energy network of a published file or of ours, in eval mode. Raises CheckpointError if it is invalid.

    The architecture of a published file is inferred from its keys; `arch` overrides it with a name of ENERGY_ARCHS or
    blocks such as "1-1d 1-2", and `image_size` overrides the side in pixels that the name implies.
    """
    file = _read(Path(path), "energy", arch, image_size)
    assert isinstance(file.config, EnergyConfig)
    with building():
        energy = EnergyNetwork(file.config)
    energy.load_state_dict(file.state)
    return energy.to(device).eval()


def save_nvae(vae: NVAE, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
    """Write an NVAE and JSON values `info` in our layout. Also raises CheckpointError for non-finite weights."""
    _save(Path(path), vae.config, vae.state_dict(), info)


def save_energy(energy: EnergyNetwork, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
    """Write an energy network in our layout; `info` as in `save_nvae`."""
    _save(Path(path), energy.config, energy.state_dict(), info)


def save_training(state: Any, path: str | Path, info: Mapping[str, Any] | None = None) -> None:
    """Write nested training state (see `flatten`) in our layout; `info` as in `save_nvae`."""
    tensors, structure = flatten(state)
    store.save(path, tensors, {"kind": "training", "structure": structure, "info": dict(info or {})})


def load_training(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """(state, info) as passed to `save_training`, with tensors on the CPU."""
    tensors, meta = store.load(path)
    with store.naming(Path(path)):
        _require_kind(meta["kind"], "training")
    return unflatten(tensors, meta["structure"]), meta["info"]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    arch: str | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the network of `source`, in either layout, to `destination` in ours; options as in `load_energy`.

    Raises CheckpointError if `destination` exists without `overwrite`, and always if both are the same file.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise CheckpointError(f"{destination}: source and destination are the same file; name another destination.")
    with store.naming(destination):
        require_writable(destination)
    if destination.exists() and not overwrite:
        raise CheckpointError(
            f"{destination}: exists already; name another destination, or allow overwriting (--overwrite)."
        )
    file = _read(source, None, arch, image_size)
    info = {**file.info, "source_sha256": file_sha256(source)}
    _save(destination, file.config, file.state, info)


def describe(path: str | Path, *, arch: str | None = None, image_size: int | None = None) -> dict[str, Any]:
    """Content of a checkpoint as JSON values, in print order; reads and checks the whole file.

    `noise_dimensions` counts latents, plus pixels if they are Gaussian. `content_sha256` depends only on configuration
    and weights, so conversion preserves it; `file_sha256` hashes the bytes of the file.
    """
    path = Path(path)
    if store.layout(path) == "published":
        file = _from_published(path, None, arch, image_size)
    else:
        tensors, meta = store.load(path)
        if meta["kind"] == "training":
            return {**_training_facts(tensors), "info": meta["info"], "file_sha256": file_sha256(path)}
        file = _from_ours(path, tensors, meta, None, arch, image_size)
    config = file.config
    return {
        "kind": file.kind,
        "layout": file.layout,
        **(_nvae_facts(config) if isinstance(config, NVAEConfig) else _energy_facts(config)),
        "parameters": sum(parameter.numel() for parameter in skeleton(config).parameters()),
        "info": file.info,
        "file_sha256": file_sha256(path),
        "content_sha256": _content_sha256(config, file.state),
    }


def content_sha256(network: NVAE | EnergyNetwork) -> str:
    """SHA-256 of a network's configuration and weights; equals `describe`'s for its file."""
    return _content_sha256(network.config, network.state_dict())


def _content_sha256(config: NVAEConfig | EnergyConfig, state: Mapping[str, Tensor]) -> str:
    return store.digest(state, json.dumps(to_json(config), sort_keys=True))


def _training_facts(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    elements = sum(tensor.numel() for tensor in tensors.values())
    return {"kind": "training", "layout": "vaebm-fast", "tensors": len(tensors), "elements": elements}


def _nvae_facts(config: NVAEConfig) -> dict[str, Any]:
    latents = sum(map(prod, config.latent_shapes))
    pixels = prod(config.image_shape) if config.likelihood == "gaussian" else 0
    return {
        "architecture": config.arch_instance,
        "likelihood": config.likelihood,
        "image_shape": list(config.image_shape),
        "latent_shapes": [list(shape) for shape in config.latent_shapes],
        "latent_dimensions": latents,
        "noise_dimensions": latents + pixels,
    }


def _energy_facts(config: EnergyConfig) -> dict[str, Any]:
    names = [name for name, arch in ENERGY_ARCHS.items() if arch.blocks == config.blocks]
    return {
        "architecture": names[0] if names else format_blocks(config.blocks),
        "width": config.width,
        "image_shape": list(config.image_shape),
    }


def _read(path: Path, kind: Kind | None, arch: str | None = None, image_size: int | None = None) -> NetworkFile:
    """Validated content of a network file; raises CheckpointError if it is not of `kind`, unless that is None."""
    if store.layout(path) == "published":
        return _from_published(path, kind, arch, image_size)
    return _from_ours(path, *store.load(path), kind, arch, image_size)


def _from_published(path: Path, kind: Kind | None, arch: str | None, image_size: int | None) -> NetworkFile:
    with store.naming(path):
        content = official.unpickle(path)
        found = official.kind(content)
        _require_kind(found, kind)
        config: NVAEConfig | EnergyConfig
        if found == "nvae":
            config, state, info = official.read_nvae(content)
        else:
            config, state, info = official.read_energy(content, arch, image_size)
        _check(config, state)
    return NetworkFile("published", config, state, info)


def _from_ours(
    path: Path,
    state: dict[str, Tensor],
    meta: Mapping[str, Any],
    kind: Kind | None,
    arch: str | None,
    image_size: int | None,
) -> NetworkFile:
    with store.naming(path):
        if meta["kind"] == "training":
            raise CheckpointError(
                f"this file holds {_CALLED['training']}, not {_CALLED[kind] if kind else 'a network'}; networks are in "
                "nvae.safetensors and energy.safetensors, which training writes to the same folder."
            )
        _require_kind(meta["kind"], kind)
        config: NVAEConfig | EnergyConfig
        if meta["kind"] == "nvae":
            config = nvae_from_json(meta["config"])
        else:
            config = energy_from_json(meta["config"])
            if arch is not None and official.energy_blocks(arch) != config.blocks:
                raise CheckpointError(f"the energy network in this file is not {arch}; omit the architecture.")
            if image_size not in (None, config.image_size):
                raise CheckpointError(f"its energy network takes {config.image_size}-pixel images, not {image_size}.")
        _check(config, state)
    return NetworkFile("vaebm-fast", config, state, meta["info"])


def _save(
    path: Path, config: NVAEConfig | EnergyConfig, state: dict[str, Tensor], info: Mapping[str, Any] | None
) -> None:
    with store.naming(path):
        _require_finite(state)
    kind: Kind = "nvae" if isinstance(config, NVAEConfig) else "energy"
    store.save(path, state, {"kind": kind, "config": to_json(config), "info": dict(info or {})})


def _require_kind(found: Kind, wanted: Kind | None) -> None:
    if wanted is not None and found != wanted:
        raise CheckpointError(f"this file holds {_CALLED[found]}, not {_CALLED[wanted]}.")


def _check(config: NVAEConfig | EnergyConfig, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `state` has the network's keys and shapes, and finite values."""
    expected = _forms(config)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        parts = [f"missing {_few(missing)}"] * bool(missing) + [f"unexpected {_few(unexpected)}"] * bool(unexpected)
        raise CheckpointError(f"its weights do not match the network it describes: {'; '.join(parts)}.")
    misfits = [
        f"{key} (is {_form(state[key])}, must be {form})" for key, form in expected.items() if _form(state[key]) != form
    ]
    if misfits:
        raise CheckpointError(f"its weights do not match the network it describes: {_few(misfits)}.")
    _require_finite(state)


@cache
def _forms(config: NVAEConfig | EnergyConfig) -> dict[str, str]:
    """Expected kind and shape of each tensor; cached, because building a skeleton takes longer than reading a file."""
    return {key: _form(value) for key, value in skeleton(config).state_dict().items()}


def _form(tensor: Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else 'integer '}{list(tensor.shape)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_finite(state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        # aminmax propagates NaN and needs no temporary: many times faster than isfinite(tensor).all()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{name} has infinite or NaN values; use an earlier checkpoint.")
