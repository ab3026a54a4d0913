"""Readjusts batch normalisation to a sampling temperature; caches the result next to the checkpoint.

Below temperature 1 the decoder's activation statistics differ from training. NVAE (arXiv:2007.03898, section 4)
therefore runs the generator in training mode at that temperature before sampling.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.checkpoint import CheckpointError, describe, load_nvae, save_nvae
from vaebm_fast.models import NVAE
from vaebm_fast.runtime.errors import NonFiniteError, UserError


@torch.no_grad()
def readjust_batch_norm(
    vae: NVAE,
    temperature: float,
    *,
    batches: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> NVAE:
    """Update the decoder's running statistics on `batches` batches drawn at `temperature`; returns the NVAE.

    Works in place with the layers' momentum and sets eval mode. Raises FloatingPointError naming statistic and batch
    if one is not finite, after restoring the former statistics. Raises ValueError unless 0 < temperature < 1; at 1 the
    training statistics are correct. progress: show a bar if stderr is a terminal.
    """
    if not 0 < temperature < 1:
        raise UserError(f"temperature is {temperature}; readjustment needs one above 0 and below 1.")
    for name, value in (("batches", batches), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    layout, device = vae.noise_layout, vae.prior_ftr0.device
    before = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    vae.train()
    try:
        for batch in tqdm(range(batches), unit="batch", disable=None if progress else True):
            seeds = seed_tensor(range(seed, seed + batch_size), device)
            noise = normal(seeds, batch, Stream.READJUST, layout.dim)
            vae.decode(layout.split(noise)[0], temperature)
            _require_finite_statistics(vae, batch, temperature)
    except FloatingPointError:
        for name, buffer in vae.named_buffers():
            buffer.copy_(before[name])
        raise
    finally:
        vae.eval()
    return vae


def _require_finite_statistics(vae: NVAE, batch: int, temperature: float) -> None:
    statistics = {name: buffer for name, buffer in vae.named_buffers() if "running_" in name}
    finite = torch.stack([torch.isfinite(buffer).all() for buffer in statistics.values()])
    if not bool(finite.all()):
        name = list(statistics)[int((~finite).nonzero()[0])]
        raise NonFiniteError(
            f"Batch {batch} of the readjustment at temperature {temperature:g} made {name} non-finite; "
            "sample at a higher temperature or at 1."
        )


def readjusted_path(path: str | Path, temperature: float) -> Path:
    """Path of the cached readjusted NVAE of a file."""
    path = Path(path)
    return path.with_name(f"{path.stem}.bn-t{temperature:g}.safetensors")


def load_readjusted_nvae(
    path: str | Path,
    temperature: float,
    *,
    batches: int = 500,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> NVAE:
    """Load the NVAE of a file, readjusted to `temperature`, in eval mode; cached per file and temperature.

    The cache is `<name>.bn-t<temperature>.safetensors` next to the file. It is reused if it was made from the same
    weights with the same number of batches. `progress` and exceptions: see `readjust_batch_norm`.
    """
    path, cache = Path(path), readjusted_path(path, temperature)
    made_from = {"source": describe(path)["content_sha256"], "temperature": temperature, "batches": batches}
    if cache.exists():
        try:
            if describe(cache)["info"] == made_from:
                return load_nvae(cache, device=device)
        except CheckpointError:
            pass  # recompute a damaged cache
    vae = readjust_batch_norm(load_nvae(path, device=device), temperature, batches=batches, progress=progress)
    save_nvae(vae, cache, made_from)
    return vae
