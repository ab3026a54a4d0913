"""The options of `prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vaebm_fast.config import Transform
from vaebm_fast.data.prepared import Format
from vaebm_fast.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a data set is prepared.

    size: side of the square images, in pixels. channels: 3 (RGB) or 1 (grey). transform: see `images.transformed`;
    default: as fits the source. held_out: share of the images to hold out, for a source without a published split.
    format: one array of square images, cropped at the centre, or webdataset shards of images with the shorter side
    `size`, not cropped, for random crops. on_bad: end with an error at the first damaged image, or leave it out.
    """

    size: int
    channels: int = 3
    transform: Transform | None = None
    held_out: float = 0.0
    format: Format = "array"
    on_bad: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it is the share of held-out images, from 0 to below 1.")
