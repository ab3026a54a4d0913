"""Table of presets: the published models, Stacked MNIST and the built-in digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from vaebm_fast.config.chain import ChainConfig
from vaebm_fast.config.energy import ENERGY_ARCHS, EnergyConfig, parse_blocks
from vaebm_fast.config.nvae import NVAEConfig
from vaebm_fast.config.training import EnergyTraining, ReplayBuffer, VAETraining
from vaebm_fast.runtime.errors import UserError

Transform = Literal["square", "celeba", "pad", "stacked_mnist"]  # how stored images become square; see data/images.py


@dataclass(frozen=True)
class Preset:
    """A named model with its training and sampling settings. Batch sizes are per GPU, for the GPU counts given here.

    transform: of the images that the model is trained on; None: as fits the data.
    """

    name: str
    nvae: NVAEConfig
    energy: EnergyConfig
    vae_training: VAETraining
    energy_training: EnergyTraining
    sampling: ChainConfig
    horizontal_flip: bool = True
    random_crop: bool = False
    transform: Transform | None = None
    vae_gpus: int = 8
    energy_gpus: int = 1


def find_preset(name: str) -> Preset:
    """The preset with this name. Raises UserError if there is none."""
    if name not in PRESETS:
        raise UserError(f"Preset {name!r} is not known; it must be one of {', '.join(PRESETS)}.")
    return PRESETS[name]


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
                energy=ENERGY_ARCHS["cifar_32"].config(),
                vae_training=VAETraining(epochs=400),
                energy_training=EnergyTraining(
                    learning_rate=4e-5, chain=ChainConfig(10, 8e-5), use_mean_negatives=False
                ),
                sampling=ChainConfig(steps=16, step_size=8e-5),
            ),
            Preset(
                name="celeba_64",
                nvae=_nvae(64, channels=48, scales=3, groups=5, flows=1),
                energy=ENERGY_ARCHS["celeba_64"].config(),
                vae_training=VAETraining(epochs=50, warmup_epochs=1),
                energy_training=EnergyTraining(learning_rate=5e-5, chain=ChainConfig(10, 5e-6)),
                sampling=ChainConfig(steps=20, step_size=5e-6),
                transform="celeba",
            ),
            Preset(
                name="lsun_church_64",
                nvae=_nvae(64, channels=48, scales=3, groups=5, flows=1),
                energy=ENERGY_ARCHS["lsun_64"].config(),
                vae_training=VAETraining(epochs=60, warmup_epochs=1),
                energy_training=EnergyTraining(learning_rate=4e-5, chain=ChainConfig(10, 4e-6), buffer=ReplayBuffer()),
                sampling=ChainConfig(steps=20, step_size=4e-6),
                random_crop=True,
            ),
            Preset(
                name="celeba_256",
                nvae=_nvae(256, channels=32, scales=5, groups=4, flows=2, bits=5),
                energy=ENERGY_ARCHS["celeba_256"].config(),
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
                    chain=ChainConfig(6, 3e-6),
                    buffer=ReplayBuffer(size=2_000, anneal_steps=3_000),
                ),
                sampling=ChainConfig(steps=24, step_size=3e-6),
                energy_gpus=4,
            ),
            Preset(  # sizes and settings are ours: only the results are published
                name="stacked_mnist",
                nvae=_nvae(32, channels=32, scales=2, groups=5, flows=1),
                energy=ENERGY_ARCHS["mnist"].config(),
                vae_training=VAETraining(epochs=100),
                energy_training=EnergyTraining(
                    learning_rate=4e-5, chain=ChainConfig(10, 8e-5), use_mean_negatives=False
                ),
                sampling=ChainConfig(steps=16, step_size=8e-5),
                horizontal_flip=False,
                transform="stacked_mnist",
                vae_gpus=1,
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
                    chain=ChainConfig(10, 0.15, "paper"),
                    use_mean_negatives=False,
                    ema_decay=0.98,
                    max_energy_gap=100.0,
                ),
                sampling=ChainConfig(steps=10, step_size=0.15, potential="paper"),
                horizontal_flip=False,
                vae_gpus=1,
            ),
        )
    }
)
