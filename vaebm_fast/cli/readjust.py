"""`vaebm-fast readjust`: recompute an NVAE's batch normalisation for a temperature below 1."""

from __future__ import annotations

from vaebm_fast.cli._options import NVAEFile
from vaebm_fast.runtime.devices import DeviceName, choose_device
from vaebm_fast.training.readjust import load_readjusted_nvae, readjusted_path


def readjust(
    nvae: NVAEFile,
    *,
    temperature: float,
    batches: int = 500,
    device: DeviceName = "auto",
) -> None:
    """Readjust an NVAE's batch normalisation to a temperature below 1; writes a new file beside NVAE.

    Args:
        temperature: Sampling temperature: scales the prior's standard deviations.
        batches: Number of batches for the running statistics.
        device: Device; auto uses the GPU if there is one.
    """
    load_readjusted_nvae(nvae, temperature, batches=batches, device=choose_device(device), progress=True)
    print(f"Readjusted to temperature {temperature:g}: {readjusted_path(nvae, temperature)}.")
