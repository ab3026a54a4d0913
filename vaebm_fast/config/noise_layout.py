"""Position of each latent group and the image noise in an image's noise vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLayout:
    """Layout of the noise eps [N, D]: latent groups, top first, then image noise; each block is NHWC.

    latent_shapes: (L, H, W) per group. image_shape: (C, H, W).
    """

    latent_shapes: Sequence[tuple[int, int, int]]
    image_shape: tuple[int, int, int]

    @property
    def dim(self) -> int:
        """D, the noise elements per image."""
        return sum(map(math.prod, self._shapes))

    @property
    def latent_dim(self) -> int:
        """Noise elements per image that belong to the latents; eps_x follows them."""
        return sum(map(math.prod, self.latent_shapes))

    @property
    def _shapes(self) -> list[tuple[int, int, int]]:
        return [*self.latent_shapes, self.image_shape]

    def split(self, eps: Tensor) -> tuple[list[Tensor], Tensor]:
        """Split eps [N, D] into (eps_z, eps_x): [N, L, H, W] per group and [N, C, H, W]. Returns views.

        The views are channels_last in memory with batch stride D. Raises ValueError for any other shape of eps.
        """
        if eps.dim() != 2 or eps.shape[1] != self.dim:
            raise ValueError(f"eps is {list(eps.shape)}; this layout takes [N, {self.dim}].")
        pieces = eps.split([math.prod(shape) for shape in self._shapes], dim=1)
        *eps_z, eps_x = (
            piece.unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
            for piece, (channels, height, width) in zip(pieces, self._shapes, strict=True)
        )
        return eps_z, eps_x

    def join(self, eps_z: Sequence[Tensor], eps_x: Tensor) -> Tensor:
        """Inverse of `split`: a new eps [N, D]. Raises ValueError if shapes differ from the layout."""
        tensors = [*eps_z, eps_x]
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        if shapes != [tuple(shape) for shape in self._shapes]:
            raise ValueError(f"noise tensors have shapes {shapes} after [N]; this layout takes {self._shapes}.")
        return torch.cat([tensor.permute(0, 2, 3, 1).flatten(1) for tensor in tensors], dim=1)
