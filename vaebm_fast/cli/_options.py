"""Options shared by several commands, and their aligned output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

Switch = tyro.conf.FlagCreatePairsOff[bool]
EnergyArch = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="NAME|BLOCKS",
        help="The energy network of a published file: a name such as celeba_64, or blocks such as '1-1d 1-2'. "
        "By default detected from the weights.",
    ),
]
ImageSize = Annotated[
    int | None, tyro.conf.arg(metavar="N", help="Image size in pixels (side) of a published energy network.")
]
NVAEFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NVAE", help="An NVAE, published or ours.")]


def aligned(rows: Mapping[str, Any]) -> str:
    """One line per row, the values in one column."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
