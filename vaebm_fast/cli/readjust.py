"""`vaebm-fast readjust`: an NVAE's batch normalisation for a sampling temperature below 1."""

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
    """Readjust an NVAE's batch normalisation to a sampling temperature below 1; the result is kept beside the file.

    Args:
        temperature: Of the prior's standard deviations.
        batches: Batches that the running statistics are made from.
        device: Where to compute; auto is the GPU where there is one.
    """
    load_readjusted_nvae(nvae, temperature, batches=batches, device=choose_device(device), progress=True)
    print(f"Readjusted to temperature {temperature:g}: {readjusted_path(nvae, temperature)}.")
