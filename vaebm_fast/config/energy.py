"""What shapes an energy network, and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vaebm_fast.config._fields import known_fields, require
from vaebm_fast.runtime.errors import UserError


@dataclass(frozen=True)
class EnergyBlock:
    """One residual block; channel counts in units of the network's width."""

    in_channels: int
    out_channels: int
    downsample: bool = False


@dataclass(frozen=True)
class EnergyConfig:
    """A residual energy network: `blocks` run in order after a first convolution; `width` is the channel unit."""

    image_size: int
    image_channels: int
    width: int
    blocks: tuple[EnergyBlock, ...]  # such as 1-1d 1-1 1-2d: channels in and out, d where it downsamples

    def __post_init__(self) -> None:
        require(len(self.blocks) > 0, "An energy network needs at least one block.")
        require(self.width >= 1, f"width is {self.width}; it must be at least 1.")
        require(self.image_channels >= 1, f"image_channels is {self.image_channels}; it must be at least 1.")
        expected = 1
        for index, block in enumerate(self.blocks):
            require(
                block.in_channels == expected,
                f"Block {index} takes {block.in_channels} x width channels but the layer before it gives {expected}.",
            )
            expected = block.out_channels
        shrink = 2 ** sum(block.downsample for block in self.blocks)
        require(
            self.image_size >= shrink,
            f"image_size {self.image_size} is smaller than {shrink}, the factor by which the blocks shrink it.",
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, self.image_size, self.image_size)


def parse_blocks(text: str) -> tuple[EnergyBlock, ...]:
    """Blocks from a line like `1-1d 1-1 1-2d`: in and out channels in units of the width, `d` where it downsamples."""
    blocks = []
    for word in text.replace(",", " ").split():
        numbers = word.removesuffix("d").split("-")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise UserError(f"Energy block {word!r} is not of the form IN-OUT or IN-OUTd, such as 1-2d.")
        blocks.append(EnergyBlock(int(numbers[0]), int(numbers[1]), word.endswith("d")))
    return tuple(blocks)


def format_blocks(blocks: tuple[EnergyBlock, ...]) -> str:
    """The line that `parse_blocks` reads as these blocks."""
    return " ".join(f"{block.in_channels}-{block.out_channels}{'d' * block.downsample}" for block in blocks)


@dataclass(frozen=True)
class EnergyArch:
    """A published energy network: its image side, its usual width and its blocks."""

    image_size: int
    default_width: int
    blocks: tuple[EnergyBlock, ...]

    def config(self, *, image_channels: int = 3, width: int | None = None) -> EnergyConfig:
        """The network at its own image size, `default_width` wide unless told otherwise."""
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
    """The network of that name in ENERGY_ARCHS, spelled with or without its underscore; None where there is none."""
    return {known.replace("_", ""): arch for known, arch in ENERGY_ARCHS.items()}.get(name.replace("_", ""))


def energy_from_json(values: Mapping[str, Any]) -> EnergyConfig:
    """An EnergyConfig from `to_json`'s dictionary. Raises ValueError for unknown fields or values that do not fit."""
    known = known_fields(EnergyConfig, values)
    blocks = tuple(EnergyBlock(**known_fields(EnergyBlock, block)) for block in known.pop("blocks"))
    return EnergyConfig(blocks=blocks, **known)
