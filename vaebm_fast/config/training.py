"""Training settings of both stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from vaebm_fast.config._fields import PlainFields, require, require_not_negative, require_positive
from vaebm_fast.config.chain import ChainConfig

ReplayDtype = Literal["float32", "bfloat16"]
Placement = Literal["device", "host"]


@dataclass(frozen=True)
class VAETraining(PlainFields):
    """Stage 1, NVAE training. Rates are per iteration; portions are fractions of all iterations."""

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
    log_sigma_floor: float | None = None  # None as in NVAE training; VAEBM adds a floor for Gaussian pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "epochs", "batch_size", "learning_rate", "adamax_eps", "kl_anneal_portion")
        require_not_negative(self, "learning_rate_min", "warmup_epochs", "weight_decay", "kl_const_portion")
        require_positive(self, "kl_const_coeff", "weight_decay_norm", "weight_decay_norm_init")


@dataclass(frozen=True)
class ReplayBuffer(PlainFields):
    """Replay buffer: states per process, where they are stored, and the probability of starting a chain from one."""

    size: int = 10_000
    max_probability: float = 0.6
    anneal_steps: int = 5_000
    dtype: ReplayDtype = "float32"  # of stored states; bfloat16 halves celeba_256's 14 GB
    placement: Placement = "device"  # host: pinned memory, for when GPU memory is short

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "size")
        require_not_negative(self, "anneal_steps")
        require(
            0 <= self.max_probability <= 1, f"max_probability is {self.max_probability}; it must be between 0 and 1."
        )
        for name, known in (("dtype", get_args(ReplayDtype)), ("placement", get_args(Placement))):
            value = getattr(self, name)
            require(value in known, f"{name} {value!r} is not known; it must be one of {', '.join(known)}.")


@dataclass(frozen=True)
class EnergyTraining(PlainFields):
    """Stage 2, training of the energy network with a frozen NVAE."""

    iterations: int = 30_000
    batch_size: int = 32
    learning_rate: float = 4e-5
    beta1: float = 0.99
    beta2: float = 0.999
    weight_decay: float = 3e-5
    spectral_coeff: float = 0.2  # alpha_s
    chain: ChainConfig = ChainConfig(steps=10, step_size=8e-5)  # makes the negatives
    use_mean_negatives: bool = True  # negatives are decoder means, not x(eps)
    buffer: ReplayBuffer | None = None
    init_batches: int = 5  # batches concatenated for data-dependent initialisation
    ema_decay: float = 0.0  # of the exported and sampled weights; 0 exports the last weights
    max_energy_gap: float = 1e4  # |mean E(data) - mean E(negatives)| above this counts as divergence
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "iterations", "batch_size", "learning_rate", "init_batches")
        require_positive(self, "max_energy_gap")
        require(self.chain.steps > 0, "chain.steps is 0; negatives need at least one step.")
        require_not_negative(self, "weight_decay", "spectral_coeff", "max_rollbacks")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} is {value}; it must be at least 0 and below 1.")
        size = self.buffer.size if self.buffer else self.batch_size
        require(size >= self.batch_size, f"Replay buffer size {size} is smaller than batch size {self.batch_size}.")
