"""Architecture of energy networks, and the table of published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vaebm_fast.config._fields import PlainFields, known_fields, require
from vaebm_fast.runtime.errors import UserError


@dataclass(frozen=True)
class EnergyBlock(PlainFields):
    """One residual block; channel counts are multiples of the network's width."""

    in_channels: int
    out_channels: int
    downsample: bool = False


@dataclass(frozen=True)
class EnergyConfig(PlainFields):
    """A residual energy network: a first convolution, then `blocks` in order; `width` is the channel unit."""

    image_size: int
    image_channels: int
    width: int
    blocks: tuple[EnergyBlock, ...]  # e.g. 1-1d 1-1 1-2d: channels in and out; d: downsamples

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.blocks) > 0, "An energy network needs at least one block.")
        require(self.width >= 1, f"width is {self.width}; it must be at least 1.")
        require(self.image_channels >= 1, f"image_channels is {self.image_channels}; it must be at least 1.")
        expected = 1
        for index, block in enumerate(self.blocks):
            require(
                block.in_channels == expected,
                f"Block {index} takes {block.in_channels} x width channels but the previous layer outputs {expected}.",
            )
            expected = block.out_channels
        shrink = 2 ** sum(block.downsample for block in self.blocks)
        require(
            self.image_size >= shrink,
            f"image_size {self.image_size} is smaller than {shrink}, the downsampling factor of its blocks.",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, self.image_size, self.image_size)


def parse_blocks(text: str) -> tuple[EnergyBlock, ...]:
    """Parse `1-1d 1-1 1-2d`: input and output channels in units of the width; `d` marks downsampling."""
    blocks = []
    for word in text.replace(",", " ").split():
        numbers = word.removesuffix("d").split("-")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise UserError(f"Energy block {word!r} is not of the form IN-OUT or IN-OUTd, such as 1-2d.")
        blocks.append(EnergyBlock(int(numbers[0]), int(numbers[1]), word.endswith("d")))
    return tuple(blocks)


def format_blocks(blocks: tuple[EnergyBlock, ...]) -> str:
    """The inverse of `parse_blocks`."""
    return " ".join(f"{block.in_channels}-{block.out_channels}{'d' * block.downsample}" for block in blocks)


@dataclass(frozen=True)
class EnergyArch:
    """A published energy network: image side in pixels, default width and blocks."""

    image_size: int
    default_width: int
    blocks: tuple[EnergyBlock, ...]

    def config(self, *, image_channels: int = 3, width: int | None = None) -> EnergyConfig:
        """The configuration at this image size; `width` defaults to `default_width`."""
        return EnergyConfig(self.image_size, image_channels, width or self.default_width, self.blocks)


ENERGY_ARCHS: Mapping[str, EnergyArch] = MappingProxyType(
    {
        "mnist": EnergyArch(32, 64, parse_blocks("1-1d 1-1 1-2d 2-2")),
        "cifar_32": EnergyArch(32, 128, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-2")),
        "celeba_64": EnergyArch(64, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-4 4-4d 4-4")),
        "lsun_64": EnergyArch(64, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2 2-2d 2-4 4-4 4-4d 4-4")),
        "celeba_256": EnergyArch(256, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-2 2-4d 4-4 4-4d 4-4 4-8d 8-8")),
    }
)


def find_energy_arch(name: str) -> EnergyArch | None:
    """The entry of ENERGY_ARCHS with this name, underscores optional; None if there is none."""
    return {known.replace("_", ""): arch for known, arch in ENERGY_ARCHS.items()}.get(name.replace("_", ""))


def energy_from_json(values: Mapping[str, Any]) -> EnergyConfig:
    """An EnergyConfig from `to_json`'s dictionary. Raises ValueError for unknown fields or invalid values."""
    known = known_fields(EnergyConfig, values)
    blocks = tuple(EnergyBlock(**known_fields(EnergyBlock, block)) for block in known.pop("blocks"))
    return EnergyConfig(blocks=blocks, **known)
