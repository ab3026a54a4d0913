"""What a model, a training run and a preset are, as frozen dataclasses; `PRESETS` is the one table of named settings.

Field names follow the arguments stored in published NVAE checkpoints where such an argument exists, so that what a
user knows from there (`num_latent_scales`, `num_groups_per_scale`, ...) means the same here. This module owns names,
defaults and their validation; it knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

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
Potential = Literal["energy", "paper", "official"]
POTENTIALS: tuple[Potential, ...] = ("energy", "paper", "official")
ReplayDtype = Literal["float32", "bfloat16"]
Placement = Literal["device", "host"]


@dataclass(frozen=True)
class CellPlan:
    """The primitives of each kind of cell: one operation, or two in a row. Up and down cells use the same ones."""

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


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _require_positive(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value > 0, f"{name} is {value}; it must be above 0.")


def _require_not_negative(settings: object, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        _require(value >= 0, f"{name} is {value}; it must not be negative.")


@dataclass(frozen=True)
class NVAEConfig:
    """Everything that shapes an NVAE. Sides in pixels; `num_groups_per_scale` counts at the highest resolution."""

    image_size: int
    image_channels: int = 3
    likelihood: Likelihood = "gaussian"
    num_mixture_dec: int = 10  # logistic_mixture only
    uncounted_border: int = 0  # bernoulli only: padding pixels on each side that the loss leaves out
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
        _require(
            self.arch_instance in CELL_PLANS,
            f"arch_instance {self.arch_instance!r} is not known; it is one of {', '.join(CELL_PLANS)}.",
        )
        _require(
            self.likelihood in ("gaussian", "logistic_mixture", "bernoulli"),
            f"likelihood {self.likelihood!r} is not known; it is gaussian, logistic_mixture or bernoulli.",
        )
        smallest = {"num_preprocess_blocks": 0, "num_postprocess_blocks": 0, "num_cell_per_cond_enc": 0,
                    "num_cell_per_cond_dec": 0, "num_nf": 0, "uncounted_border": 0}  # fmt: skip
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                least = smallest.get(entry.name, 1)
                _require(
                    isinstance(value, int) and value >= least,
                    f"{entry.name} is {value!r}; it must be at least {least}.",
                )
        _require(1 <= self.num_x_bits <= 8, f"num_x_bits is {self.num_x_bits}; images are read with 1 to 8 bits.")
        _require(
            self.num_preprocess_blocks == self.num_postprocess_blocks,
            f"num_preprocess_blocks ({self.num_preprocess_blocks}) and num_postprocess_blocks "
            f"({self.num_postprocess_blocks}) differ, so the decoder would not give back the image size.",
        )
        _require(
            self.image_size % self.downsampling == 0 and self.image_size >= self.downsampling,
            f"image_size {self.image_size} is not a multiple of {self.downsampling}, the factor by which "
            f"{self.num_preprocess_blocks} preprocess blocks and {self.num_latent_scales} scales shrink it.",
        )
        _require(
            self.likelihood != "logistic_mixture" or self.image_channels == 3,
            f"The logistic mixture couples red, green and blue; it cannot model {self.image_channels} channels.",
        )
        _require(
            2 * self.uncounted_border < self.image_size,
            f"uncounted_border {self.uncounted_border} leaves no pixel of a {self.image_size}-pixel image.",
        )
        _require(
            not self.is_vanilla or self.num_channels_enc == self.num_channels_dec,
            "One scale with one group has no decoder tower, so num_channels_enc "
            f"({self.num_channels_enc}) and num_channels_dec ({self.num_channels_dec}) must be equal.",
        )

    @property
    def is_vanilla(self) -> bool:
        """One scale with one group: no towers and no learnt prior."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1

    @property
    def downsampling(self) -> int:
        """Image side over the side of the top (lowest-resolution) latent group."""
        return int(2 ** (self.num_preprocess_blocks + self.num_latent_scales - 1))

    @property
    def groups_per_scale(self) -> tuple[int, ...]:
        """Groups at each scale, highest resolution first; `ada_groups` halves them scale by scale."""
        counts, groups = [], self.num_groups_per_scale
        for _ in range(self.num_latent_scales):
            counts.append(groups)
            if self.ada_groups:
                groups = max(self.min_groups_per_scale, groups // 2)
        return tuple(counts)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """[(L, H, W), ...] of every latent group, top of the hierarchy (lowest resolution) first."""
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
    def counted_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the pixels that the likelihood is of: all but a Bernoulli's padding."""
        border = self.uncounted_border if self.likelihood == "bernoulli" else 0
        side = self.image_size - 2 * border
        return (self.image_channels, side, side)


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
        _require(len(self.blocks) > 0, "An energy network needs at least one block.")
        _require(self.width >= 1, f"width is {self.width}; it must be at least 1.")
        _require(self.image_channels >= 1, f"image_channels is {self.image_channels}; it must be at least 1.")
        expected = 1
        for index, block in enumerate(self.blocks):
            _require(
                block.in_channels == expected,
                f"Block {index} takes {block.in_channels} x width channels but the layer before it gives {expected}.",
            )
            expected = block.out_channels
        shrink = 2 ** sum(block.downsample for block in self.blocks)
        _require(
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
            raise ValueError(f"Energy block {word!r} is not of the form IN-OUT or IN-OUTd, such as 1-2d.")
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
        "cifar32": EnergyArch(32, 128, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-2")),
        "celeba64": EnergyArch(64, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-4 4-4d 4-4")),
        "lsun64": EnergyArch(64, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2 2-2d 2-4 4-4 4-4d 4-4")),
        "celeba256": EnergyArch(256, 64, parse_blocks("1-1d 1-1 1-2d 2-2 2-2d 2-2 2-4d 4-4 4-4d 4-4 4-8d 8-8")),
    }
)


def to_json(config: NVAEConfig | EnergyConfig) -> dict[str, Any]:
    """The configuration as plain JSON values; `nvae_from_json` and `energy_from_json` are its inverses."""
    return asdict(config)


def nvae_from_json(values: Mapping[str, Any]) -> NVAEConfig:
    """An NVAEConfig from `to_json`'s dictionary. Raises ValueError for unknown fields or values that do not fit."""
    return NVAEConfig(**_known_fields(NVAEConfig, values))


def energy_from_json(values: Mapping[str, Any]) -> EnergyConfig:
    """An EnergyConfig from `to_json`'s dictionary. Raises ValueError for unknown fields or values that do not fit."""
    known = _known_fields(EnergyConfig, values)
    blocks = tuple(EnergyBlock(**_known_fields(EnergyBlock, block)) for block in known.pop("blocks"))
    return EnergyConfig(blocks=blocks, **known)


def _known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(set(values) - names)
    _require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; was this written by a newer version?")
    return dict(values)


@dataclass(frozen=True)
class VAETraining:
    """Stage 1: how an NVAE is trained. Rates per iteration; portions of all iterations."""

    epochs: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-2
    learning_rate_min: float = 1e-4
    warmup_epochs: int = 5
    weight_decay: float = 3e-4
    adamax_eps: float = 1e-3
    weight_decay_norm: float = 1e-1  # coefficient of the spectral and BN regularisers
    weight_decay_norm_anneal: bool = False
    weight_decay_norm_init: float = 10.0
    kl_anneal_portion: float = 0.3
    kl_const_portion: float = 1e-4
    kl_const_coeff: float = 1e-4
    mixed_precision: bool = True  # bfloat16 autocast
    log_sigma_floor: float | None = None  # NVAE trains its Gaussian pixels without the floor that VAEBM adds

    def __post_init__(self) -> None:
        _require_positive(self, "epochs", "batch_size", "learning_rate", "adamax_eps", "kl_anneal_portion")
        _require_not_negative(self, "learning_rate_min", "warmup_epochs", "weight_decay", "kl_const_portion")
        _require_positive(self, "kl_const_coeff", "weight_decay_norm", "weight_decay_norm_init")


@dataclass(frozen=True)
class ReplayBuffer:
    """Persistent chains: how many each process keeps, where, and how often a chain starts from one."""

    size: int = 10_000
    max_probability: float = 0.6
    anneal_steps: int = 5_000
    dtype: ReplayDtype = "float32"  # of what is kept; bfloat16 halves celeba_256's 14 GB
    placement: Placement = "device"  # host: its memory, pinned, where that of the GPU is short

    def __post_init__(self) -> None:
        _require_positive(self, "size")
        _require_not_negative(self, "anneal_steps")
        _require(0 <= self.max_probability <= 1, f"max_probability is {self.max_probability}; it is between 0 and 1.")
        for name, known in (("dtype", get_args(ReplayDtype)), ("placement", get_args(Placement))):
            value = getattr(self, name)
            _require(value in known, f"{name} {value!r} is not known; it is one of {', '.join(known)}.")


@dataclass(frozen=True)
class EnergyTraining:
    """Stage 2: how the energy network is trained against its frozen NVAE."""

    iterations: int = 30_000
    batch_size: int = 32
    learning_rate: float = 4e-5
    beta1: float = 0.99
    beta2: float = 0.999
    weight_decay: float = 3e-5
    spectral_coeff: float = 0.2  # alpha_s
    steps: int = 10
    step_size: float = 8e-5  # h
    potential: Potential = "official"
    use_mean_negatives: bool = True  # negatives are decoder means, not x(eps)
    buffer: ReplayBuffer | None = None
    init_batches: int = 5  # data batches, taken as one, of the data-dependent initialisation
    ema_decay: float = 0.0  # of the weights that are exported and sampled; 0 exports the last weights
    max_energy_gap: float = 1e4  # |mean E(data) - mean E(negatives)| beyond which training counts as diverged
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        _require_positive(self, "iterations", "batch_size", "learning_rate", "steps", "step_size", "init_batches")
        _require_positive(self, "max_energy_gap")
        _require_not_negative(self, "weight_decay", "spectral_coeff", "max_rollbacks")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1.")
        size = self.buffer.size if self.buffer else self.batch_size
        _require(size >= self.batch_size, f"A replay buffer of {size} cannot take a batch of {self.batch_size}.")


@dataclass(frozen=True)
class Sampling:
    """The published chain of a model at sampling time."""

    steps: int
    step_size: float
    potential: Potential = "official"
    temperature: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A named model with the settings that train and sample it; batch sizes are per GPU, for the number given here."""

    name: str
    nvae: NVAEConfig
    energy: EnergyConfig
    vae_training: VAETraining
    energy_training: EnergyTraining
    sampling: Sampling
    horizontal_flip: bool = True
    random_crop: bool = False
    vae_gpus: int = 8
    energy_gpus: int = 1


def _nvae(image_size: int, channels: int, scales: int, groups: int, flows: int, bits: int = 8) -> NVAEConfig:
    return NVAEConfig(
        image_size,
        num_x_bits=bits,
        num_latent_scales=scales,
        num_groups_per_scale=groups,
        num_channels_enc=channels,
        num_channels_dec=channels,
        num_nf=flows,
    )


_DIGITS_NVAE = NVAEConfig(
    image_size=8,
    image_channels=1,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=4,
    num_channels_enc=16,
    num_channels_dec=16,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        preset.name: preset
        for preset in (
            Preset(
                name="cifar10",
                nvae=_nvae(32, channels=128, scales=1, groups=30, flows=1),
                energy=ENERGY_ARCHS["cifar32"].config(),
                vae_training=VAETraining(epochs=400),
                energy_training=EnergyTraining(learning_rate=4e-5, step_size=8e-5, use_mean_negatives=False),
                sampling=Sampling(steps=16, step_size=8e-5),
            ),
            Preset(
                name="celeba_64",
                nvae=_nvae(64, channels=48, scales=3, groups=5, flows=1),
                energy=ENERGY_ARCHS["celeba64"].config(),
                vae_training=VAETraining(epochs=50, warmup_epochs=1),
                energy_training=EnergyTraining(learning_rate=5e-5, step_size=5e-6),
                sampling=Sampling(steps=20, step_size=5e-6),
            ),
            Preset(
                name="lsun_church_64",
                nvae=_nvae(64, channels=48, scales=3, groups=5, flows=1),
                energy=ENERGY_ARCHS["lsun64"].config(),
                vae_training=VAETraining(epochs=60, warmup_epochs=1),
                energy_training=EnergyTraining(learning_rate=4e-5, step_size=4e-6, buffer=ReplayBuffer()),
                sampling=Sampling(steps=20, step_size=4e-6),
                random_crop=True,
            ),
            Preset(
                name="celeba_256",
                nvae=_nvae(256, channels=32, scales=5, groups=4, flows=2, bits=5),
                energy=ENERGY_ARCHS["celeba256"].config(),
                vae_training=VAETraining(
                    epochs=200,
                    batch_size=8,
                    learning_rate=6e-3,
                    weight_decay_norm=1e-2,
                    weight_decay_norm_anneal=True,
                ),
                energy_training=EnergyTraining(
                    iterations=9_000,
                    batch_size=4,
                    learning_rate=4e-5,
                    spectral_coeff=0.3,
                    steps=6,
                    step_size=3e-6,
                    buffer=ReplayBuffer(size=2_000, anneal_steps=3_000),
                ),
                sampling=Sampling(steps=24, step_size=3e-6),
                energy_gpus=4,
            ),
            Preset(
                name="digits",
                nvae=_DIGITS_NVAE,
                energy=EnergyConfig(8, 1, 32, parse_blocks("1-1d 1-1 1-2d 2-2")),
                vae_training=VAETraining(epochs=60, mixed_precision=False),
                energy_training=EnergyTraining(
                    iterations=250,
                    learning_rate=1e-4,
                    beta1=0.5,
                    steps=10,
                    step_size=0.15,
                    potential="paper",
                    use_mean_negatives=False,
                    ema_decay=0.98,
                    max_energy_gap=100.0,
                ),
                sampling=Sampling(steps=10, step_size=0.15, potential="paper"),
                horizontal_flip=False,
                vae_gpus=1,
            ),
        )
    }
)
