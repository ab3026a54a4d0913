"""`vaebm-fast convert`: convert a checkpoint to this project's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from vaebm_fast import checkpoint
from vaebm_fast.cli._options import EnergyArch, ImageSize, Switch


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    *,
    energy_arch: EnergyArch = None,
    image_size: ImageSize = None,
    overwrite: Switch = False,
) -> None:
    """Write the network in SOURCE to DESTINATION in this project's format.

    Args:
        source: The file to read, published or ours.
        destination: The file to write, usually named .safetensors.
        overwrite: Replace DESTINATION if it exists.
    """
    checkpoint.convert(source, destination, arch=energy_arch, image_size=image_size, overwrite=overwrite)
    print(f"Wrote {destination}.")
