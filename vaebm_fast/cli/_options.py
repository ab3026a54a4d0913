"""Options shared by several commands, and their aligned output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vaebm_fast.runtime.files import expanded

registry = ConstructorRegistry()

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


@registry.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    """A path, with `~` expanded."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: expanded(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def aligned(rows: Mapping[str, Any]) -> str:
    """One line per row, the values in one column."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())
