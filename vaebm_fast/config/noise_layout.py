"""Where each tensor lies in the noise vector of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLayout:
    """The layout of eps [N, D], the noise of each image: latent groups, top first, then the image; NHWC inside each.

    latent_shapes: (L, H, W) per group. image_shape: (C, H, W).
    """

    latent_shapes: Sequence[tuple[int, int, int]]
    image_shape: tuple[int, int, int]

    @property
    def dim(self) -> int:
        """D, the number of noise elements of an image."""
        return sum(map(math.prod, self._shapes))

    @property
    def latent_dim(self) -> int:
        """Noise elements of an image before eps_x, which comes last."""
        return sum(map(math.prod, self.latent_shapes))

    @property
    def _shapes(self) -> list[tuple[int, int, int]]:
        return [*self.latent_shapes, self.image_shape]

    def split(self, eps: Tensor) -> tuple[list[Tensor], Tensor]:
        """(eps_z, eps_x) of eps [N, D]: [N, L, H, W] per group and [N, C, H, W], views without a copy.

        Channels are innermost in memory (channels_last), images D apart. Raises ValueError for another D.
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
        """The eps [N, D] of which `split` gives these values; a copy. Raises ValueError for other shapes."""
        tensors = [*eps_z, eps_x]
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        if shapes != [tuple(shape) for shape in self._shapes]:
            raise ValueError(f"noise tensors are shaped {shapes}; this layout takes {self._shapes}, each behind [N].")
        return torch.cat([tensor.permute(0, 2, 3, 1).flatten(1) for tensor in tensors], dim=1)
