"""Architecture of an NVAE: cell types and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

from vaebm_fast.config._fields import PlainFields, known_fields, require
from vaebm_fast.config.noise_layout import NoiseLayout

Likelihood = Literal["gaussian", "logistic_mixture", "bernoulli"]
ArchInstance = Literal[
    "res_elu",
    "res_bnelu",
    "res_bnswish",
    "mbconv_sep",
    "mbconv_sep11",
    "mbconv_den",
    "res_mbconv",
    "res53_mbconv",
    "res35_mbconv",
    "res55_mbconv",
    "mbconv_res",
]


@dataclass(frozen=True)
class CellPlan:
    """Operations of each cell type, one or two in sequence. Up and down cells use the same operations."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    preprocess: tuple[str, ...]
    postprocess: tuple[str, ...]


def _residual(first: str, second: str) -> CellPlan:
    return CellPlan((first, second), (first, second), (first, second), (first, second))


def _residual_encoder(first: str, second: str) -> CellPlan:
    return CellPlan((first, second), ("mconv_e6k5g0",), (first, second), ("mconv_e3k5g0",))


def _inverted(tower: str, ends: str) -> CellPlan:
    return CellPlan((tower,), (tower,), (ends,), (ends,))


CELL_PLANS: Mapping[ArchInstance, CellPlan] = MappingProxyType(
    {
        "res_elu": _residual("res_elu", "res_elu"),
        "res_bnelu": _residual("res_bnelu", "res_bnelu"),
        "res_bnswish": _residual("res_bnswish", "res_bnswish"),
        "mbconv_sep": _inverted("mconv_e6k5g0", "mconv_e3k5g0"),
        "mbconv_sep11": _inverted("mconv_e6k11g0", "mconv_e3k5g0"),
        "mbconv_den": _inverted("mconv_e6k5g0", "mconv_e3k5g8"),
        "res_mbconv": _residual_encoder("res_bnswish", "res_bnswish"),
        "res53_mbconv": _residual_encoder("res_bnswish5", "res_bnswish"),
        "res35_mbconv": _residual_encoder("res_bnswish", "res_bnswish5"),
        "res55_mbconv": _residual_encoder("res_bnswish5", "res_bnswish5"),
        "mbconv_res": CellPlan(
            ("mconv_e6k5g0",), ("res_bnswish", "res_bnswish"), ("mconv_e3k5g0",), ("res_bnswish", "res_bnswish")
        ),
    }
)


@dataclass(frozen=True)
class NVAEConfig(PlainFields):
    """Architecture of an NVAE. Sizes are in pixels; `num_groups_per_scale` applies to the highest resolution."""

    image_size: int
    image_channels: int = 3
    likelihood: Likelihood = "gaussian"
    num_mixture_dec: int = 10  # logistic_mixture only
    uncounted_border: int = 0  # bernoulli only: padding pixels per side, excluded from the loss
    num_x_bits: int = 8
    arch_instance: ArchInstance = "res_mbconv"  # the cells of all towers
    use_se: bool = True
    res_dist: bool = True
    num_latent_scales: int = 1
    num_groups_per_scale: int = 10
    num_latent_per_group: int = 20
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_channels_enc: int = 32
    num_channels_dec: int = 32
    num_preprocess_blocks: int = 1
    num_preprocess_cells: int = 2
    num_cell_per_cond_enc: int = 2
    num_postprocess_blocks: int = 1
    num_postprocess_cells: int = 2
    num_cell_per_cond_dec: int = 2
    num_nf: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.arch_instance in CELL_PLANS,
            f"arch_instance {self.arch_instance!r} is not known; it must be one of {', '.join(CELL_PLANS)}.",
        )
        require(
            self.likelihood in ("gaussian", "logistic_mixture", "bernoulli"),
            f"likelihood {self.likelihood!r} is not known; it must be gaussian, logistic_mixture or bernoulli.",
        )
        smallest = {"num_preprocess_blocks": 0, "num_postprocess_blocks": 0, "num_cell_per_cond_enc": 0,
                    "num_cell_per_cond_dec": 0, "num_nf": 0, "uncounted_border": 0}  # fmt: skip
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                least = smallest.get(entry.name, 1)
                require(
                    isinstance(value, int) and value >= least,
                    f"{entry.name} is {value!r}; it must be at least {least}.",
                )
        require(1 <= self.num_x_bits <= 8, f"num_x_bits is {self.num_x_bits}; it must be 1 to 8.")
        require(
            self.num_preprocess_blocks == self.num_postprocess_blocks,
            f"num_preprocess_blocks ({self.num_preprocess_blocks}) and num_postprocess_blocks "
            f"({self.num_postprocess_blocks}) differ; the decoder output would not have the image size.",
        )
        require(
            self.image_size % self.downsampling == 0 and self.image_size >= self.downsampling,
            f"image_size {self.image_size} is not a multiple of {self.downsampling}, the downsampling "
            f"factor of {self.num_preprocess_blocks} preprocess blocks and {self.num_latent_scales} scales.",
        )
        require(
            self.likelihood != "logistic_mixture" or self.image_channels == 3,
            f"The logistic mixture couples red, green and blue; it cannot model {self.image_channels} channels.",
        )
        require(
            2 * self.uncounted_border < self.image_size,
            f"uncounted_border {self.uncounted_border} leaves no pixel of a {self.image_size}-pixel image.",
        )
        require(
            not self.is_vanilla or self.num_channels_enc == self.num_channels_dec,
            "One scale with one group has no decoder tower, so num_channels_enc "
            f"({self.num_channels_enc}) and num_channels_dec ({self.num_channels_dec}) must be equal.",
        )

    @property
    def is_vanilla(self) -> bool:
        """True for one scale with one group: no towers and no learned prior."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1

    @property
    def downsampling(self) -> int:
        """Image side divided by the side of the top (lowest-resolution) latent group."""
        return int(2 ** (self.num_preprocess_blocks + self.num_latent_scales - 1))

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Groups per scale, highest resolution first; `ada_groups` halves them at each lower resolution."""
        counts, groups = [], self.num_groups_per_scale
        for _ in range(self.num_latent_scales):
            counts.append(groups)
            if self.ada_groups:
                groups = max(self.min_groups_per_scale, groups // 2)
        return tuple(counts)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(L, H, W) of each latent group, top of the hierarchy (lowest resolution) first."""
        shapes, side = [], self.image_size // self.downsampling
        for groups in reversed(self.groups_per_scale):
            shapes += [(self.num_latent_per_group, side, side)] * groups
            side *= 2
        return shapes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, self.image_size, self.image_size)

    @property
    def noise_layout(self) -> NoiseLayout:
        """Position of each latent group and of eps_x in the noise vector eps."""
        return NoiseLayout(self.latent_shapes, self.image_shape)

    @property
    def counted_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixels in the likelihood; Bernoulli padding is excluded."""
        border = self.uncounted_border if self.likelihood == "bernoulli" else 0
        side = self.image_size - 2 * border
        return (self.image_channels, side, side)


def nvae_from_json(values: Mapping[str, Any]) -> NVAEConfig:
    """An NVAEConfig from `to_json`'s dictionary. Raises ValueError for unknown fields or invalid values."""
    return NVAEConfig(**known_fields(NVAEConfig, values))
