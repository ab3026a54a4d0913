"""The frozen decoder: folded cells, combiners split into two terms, and noise-independent features computed once.

The first combiner reads the parameter `prior_ftr0` and the first z; the first of its terms is a constant image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.frozen import fold
from vaebm_fast.frozen.cells import ActivatedConvsCell, InvertedResidualCell, freeze_cell
from vaebm_fast.frozen.fold import Conv
from vaebm_fast.frozen.part import Part, Slot, slots
from vaebm_fast.frozen.units import Pointwise
from vaebm_fast.models.layers import Cell, DecoderCombiner, WNConv2d
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.gaussian_latent import gaussian_latent


class EntryWeights(NamedTuple):
    """The constant image [1, C, H, W] (vanilla form: [1, C, 1, 1]) and the 1x1 applied to the first z."""

    constant: Tensor
    latent: Pointwise


class CombinerWeights(NamedTuple):
    """A combiner's weights for the feature, with the bias, and for z."""

    feature: Pointwise
    latent: Pointwise


class EluConvWeights(NamedTuple):
    """The convolution after the ELU."""

    conv: Pointwise | Conv


class Entry(Part[EntryWeights]):
    """The first feature, constant + W z, from `prior_ftr0` and the first combiner, or from `stem_decoder`."""

    def __init__(self, vae: NVAE, dtype: torch.dtype, backends: OpBackends) -> None:
        watched: list[Slot] = (
            slots(vae.stem_decoder)
            if vae.config.is_vanilla
            else [*slots(vae.dec_tower[0]), (vae, "_parameters", "prior_ftr0")]
        )
        super().__init__("vae's first combiner", watched, dtype, partial(_fold_entry, vae, backends))
        self._backends = backends

    def __call__(self, z: Tensor) -> Tensor:
        return self.weights.latent(z, self._backends).add_(self.weights.constant)


def _fold_entry(vae: NVAE, backends: OpBackends) -> EntryWeights:
    if vae.config.is_vanilla:
        stem = fold.convolution(vae.stem_decoder)
        assert stem.bias is not None
        return EntryWeights(stem.bias[None, :, None, None], Pointwise.of(Conv(stem.weight, None), backends))
    combiner = vae.dec_tower[0]
    assert isinstance(combiner, DecoderCombiner)
    prior = vae.prior_ftr0[None]
    feature, latent = fold.split_input(fold.convolution(combiner.conv), prior.shape[1])
    return EntryWeights(F.conv2d(prior, feature.weight, feature.bias), Pointwise.of(latent, backends))


class Combiner(Part[CombinerWeights]):
    """The 1x1 of cat(s, z) as W_s s + b + W_z z."""

    def __init__(self, name: str, combiner: DecoderCombiner, dtype: torch.dtype, backends: OpBackends) -> None:
        super().__init__(name, slots(combiner), dtype, partial(_fold_combiner, combiner, backends))
        self._backends = backends

    def __call__(self, s: Tensor, z: Tensor) -> Tensor:
        return self.weights.latent(z, self._backends, residual=self.weights.feature(s, self._backends))


def _fold_combiner(combiner: DecoderCombiner, backends: OpBackends) -> CombinerWeights:
    feature, latent = fold.split_input(fold.convolution(combiner.conv), combiner.conv.out_channels)
    return CombinerWeights(Pointwise.of(feature, backends), Pointwise.of(latent, backends))


class EluConv(Part[EluConvWeights]):
    """ELU, then a convolution: the head of a prior (1x1) or of the image (3x3).

    The 1x1 fuses the ELU. The 3x3 is cuDNN's or PyTorch's, so its ELU is a separate pass, as is its bias on a GPU.
    """

    def __init__(self, name: str, layers: nn.Module, dtype: torch.dtype, backends: OpBackends) -> None:
        assert isinstance(layers, nn.Sequential) and isinstance(layers[1], WNConv2d)
        super().__init__(name, slots(layers), dtype, partial(_fold_elu_conv, layers[1], backends))
        self._padding, self._backends = layers[1].padding, backends

    def __call__(self, s: Tensor) -> Tensor:
        conv = self.weights.conv
        if isinstance(conv, Pointwise):
            return conv(s, self._backends, activation="elu")
        return F.conv2d(F.elu(s), conv.weight, conv.bias, padding=self._padding)


def _fold_elu_conv(layer: WNConv2d, backends: OpBackends) -> EluConvWeights:
    conv = fold.convolution(layer)
    return EluConvWeights(Pointwise.of(conv, backends) if layer.kernel_size == (1, 1) else conv)


class LatentStep(NamedTuple):
    """A latent group below the top: the head that gives its prior's parameters, and the combiner of feature and z."""

    prior: EluConv
    combiner: Combiner


class FrozenDecoder:
    """Logits and optionally log p(z) from noise; differentiable only in the noise."""

    def __init__(self, vae: NVAE, dtype: torch.dtype, backends: OpBackends) -> None:
        self._dtype, self._backends = dtype, backends
        self._entry = Entry(vae, dtype, backends)
        tower = [] if vae.config.is_vanilla else list(vae.dec_tower)[1:]
        groups = iter(enumerate(vae.dec_sampler))
        self._steps: list[LatentStep | InvertedResidualCell | ActivatedConvsCell] = []
        for index, module in enumerate(tower, start=1):
            name = f"vae.dec_tower.{index}"
            if isinstance(module, DecoderCombiner):
                group, sampler = next(groups)
                prior = EluConv(f"vae.dec_sampler.{group}", sampler, dtype, backends)
                self._steps.append(LatentStep(prior, Combiner(name, module, dtype, backends)))
            elif isinstance(module, Cell):
                self._steps.append(freeze_cell(name, module, dtype, backends))
        for index, cell in enumerate(vae.post_process):
            assert isinstance(cell, Cell)
            self._steps.append(freeze_cell(f"vae.post_process.{index}", cell, dtype, backends))
        self._image_head = EluConv("vae.image_conditional", vae.image_conditional, dtype, backends)

    @property
    def parts(self) -> list[Part[Any]]:
        """Every part that holds weights."""
        steps = [part for step in self._steps for part in (step if isinstance(step, LatentStep) else (step,))]
        return [self._entry, *steps, self._image_head]

    def __call__(
        self, eps_z: Sequence[Tensor], temperature: float, *, with_log_p: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [N, K, H, W] and log p(z) [N], or None, for z_g = mu_g + temperature sigma_g eps_g."""
        noise, backend = iter(eps_z), self._backends["gaussian_latent"]

        def latent(parameters: Tensor | None) -> Tensor:
            eps = next(noise)
            z, log_p = gaussian_latent(parameters, eps, temperature, with_log_p=with_log_p, backend=backend)
            if log_p is not None:
                log_ps.append(log_p)
            return z.to(self._dtype)

        log_ps: list[Tensor] = []
        s = self._entry(latent(None))
        for step in self._steps:
            s = step.combiner(s, latent(step.prior(s))) if isinstance(step, LatentStep) else step(s)
        return self._image_head(s), torch.stack(log_ps).sum(0) if with_log_p else None
