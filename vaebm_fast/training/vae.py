"""Stage 1: trains the NVAE on the evidence lower bound with annealed, balanced KL and smoothness regularisers.

`VAEUpdate` is one optimiser step on a given batch and noise; `VAETrainer` adds data and noise. Source: NVAE
(arXiv:2007.03898), sections 3.2, 3.3 and appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaebm_fast.chain.langevin import to_uint8
from vaebm_fast.chain.noise import Stream, normal, step_seeds
from vaebm_fast.checkpoint import save_nvae
from vaebm_fast.config import NVAEConfig, VAETraining, to_json, whole_number
from vaebm_fast.data import Loader, require_whole_batches, to_input
from vaebm_fast.models.building import building
from vaebm_fast.models.layers import channels_last
from vaebm_fast.models.nvae import NVAE, bits_per_dim
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.training.losses import (
    batchnorm_loss,
    kl_alpha,
    kl_coeff,
    learning_rate,
    reconstruction_and_kl,
    regulariser_coeff,
    weight_norm,
)
from vaebm_fast.training.spectral import SpectralRegulariser
from vaebm_fast.training.state import Stateful, StateOfParts


class VAEUpdate(StateOfParts):
    """One AdaMax step on reconstruction + kl_coeff * balanced KL + wdn * (spectral + BN)."""

    def __init__(
        self, vae: NVAE, training: VAETraining, *, steps_per_epoch: int, total_steps: int, seed: int = 0
    ) -> None:
        self.vae, self.training = vae, training
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.alpha = kl_alpha(vae.config.groups_per_scale).to(vae.prior_ftr0.device)
        self.spectral = SpectralRegulariser(vae, seed=seed)
        self.optimizer = torch.optim.Adamax(
            vae.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, eps=training.adamax_eps
        )

    def __call__(self, x: Tensor, eps_q: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        """Update on images x [N, C, H, W] in [0, 1] with posterior noise `eps_q`; returns the scalars of this step."""
        training = self.training
        rate = learning_rate(step, self.total_steps, self.steps_per_epoch, training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        coeff = kl_coeff(
            step, self.total_steps, training.kl_anneal_portion, training.kl_const_portion, training.kl_const_coeff
        )
        self.vae.train()
        device = x.device.type
        with torch.autocast(device, torch.bfloat16, enabled=training.mixed_precision):
            elbo = self.vae.elbo(x, eps_q, log_sigma_floor=training.log_sigma_floor)
            loss = reconstruction_and_kl(elbo, coeff, self.alpha)
        spectral, batchnorm = self.spectral(), batchnorm_loss(self.vae)
        regulariser = regulariser_coeff(coeff, training) * (spectral + batchnorm)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + regulariser).backward()
        self.optimizer.step()
        nats = (elbo.reconstruction_loss + elbo.kl.sum(1)).detach()
        return {
            "loss": loss.detach(),
            "bits_per_dim": bits_per_dim(nats, self.vae.config.counted_shape).mean(),
            "reconstruction_loss": elbo.reconstruction_loss.detach().mean(),
            "kl": elbo.kl.detach().sum(1).mean(),
            "spectral": spectral.detach(),
            "batchnorm": batchnorm.detach(),
            "weight_norm": weight_norm(self.vae),
            "kl_coeff": coeff,
            "learning_rate": rate,
        }

    def _parts(self) -> dict[str, Stateful | None]:
        return {"vae": self.vae, "optimizer": self.optimizer, "spectral": self.spectral}


class VAETrainer:
    """Trains a new NVAE on a loader's batches; each step depends only on seed, step number and state.

    Raises ValueError unless the loader has the same batch size and seed.
    """

    network_file = "nvae.safetensors"

    def __init__(
        self,
        config: NVAEConfig,
        training: VAETraining,
        loader: Loader,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        seed = whole_number("seed", seed)
        require_whole_batches(loader, training.batch_size, seed)
        self.config, self.training, self.loader, self.seed = config, training, loader, seed
        self.device = torch.device(device)
        with building(seed):
            vae = NVAE(config)
        self.vae = channels_last(vae.to(self.device))
        steps_per_epoch = loader.plan.batches_per_epoch
        self.total_steps = training.epochs * steps_per_epoch
        self.update = VAEUpdate(
            self.vae, training, steps_per_epoch=steps_per_epoch, total_steps=self.total_steps, seed=seed
        )
        self._layout = config.noise_layout

    def settings(self) -> dict[str, Any]:
        """Settings that must match to resume."""
        return {
            "stage": "vae",
            "seed": self.seed,
            **self.loader.settings(),
            **to_json(self.config),
            **asdict(self.training),
        }

    def images(self, step: int) -> Tensor:
        """The batch of a step, [N, C, H, W] in [0, 1] on the device."""
        return to_input(self.loader.batch(step), self.config.num_x_bits, self.device)

    def noise(self, step: int) -> list[Tensor]:
        """eps_q of a step, one [N, L, H, W] per group."""
        seeds = step_seeds(self.seed, step, self.training.batch_size, self.device)
        return self._layout.split(normal(seeds, 0, Stream.TRAIN_POSTERIOR, self._layout.dim))[0]

    def step(self, step: int) -> dict[str, Tensor | float]:
        """One optimiser step."""
        x = self.images(step)
        with without_autocast(self.device):
            if step == 0:
                self.vae.initialize_from_data(x, self.noise(step))
            return self.update(x, self.noise(step), step)

    def state_dict(self) -> dict[str, Any]:
        """All state that the next step depends on."""
        return self.update.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self.update.load_state_dict(state)

    @torch.no_grad()
    def sample_images(self) -> Tensor:
        """Decoder mean images of 16 prior samples, uint8 [16, H, W, C]."""
        self.vae.eval()
        noise = normal(torch.arange(16, device=self.device), 0, Stream.CHAIN, self._layout.dim)
        with without_autocast(self.device):
            decoded = self.vae.decode(self._layout.split(noise)[0])
        return to_uint8(self.vae.pixels(decoded.logits).mean_image()).cpu()

    def export(self, out: Path) -> Path:
        """Write the NVAE."""
        path = out / self.network_file
        save_nvae(self.vae, path, {"steps": self.total_steps, "seed": self.seed})
        return path
