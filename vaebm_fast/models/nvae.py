"""NVAE: a deep hierarchical VAE with a bottom-up encoder and a top-down decoder (arXiv:2007.03898, figure 2).

Group 0 is the top of the hierarchy (lowest resolution). Letters: N batch, C channels, H W pixels, L latents per group,
G groups. Noise (`eps_z`, `eps_q`) is always passed in, one [N, L, H, W] tensor per group in the order of
`latent_shapes`, so that the same noise gives the same image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vaebm_fast.config import CELL_PLANS, NoiseLayout, NVAEConfig
from vaebm_fast.models.distributions import (
    VAEBM_LOG_SIGMA_FLOOR,
    BernoulliPixels,
    GaussianPixels,
    LogisticMixturePixels,
    Normal,
    PixelDistribution,
    at_least_float32,
)
from vaebm_fast.models.flows import PairedFlow
from vaebm_fast.models.layers import (
    ActivatedConv,
    Cell,
    DecoderCombiner,
    EncoderCombiner,
    WNConv2d,
    initialize_from_data,
)


@dataclass(frozen=True)
class Decoded:
    """The decoder's output: `logits` [N, K, H, W], `z` per group [N, L, H, W], `log_p_z` [N] in nats."""

    logits: Tensor
    z: list[Tensor]
    log_p_z: Tensor


@dataclass(frozen=True)
class Elbo:
    """The parts of the evidence lower bound, in nats: ELBO = -reconstruction_loss - kl.sum(1).

    `logits` [N, K, H, W]; `log_q`, `log_p`, `reconstruction_loss` [N]; `kl` [N, G]; `kl_diag` [G, L] is the KL of each
    latent channel, summed over its pixels and averaged over the batch.
    """

    logits: Tensor
    log_q: Tensor
    log_p: Tensor
    kl: Tensor
    kl_diag: Tensor
    reconstruction_loss: Tensor


def num_logits(config: NVAEConfig) -> int:
    """Channels of the decoder's output."""
    if config.likelihood == "bernoulli":
        return config.image_channels
    if config.likelihood == "gaussian":
        return 2 * config.image_channels
    return 10 * config.num_mixture_dec


def bits_per_dim(nats: Tensor, counted_shape: Sequence[int]) -> Tensor:
    """nats / (ln 2 * C * H * W) for a loss per image; `counted_shape` is `NVAEConfig.counted_shape`, (C, H, W)."""
    return nats / (math.log(2) * math.prod(counted_shape))


class NVAE(nn.Module):
    """An NVAE of any published architecture, with random weights, in training mode like every nn.Module."""

    def __init__(self, config: NVAEConfig) -> None:
        super().__init__()
        self.config = config
        plan, use_se = CELL_PLANS[config.arch_instance], config.use_se
        latents, groups = config.num_latent_per_group, sum(config.groups_per_scale)

        top_channels = config.num_channels_dec * config.downsampling
        top_side = config.image_size // config.downsampling
        self.prior_ftr0 = nn.Parameter(torch.rand(top_channels, top_side, top_side))

        channels = config.num_channels_enc
        self.stem = WNConv2d(config.image_channels, channels, 3)
        self.pre_process = nn.ModuleList()
        for _ in range(config.num_preprocess_blocks):
            for index in range(config.num_preprocess_cells):
                last = index == config.num_preprocess_cells - 1
                out_channels, resample = (2 * channels, "down") if last else (channels, "none")
                self.pre_process.append(Cell(plan.preprocess, channels, out_channels, resample=resample, use_se=use_se))
                channels = out_channels

        enc_channels = self._build_encoder(channels)
        dec_channels = [config.num_channels_dec * c // config.num_channels_enc for c in enc_channels]
        self.enc0 = nn.Sequential(nn.ELU(), WNConv2d(enc_channels[0], enc_channels[0], 1), nn.ELU())
        self.enc_sampler = nn.ModuleList(WNConv2d(c, 2 * latents, 3) for c in enc_channels)
        self.dec_sampler = nn.ModuleList(nn.Sequential(nn.ELU(), WNConv2d(c, 2 * latents, 1)) for c in dec_channels[1:])
        self.nf_cells = nn.ModuleList(PairedFlow(latents) for _ in range(groups * config.num_nf))
        channels = self._build_decoder()

        self.post_process = nn.ModuleList()
        for _ in range(config.num_postprocess_blocks):
            for index in range(config.num_postprocess_cells):
                out_channels, resample = (channels // 2, "up") if index == 0 else (channels, "none")
                self.post_process.append(
                    Cell(plan.postprocess, channels, out_channels, resample=resample, use_se=use_se)
                )
                channels = out_channels
        self.image_conditional = nn.Sequential(nn.ELU(), WNConv2d(channels, num_logits(config), 3))

    def _build_encoder(self, channels: int) -> list[int]:
        """Build `enc_tower`; returns the encoder channels at every group, top first."""
        config = self.config
        plan = CELL_PLANS[config.arch_instance]
        self.enc_tower = nn.ModuleList()
        if config.is_vanilla:
            return [channels]
        channels_per_group = []
        for scale, groups in enumerate(config.groups_per_scale):
            last_scale = scale == config.num_latent_scales - 1
            for group in range(groups):
                for _ in range(config.num_cell_per_cond_enc):
                    self.enc_tower.append(Cell(plan.encoder, channels, channels, use_se=config.use_se))
                if not (last_scale and group == groups - 1):
                    dec_channels = config.num_channels_dec * channels // config.num_channels_enc
                    self.enc_tower.append(EncoderCombiner(dec_channels, channels))
                channels_per_group.append(channels)
            if not last_scale:
                self.enc_tower.append(Cell(plan.encoder, channels, 2 * channels, resample="down", use_se=config.use_se))
                channels *= 2
        return channels_per_group[::-1]

    def _build_decoder(self) -> int:
        """Build `dec_tower` (vanilla form: `stem_decoder`); returns its output channels."""
        config = self.config
        plan = CELL_PLANS[config.arch_instance]
        channels = config.num_channels_dec * config.downsampling
        self.dec_tower = nn.ModuleList()
        if config.is_vanilla:
            self.stem_decoder = WNConv2d(config.num_latent_per_group, channels, 1)
            return channels
        for scale, groups in enumerate(reversed(config.groups_per_scale)):
            for group in range(groups):
                if scale > 0 or group > 0:
                    for _ in range(config.num_cell_per_cond_dec):
                        self.dec_tower.append(Cell(plan.decoder, channels, channels, use_se=config.use_se))
                self.dec_tower.append(DecoderCombiner(channels, config.num_latent_per_group))
            if scale < config.num_latent_scales - 1:
                self.dec_tower.append(Cell(plan.decoder, channels, channels // 2, resample="up", use_se=config.use_se))
                channels //= 2
        return channels

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """[(L, H, W), ...] per group, top first."""
        return self.config.latent_shapes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.config.image_shape

    def _top_down(self, batch: int, latent: Callable[[int, Tensor | None], Tensor]) -> Tensor:
        """The decoder: `latent(g, s)` gives group g's z from the feature s that its prior reads (None at the top)."""
        z = latent(0, None)
        if self.config.is_vanilla:
            s = self.stem_decoder(z)
        else:
            s, group = self.prior_ftr0.expand(batch, -1, -1, -1), 0
            for cell in self.dec_tower:
                if isinstance(cell, DecoderCombiner):
                    if group > 0:
                        z = latent(group, s)
                    s = cell(s, z)
                    group += 1
                else:
                    s = cell(s)
        for cell in self.post_process:
            s = cell(s)
        return self.image_conditional(s)

    def _prior_parameters(self, group: int, feature: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Raw mean and log sigma of group g's prior; at the top, zeros with the shape of `like`."""
        if feature is None:
            return torch.zeros_like(like), torch.zeros_like(like)
        mu, log_sigma = self.dec_sampler[group - 1](feature).chunk(2, dim=1)
        return mu, log_sigma

    @property
    def noise_layout(self) -> NoiseLayout:
        """Positions of each latent group and of eps_x in an image's noise vector eps."""
        return self.config.noise_layout

    def check_noise(self, eps_z: Sequence[Tensor]) -> int:
        """Raise ValueError unless `eps_z` has one [N, L, H, W] tensor per group; returns N."""
        if len(eps_z) != len(self.latent_shapes):
            raise ValueError(f"eps_z has {len(eps_z)} tensors; this NVAE has {len(self.latent_shapes)} latent groups.")
        batch = eps_z[0].shape[0]
        for group, (eps, shape) in enumerate(zip(eps_z, self.latent_shapes, strict=True)):
            if tuple(eps.shape) != (batch, *shape):
                raise ValueError(
                    f"eps_z[{group}] has shape {tuple(eps.shape)}; group {group} needs {(batch, *shape)} [N, L, H, W]."
                )
        return batch

    def decode(self, eps_z: Sequence[Tensor], temperature: float = 1.0) -> Decoded:
        """Decode noise: z_g = mu_g + temperature * sigma_g * eps_g, top group first; differentiable in `eps_z`."""
        batch = self.check_noise(eps_z)
        temperature = float(temperature)
        zs: list[Tensor] = []
        log_p_z: list[Tensor] = []

        def latent(group: int, feature: Tensor | None) -> Tensor:
            mu, log_sigma = self._prior_parameters(group, feature, eps_z[group])
            prior = Normal.from_raw(mu, log_sigma, temperature)
            z = prior.sample(eps_z[group])
            zs.append(z)
            log_p_z.append(prior.log_prob(z).flatten(1).sum(1))
            return z

        logits = self._top_down(batch, latent)
        return Decoded(logits, zs, torch.stack(log_p_z).sum(0))

    def pixels(self, logits: Tensor) -> PixelDistribution:
        """The distribution over images with parameters `logits`."""
        logits = at_least_float32(logits)
        if self.config.likelihood == "gaussian":
            return GaussianPixels(logits)
        if self.config.likelihood == "bernoulli":
            return BernoulliPixels(logits, self.config.uncounted_border)
        return LogisticMixturePixels(logits, self.config.num_mixture_dec, self.config.num_x_bits)

    def _bottom_up(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[EncoderCombiner]]:
        """Encode: the top feature, then the stored feature and combiner of each lower group, in decoding order."""
        s = self.stem(2 * x - 1)
        for cell in self.pre_process:
            s = cell(s)
        stored: list[Tensor] = []
        combiners: list[EncoderCombiner] = []
        for cell in self.enc_tower:
            if isinstance(cell, EncoderCombiner):
                stored.append(s)
                combiners.append(cell)
            else:
                s = cell(s)
        return self.enc0(s), stored[::-1], combiners[::-1]

    def elbo(
        self,
        x: Tensor,
        eps_q: Sequence[Tensor] | None = None,
        *,
        log_sigma_floor: float | None = VAEBM_LOG_SIGMA_FLOOR,
    ) -> Elbo:
        """Encode and decode images x [N, C, H, W] in [0, 1], already quantised to `num_x_bits`.

        The range is not checked, because that would synchronise with the device. Raises ValueError for another shape
        or an integer dtype.
        `eps_q` is the posterior's noise, one [N, L, H, W] per group; None draws it from torch's global generator.
        KL_g is log q - log p at the sample with flows, otherwise the closed form. `log_sigma_floor` applies to Gaussian
        pixels: -2 (VAEBM) by default, None for NVAE's training loss.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            taken = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x has shape {list(x.shape)}; this NVAE takes [N, {taken}].")
        if not x.is_floating_point():
            raise ValueError(f"x is {x.dtype}; this NVAE takes floating-point images in [0, 1], such as uint8 / 255.")
        if eps_q is None:
            eps_q = [torch.randn(x.shape[0], *shape, dtype=x.dtype, device=x.device) for shape in self.latent_shapes]
        noise = eps_q
        self.check_noise(noise)
        top, stored, combiners = self._bottom_up(x)
        log_q: list[Tensor] = []
        log_p: list[Tensor] = []
        kls: list[Tensor] = []  # [N, L, H, W] per group

        def latent(group: int, feature: Tensor | None) -> Tensor:
            encoded = top if feature is None else combiners[group - 1](stored[group - 1], feature)
            mu_q, log_sigma_q = self.enc_sampler[group](encoded).chunk(2, dim=1)
            mu_p, log_sigma_p = self._prior_parameters(group, feature, mu_q)
            if self.config.res_dist:
                mu_q, log_sigma_q = mu_p + mu_q, log_sigma_p + log_sigma_q
            prior, posterior = Normal.from_raw(mu_p, log_sigma_p), Normal.from_raw(mu_q, log_sigma_q)
            z = posterior.sample(noise[group])
            log_q_z = posterior.log_prob(z)
            flows = self.nf_cells[group * self.config.num_nf : (group + 1) * self.config.num_nf]
            for flow in flows:
                z = flow(z)
            log_p_z = prior.log_prob(z)
            log_q.append(log_q_z.flatten(1).sum(1))
            log_p.append(log_p_z.flatten(1).sum(1))
            kls.append(log_q_z - log_p_z if len(flows) else posterior.kl(prior))
            return z

        logits = self._top_down(x.shape[0], latent)
        pixels = self.pixels(logits)
        log_p_x = pixels.log_prob(x, log_sigma_floor) if isinstance(pixels, GaussianPixels) else pixels.log_prob(x)
        return Elbo(
            logits=logits,
            log_q=torch.stack(log_q).sum(0),
            log_p=torch.stack(log_p).sum(0),
            kl=torch.stack([kl.flatten(1).sum(1) for kl in kls], dim=1),
            kl_diag=torch.stack([kl.sum(dim=(2, 3)).mean(0) for kl in kls]),
            reconstruction_loss=-log_p_x,
        )

    def log_importance_weights(self, x: Tensor, eps_q: Sequence[Sequence[Tensor]]) -> Tensor:
        """log p(x, z_k) - log q(z_k|x) in nats, [K, N]; one noise set per sample k; x and noise as in `elbo`.

        The mean over k estimates the ELBO. Gaussian pixels are used without VAEBM's floor.
        """
        log_weights = []
        for noise in eps_q:
            elbo = self.elbo(x, noise, log_sigma_floor=None)
            log_weights.append(-elbo.reconstruction_loss - elbo.log_q + elbo.log_p)
        return torch.stack(log_weights)

    def importance_weighted_bound(self, x: Tensor, eps_q: Sequence[Sequence[Tensor]]) -> Tensor:
        """Per image logsumexp_k(log p(x, z_k) - log q(z_k|x)) - log K in nats, [N]; arguments as above.

        Burda et al., arXiv:1509.00519, equation 8.
        """
        return torch.logsumexp(self.log_importance_weights(x, eps_q), dim=0) - math.log(len(eps_q))

    def initialize_from_data(self, x: Tensor, eps_q: Sequence[Tensor] | None = None) -> None:
        """Data-dependent initialisation of the `res_elu` cells of an untrained network; arguments as in `elbo`."""
        cells = [module for module in self.modules() if isinstance(module, ActivatedConv)]
        convs = [cell.conv_0 for cell in cells if cell.primitive == "res_elu"]
        if convs:
            initialize_from_data(convs, lambda: self.elbo(x, eps_q))
