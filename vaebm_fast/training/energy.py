"""Stage 2: trains the energy network by contrastive divergence with short Langevin chains on a frozen NVAE.

`EnergyUpdate` is one optimiser step on given positives and negatives; `EnergyTrainer` adds the chains, the replay
buffer and the data. Source: VAEBM (arXiv:2010.00654), section 3.2 and appendix; persistent chains: arXiv:1903.08689.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.chain.noise import Stream, step_seeds, uniform
from vaebm_fast.checkpoint import content_sha256, save_energy
from vaebm_fast.config import EnergyConfig, EnergyTraining, ReplayBuffer, to_json, whole_number
from vaebm_fast.data import Loader, require_whole_batches, to_input
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.building import building
from vaebm_fast.models.layers import channels_last
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.runtime.errors import NonFiniteError
from vaebm_fast.training.guard import DivergenceGuard
from vaebm_fast.training.losses import finite, weight_norm
from vaebm_fast.training.replay import ReplayRing
from vaebm_fast.training.spectral import SpectralRegulariser
from vaebm_fast.training.state import Stateful, StateOfParts


@torch.no_grad()
def clip_by_second_moment(optimizer: torch.optim.Adam) -> None:
    """Clip every gradient entry to +-(3 sqrt(v / (1 - beta2^t)) + 0.1), v and t Adam's state before this step.

    Skips parameters without Adam state. Same bound as Du and Mordatch, arXiv:1903.08689.
    """
    for group in optimizer.param_groups:
        beta2 = group["betas"][1]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state or parameter.grad is None:
                continue
            bound = 3 * torch.sqrt(state["exp_avg_sq"] / (1 - beta2 ** state["step"].float())) + 0.1
            torch.clamp(parameter.grad, -bound, bound, out=parameter.grad)


class EnergyUpdate(StateOfParts):
    """One Adam step on mean E(data) - mean E(negatives) + alpha_s * spectral, with entry-wise clipping.

    `averaged` follows the weights: averaged <- ema_decay * averaged + (1 - ema_decay) * weights after each step.
    """

    def __init__(self, energy: EnergyNetwork, training: EnergyTraining, *, seed: int = 0) -> None:
        self.energy = energy
        self.spectral_coeff = training.spectral_coeff
        self._learning_rate = training.learning_rate
        self._ema_decay = training.ema_decay
        self.averaged = copy.deepcopy(energy).requires_grad_(False)
        self.spectral = SpectralRegulariser(energy, seed=seed)
        self.optimizer = torch.optim.Adam(
            energy.parameters(),
            lr=training.learning_rate,
            betas=(training.beta1, training.beta2),
            eps=1e-8,
            weight_decay=training.weight_decay,
        )

    def __call__(self, positive: Tensor, negative: Tensor) -> dict[str, Tensor]:
        """Update on images [N, C, H, W] in [0, 1]; returns `loss` (without alpha_s term), `spectral`, mean energies.

        Also returns `weight_norm`, the norm of the updated weights: non-finite if any weight is.
        """
        energy_data = self.energy(positive).mean()
        energy_negative = self.energy(negative).mean()
        loss = energy_data - energy_negative
        spectral = self.spectral() if self.spectral_coeff else torch.zeros_like(loss)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.spectral_coeff * spectral).backward()
        clip_by_second_moment(self.optimizer)
        self.optimizer.step()
        self._average()
        return {
            "loss": loss.detach(),
            "spectral": spectral.detach(),
            "energy_data": energy_data.detach(),
            "energy_negative": energy_negative.detach(),
            "weight_norm": weight_norm(self.energy),
        }

    @torch.no_grad()
    def _average(self) -> None:
        pairs = zip(self.averaged.parameters(), self.energy.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight, 1 - self._ema_decay)

    def initialize_from_data(self, images: Tensor) -> None:
        """Data-dependent initialisation of the network and of its average."""
        self.energy.initialize_from_data(images)
        self.averaged.load_state_dict(self.energy.state_dict())

    def scale_learning_rate(self, factor: float) -> None:
        """Set the learning rate to `factor` times the configured one."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self._learning_rate

    def _parts(self) -> dict[str, Stateful | None]:
        return {
            "energy": self.energy,
            "averaged": self.averaged,
            "optimizer": self.optimizer,
            "spectral": self.spectral,
        }


class EnergyTrainer(StateOfParts):
    """Trains an energy network with a frozen NVAE; each step draws negatives by chains at the current energy.

    The chains run on the compiled pair; its energy network is refolded after each update. Raises ValueError
    unless the loader has the same batch size and seed.
    """

    network_file = "energy.safetensors"

    def __init__(
        self,
        vae: NVAE,
        config: EnergyConfig,
        training: EnergyTraining,
        loader: Loader,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        seed = whole_number("seed", seed)
        require_whole_batches(loader, training.batch_size, seed)
        self.config, self.training, self.loader, self.seed = config, training, loader, seed
        self.device, self.total_steps = torch.device(device), training.iterations
        with building(seed):
            energy = EnergyNetwork(config)
        vae = vae.eval().requires_grad_(False)
        self._nvae_sha256 = content_sha256(vae)
        self.model = channels_last(VAEBM(vae, energy).to(self.device))
        self.update = EnergyUpdate(self.model.energy, training, seed=seed)
        self._frozen = freeze(self.model)
        self.sampler = self._sampler_of(self._frozen)
        latent_dim = self.sampler.noise_layout.latent_dim
        self.buffer = self._ring_of(training.buffer, latent_dim) if training.buffer else None
        self._guard = DivergenceGuard(
            self.update, max_gap=training.max_energy_gap, max_rollbacks=training.max_rollbacks
        )

    def _ring_of(self, buffer: ReplayBuffer, latent_dim: int) -> ReplayRing:
        dtype: torch.dtype = getattr(torch, buffer.dtype)
        return ReplayRing(buffer.size, latent_dim, dtype=dtype, device=self.device, placement=buffer.placement)

    def _sampler_of(self, frozen: FrozenVAEBM) -> LangevinSampler:
        return LangevinSampler(frozen, **asdict(self.training.chain))

    def settings(self) -> dict[str, Any]:
        """Settings that must match to resume. The device and the replay buffer's placement may change."""
        training = asdict(self.training)
        chain = training.pop("chain")
        if self.training.buffer is not None:
            del training["buffer"]["placement"]
        return {
            "stage": "energy",
            "nvae_sha256": self._nvae_sha256,
            "seed": self.seed,
            **self.loader.settings(),
            "energy": to_json(self.config),
            **training,
            **chain,
        }

    def initialize(self) -> None:
        """Data-dependent initialisation on the first `init_batches` batches, concatenated."""
        images = torch.cat([self.images(step) for step in range(self.training.init_batches)])
        self.update.initialize_from_data(images)

    def images(self, step: int) -> Tensor:
        """The batch of a step, [N, C, H, W] in [0, 1] on the device."""
        return to_input(self.loader.batch(step), self.model.vae.config.num_x_bits, self.device)

    def start(self, step: int) -> Tensor:
        """Starting states of a step's chains, [N, D]: N(0, I), with some latents from the replay buffer."""
        seeds, buffer = self.chain_seeds(step), self.training.buffer
        eps = self.sampler.start(seeds, Stream.TRAIN_CHAIN)
        if buffer is None or self.buffer is None or len(self.buffer) == 0:
            return eps
        # Chosen on the host, which copies the rows. Uses the chains' seeds, so that ranks choose differently.
        chance, place = uniform(seeds.cpu(), 0, Stream.REPLAY, 2).unbind(1)
        annealed = min(1.0, step / max(buffer.anneal_steps, 1))
        chosen = (chance < buffer.max_probability * annealed).nonzero().flatten()
        kept = self.buffer.gather((place[chosen] * len(self.buffer)).long())
        eps[chosen.to(self.device), : self.sampler.noise_layout.latent_dim] = kept
        return eps

    def chain_seeds(self, step: int) -> Tensor:
        """Seeds of a step's chains, [N]."""
        return step_seeds(self.seed, step, self.training.batch_size, self.device)

    def negatives(self, step: int) -> Tensor:
        """Images [N, C, H, W] at the end of a step's chains; pushes their latents to the replay buffer.

        Raises NonFiniteError if the folded energy network or a chain is not finite.
        """
        layout = self.sampler.noise_layout
        self._frozen.refresh()
        chains = self.sampler.run(self.chain_seeds(step), start=self.start(step), stream=Stream.TRAIN_CHAIN)
        if self.buffer is not None:
            self.buffer.push(chains.eps[:, : layout.latent_dim])
        if self.training.use_mean_negatives:
            return chains.images
        with torch.no_grad():
            return self._frozen.image(*layout.split(chains.eps))

    def step(self, step: int) -> Mapping[str, Tensor | float]:
        """Run the chains, update and check for divergence; returns the scalars of this step.

        On divergence, rolls back, halves the learning rate and clears the replay buffer, because its states come from
        the diverged network; the returned scalars then contain only `learning_rate` and `rollbacks`.
        """
        with without_autocast(self.device):
            return self._step(step)

    def _step(self, step: int) -> Mapping[str, Tensor | float]:
        if step == 0:
            self.initialize()
        images = self.images(step)  # may raise, so read before any state changes
        self._guard.before_step(step)
        scalars: Mapping[str, Tensor | float] = {}
        try:
            scalars = finite(self.update(images, self.negatives(step)), step + 1)
            gap, cause = float(scalars["loss"]), ""
        except NonFiniteError as error:
            gap, cause = math.inf, str(error)
        if self._guard.after_step(step, gap, cause):
            self._recover(step, cause or f"energy gap {gap:.4g}")
            scalars = {}
        rate = self.update.optimizer.param_groups[0]["lr"]
        return {**scalars, "learning_rate": rate, "rollbacks": self._guard.rollbacks}

    def _recover(self, step: int, cause: str) -> None:
        """Reduce the learning rate, clear the replay buffer and warn after a rollback."""
        self.update.scale_learning_rate(0.5**self._guard.rollbacks)
        if self.buffer is not None:
            self.buffer.clear()
        warnings.warn(
            f"Energy training diverged at step {step} ({cause.rstrip('.')}): rolled back to the last good "
            "state and halved the learning rate.",
            stacklevel=4,
        )

    def _parts(self) -> dict[str, Stateful | None]:
        return {"update": self.update, "guard": self._guard, "buffer": self.buffer}

    def sample_images(self) -> Tensor:
        """Mean images of 16 chains with the averaged network, uint8 [16, H, W, C]."""
        return self._sampler_of(freeze(VAEBM(self.model.vae, self.update.averaged))).sample(range(16))

    def export(self, out: Path) -> Path:
        """Write the averaged network; with `ema_decay` 0 these are the last weights."""
        path = out / self.network_file
        save_energy(self.update.averaged, path, {"steps": self.total_steps, "seed": self.seed})
        return path
