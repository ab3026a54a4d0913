"""Batch normalisation readjusted to a sampling temperature, and its cache beside the checkpoint.

Below temperature 1 the decoder sees other statistics than in training; NVAE (arXiv:2007.03898, section 4) therefore
runs the generator in training mode at that temperature before it samples.
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
    """Update the decoder's running statistics on `batches` batches drawn at `temperature`; the NVAE, in eval mode.

    In place, with the layers' own momentum. Raises FloatingPointError naming the statistic and the batch when one
    is not finite; the NVAE then has its former statistics back. Raises ValueError for a temperature that is not between
    0 and 1: at 1 the statistics are those of training. progress: a bar, where stderr is a terminal.
    """
    if not 0 < temperature < 1:
        raise UserError(f"temperature is {temperature}; batch normalisation is readjusted to one above 0 and below 1.")
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
            "sample at temperature 1, or at a higher one than this."
        )


def readjusted_path(path: str | Path, temperature: float) -> Path:
    """Where the readjusted NVAE of a file is kept."""
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
    """The NVAE of a file, readjusted to `temperature`, in eval mode; the work is done once per file and temperature.

    The result is kept beside the file as `<name>.bn-t<temperature>.safetensors` and used again as long as it was made
    from the same weights with the same number of batches. `progress` and what is raised are `readjust_batch_norm`'s.
    """
    path, cache = Path(path), readjusted_path(path, temperature)
    made_from = {"source": describe(path)["content_sha256"], "temperature": temperature, "batches": batches}
    if cache.exists():
        try:
            if describe(cache)["info"] == made_from:
                return load_nvae(cache, device=device)
        except CheckpointError:
            pass  # a damaged cache is made again
    vae = readjust_batch_norm(load_nvae(path, device=device), temperature, batches=batches, progress=progress)
    save_nvae(vae, cache, made_from)
    return vae
