"""Readjusts batch normalisation to a sampling temperature; caches the result next to the checkpoint.

Below temperature 1 the decoder's activation statistics differ from training. NVAE (arXiv:2007.03898, section 4)
therefore runs the generator in training mode at that temperature before sampling.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from tqdm import tqdm

from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.checkpoint import CheckpointError, describe, load_nvae, save_nvae
from vaebm_fast.config import whole_number
from vaebm_fast.models import NVAE
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.runtime.errors import NonFiniteError, UserError
from vaebm_fast.runtime.files import require_writable


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
    temperature, seed = float(temperature), whole_number("seed", seed)
    batches, batch_size = whole_number("batches", batches), whole_number("batch_size", batch_size)
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
            with without_autocast(device):
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
    """Default path of the readjusted NVAE of a file."""
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

    The cache is `readjusted_path`, next to the file. It is reused if it was made from the same weights with the same
    number of batches. If it cannot be written, warns and returns the network all the same. `progress` and exceptions:
    see `readjust_batch_norm`.
    """
    job = _Readjustment(Path(path), float(temperature), whole_number("batches", batches))
    cache = readjusted_path(path, job.temperature)
    vae = job.read(cache, device)
    if vae is None:
        vae = job.run(device, progress)
        try:
            save_nvae(vae, cache, job.info)
        except CheckpointError as error:
            warnings.warn(f"The readjusted NVAE is not kept for later: {error}", stacklevel=2)
    return vae


def readjust_file(
    path: str | Path,
    out: str | Path,
    temperature: float,
    *,
    batches: int = 500,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> None:
    """Write the NVAE of a file, readjusted to `temperature`, to `out`, unless it is there.

    Before any work, raises OSError if `out` cannot be written, and UserError if it is the file itself, or exists
    without `overwrite` and is not `readjusted_path`. Other arguments as in `load_readjusted_nvae`.
    """
    path, out = Path(path), Path(out)
    job = _Readjustment(path, float(temperature), whole_number("batches", batches))
    if job.read(out, device) is None:
        if out.exists() and out.samefile(path):
            raise UserError(f"{out} is the NVAE to readjust; name another file for the result.")
        require_writable(out)
        is_cache = out.resolve() == readjusted_path(path, job.temperature).resolve()
        if out.exists() and not overwrite and not is_cache:
            raise UserError(f"{out} exists already; name another file, or allow overwriting (--overwrite).")
        save_nvae(job.run(device, progress), out, job.info)


class _Readjustment:
    """The readjustment of a file's NVAE; `info` identifies its result."""

    def __init__(self, path: Path, temperature: float, batches: int) -> None:
        self.path, self.temperature, self.batches = path, temperature, batches
        facts = describe(path)
        if facts["kind"] != "nvae":
            load_nvae(path)  # raises
        self.info = {"source": facts["content_sha256"], "temperature": temperature, "batches": batches}

    def read(self, file: Path, device: str | torch.device) -> NVAE | None:
        """The network in `file` if it is the result."""
        try:
            return load_nvae(file, device=device) if describe(file)["info"] == self.info else None
        except CheckpointError:
            return None  # missing or damaged

    def run(self, device: str | torch.device, progress: bool) -> NVAE:
        """The result, computed."""
        vae = load_nvae(self.path, device=device)
        return readjust_batch_norm(vae, self.temperature, batches=self.batches, progress=progress)
