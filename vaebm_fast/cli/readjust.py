"""`vaebm-fast readjust`: recompute an NVAE's batch normalisation for a temperature below 1."""

from __future__ import annotations

from pathlib import Path

from vaebm_fast.cli._options import NVAEFile, Switch
from vaebm_fast.runtime.devices import DeviceName, choose_device
from vaebm_fast.training.readjust import readjust_file, readjusted_path


def readjust(
    nvae: NVAEFile,
    *,
    temperature: float,
    out: Path | None = None,
    batches: int = 500,
    overwrite: Switch = False,
    device: DeviceName = "auto",
) -> None:
    """Readjust an NVAE's batch normalisation to a temperature below 1; writes a new file.

    Args:
        temperature: Sampling temperature: scales the prior's standard deviations.
        out: File to write; by default NAME.bn-tTEMPERATURE.safetensors beside NVAE.
        batches: Number of batches for the running statistics.
        overwrite: Replace OUT if it exists.
        device: Device; auto uses the GPU if there is one.
    """
    written = readjusted_path(nvae, temperature) if out is None else out
    readjust_file(
        nvae,
        written,
        temperature,
        batches=batches,
        overwrite=overwrite,
        device=choose_device(device),
        progress=True,
    )
    print(f"Readjusted to temperature {temperature:g}: {written}.")
