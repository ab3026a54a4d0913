"""`vaebm-fast show`: a contact sheet of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from vaebm_fast.config import Transform
from vaebm_fast.data import open_source
from vaebm_fast.data.overview import overview
from vaebm_fast.data.prepared import is_prepared, read_manifest
from vaebm_fast.report.pictures import save_contact_sheet
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import expanded, require_writable


def show(
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")],
    *,
    out: Path = Path("sheet.png"),
    images: int = 64,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    split: Literal["train", "held_out"] = "train",
    transform: Transform | None = None,
) -> None:
    """Draw a contact sheet of a data set as training would see it, and say what it holds and what was skipped.

    Args:
        data: What `vaebm-fast prepare` made or reads, or the built-in `digits`.
        out: The PNG file to write.
        images: How many images to show, spread evenly over the set.
        size: Side of the images in pixels. Default: as prepared, or 64.
        channels: 3 for RGB, 1 for grey. Default: as prepared, or 3.
        split: Split of the data set.
        transform: How images become square, as in training; by default as fits the data.
    """
    if images < 1:
        raise UserError(f"images is {images}; it must be at least 1.")
    require_writable(out)
    root = None if data == "digits" else expanded(data)
    if root is not None and root.is_dir() and is_prepared(root):
        manifest = read_manifest(root)
        size = manifest["size"] if size is None else size
        channels = channels or manifest["channels"]
    source = open_source(
        data, image_size=64 if size is None else size, image_channels=channels or 3, split=split, transform=transform
    )
    seen = overview(source, root, images)
    save_contact_sheet(seen.images, seen.captions, seen.lines, out)
    print("\n".join([*seen.lines, f"The contact sheet is {out}."]))
