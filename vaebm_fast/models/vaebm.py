"""The joint model p(x) ~ p_VAE(x) exp(-E(x)) in the NVAE's noise space (VAEBM, arXiv:2010.00654, section 3).

Owns the three potentials and their gradients in plain PyTorch: the reference for every faster implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vaebm_fast import reference
from vaebm_fast.config import NoiseLayout, Potential, find_preset, require_potential
from vaebm_fast.models.building import building
from vaebm_fast.models.distributions import GaussianPixels
from vaebm_fast.models.energy import EnergyNetwork
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.ops._backend import Backend
from vaebm_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from vaebm_fast.frozen import FrozenVAEBM


class VAEBM(nn.Module):
    """An NVAE with Gaussian pixels and an energy network over the same images.

    Raises UserError if their image shapes differ or the pixels are not Gaussian: the chain needs x to be a
    differentiable function of Gaussian noise.
    """

    def __init__(self, vae: NVAE, energy: EnergyNetwork) -> None:
        super().__init__()
        if vae.image_shape != energy.image_shape:
            raise UserError(
                f"The NVAE makes images of shape {vae.image_shape} (C, H, W) but the energy network takes "
                f"{energy.image_shape}; load two checkpoints that belong together."
            )
        if vae.config.likelihood != "gaussian":
            raise UserError(
                "A VAEBM needs an NVAE with Gaussian pixels (num_mixture_dec = 1); this one has "
                f"{vae.config.likelihood} pixels."
            )
        self.vae = vae
        self.energy = energy

    @classmethod
    def from_preset(cls, name: str, seed: int = 0) -> VAEBM:
        """The preset's two networks with random weights that depend only on `seed`, in eval mode."""
        preset = find_preset(name)
        with building(seed):
            model = cls(NVAE(preset.nvae), EnergyNetwork(preset.energy))
        return model.eval()

    def freeze(self, dtype: torch.dtype = torch.float32, backend: Backend = "auto") -> FrozenVAEBM:
        """The compiled pair with the same `potential_and_grad`, `image` and `mean_image`: `vaebm_fast.freeze`."""
        from vaebm_fast.frozen import freeze  # the only import from a higher layer, for this short form

        return freeze(self, dtype, backend)

    @property
    def device(self) -> torch.device:
        """Device of the NVAE's weights."""
        return self.vae.prior_ftr0.device

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """[(L, H, W), ...] per group, top first."""
        return self.vae.latent_shapes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.vae.image_shape

    @property
    def noise_layout(self) -> NoiseLayout:
        """Positions of each latent group and of eps_x in an image's noise vector eps."""
        return self.vae.noise_layout

    def _pixels(self, logits: Tensor) -> GaussianPixels:
        pixels = self.vae.pixels(logits)
        assert isinstance(pixels, GaussianPixels)
        return pixels

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """The decoder's mean image in [0, 1], [N, C, H, W]: the result of a chain."""
        return self._pixels(self.vae.decode(eps_z, temperature).logits).mean_image()

    def image(self, eps_z: Sequence[Tensor], eps_x: Tensor, temperature: float = 1.0) -> Tensor:
        """x(eps) = clamp(mu + sigma eps_x, -1, 1) / 2 + 1/2, [N, C, H, W]."""
        return self._pixels(self.vae.decode(eps_z, temperature).logits).sample(eps_x)

    def potential(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential = "official", temperature: float = 1.0
    ) -> Tensor:
        """U [N], differentiable in the noise.

        "energy": E(x(eps)). "paper": E + |eps_z|^2 / 2 + |eps_x|^2 / 2, the correct density in noise space
        (arXiv:2010.00654, equation 8). "official": E - log p(z) - log p(x|z) with log sigma floored, used to train and
        sample published checkpoints.
        """
        require_potential(potential)
        needed = (self.vae.check_noise(eps_z), *self.image_shape)
        if tuple(eps_x.shape) != needed:
            raise ValueError(f"eps_x has shape {tuple(eps_x.shape)}; this model needs {needed} [N, C, H, W].")
        decoded = self.vae.decode(eps_z, temperature)
        pixels = self._pixels(decoded.logits)
        x = pixels.sample(eps_x)
        u = self.energy(x)
        if potential == "paper":
            u = u + reference.prior_potential(*eps_z, eps_x)
        elif potential == "official":
            u = u - decoded.log_p_z - pixels.log_prob(x)
        return u

    def potential_and_grad(
        self,
        eps_z: Sequence[Tensor],
        eps_x: Tensor,
        potential: Potential = "official",
        temperature: float = 1.0,
    ) -> tuple[Tensor, list[Tensor]]:
        """U [N] and its gradients: one tensor per latent group, then that of `eps_x`; leaves `.grad` unchanged.

        Also works under `torch.no_grad` and `torch.inference_mode`; inference tensors are copied first.
        """
        with torch.inference_mode(False), torch.enable_grad():
            noise = [eps.clone() if eps.is_inference() else eps.detach() for eps in (*eps_z, eps_x)]
            leaves = [eps.requires_grad_() for eps in noise]
            u = self.potential(leaves[:-1], leaves[-1], potential, temperature)
            gradients = torch.autograd.grad(u.sum(), leaves)
        return u.detach(), list(gradients)
