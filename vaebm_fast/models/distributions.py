"""Normal latents and the three pixel distributions: Gaussian, discretised logistic mixture, Bernoulli.

Methods take and return images in [0, 1]; `mean` and `sigma` are in the units that each class states. Randomness is
always passed in. Sources: NVAE (arXiv:2007.03898), VAEBM (arXiv:2010.00654), PixelCNN++ (arXiv:1701.05517) for the
mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA_MIN = 1e-2
VAEBM_LOG_SIGMA_FLOOR = -2.0
LOG_2PI = math.log(2 * math.pi)


def at_least_float32(x: Tensor) -> Tensor:
    """x, converted to float32 if it is half precision, where log densities cancel too much (mixed precision)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def soft_clamp5(x: Tensor) -> Tensor:
    """5 tanh(x / 5): the identity near 0, bounded by 5."""
    return 5.0 * torch.tanh(x / 5.0)


@dataclass(frozen=True)
class Normal:
    """Independent normals with mean `mu` and standard deviation `sigma`."""

    mu: Tensor
    sigma: Tensor

    @classmethod
    def from_raw(cls, mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> Normal:
        """From unconstrained parameters: mu = 5 tanh(mu/5), sigma = (exp(5 tanh(log_sigma/5)) + 0.01) * temperature."""
        mu, log_sigma = at_least_float32(mu), at_least_float32(log_sigma)
        sigma = torch.exp(soft_clamp5(log_sigma)) + SIGMA_MIN
        return cls(soft_clamp5(mu), sigma if temperature == 1.0 else sigma * temperature)

    def sample(self, eps: Tensor) -> Tensor:
        """mu + sigma * eps."""
        return self.mu + self.sigma * eps

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, element by element, in nats."""
        normalised = (x - self.mu) / self.sigma
        return -0.5 * (normalised * normalised + LOG_2PI) - torch.log(self.sigma)

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other), element by element, in nats."""
        shift = (self.mu - other.mu) / other.sigma
        ratio = self.sigma / other.sigma
        return 0.5 * (shift * shift + ratio * ratio) - 0.5 - torch.log(ratio)


def _sum_per_image(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


class GaussianPixels:
    """Normal pixels; `mean` and `sigma` in [-1, 1] units. Channels of `logits`: C means, then C log-sigmas."""

    def __init__(self, logits: Tensor) -> None:
        mu, self._raw_log_sigma = logits.chunk(2, dim=1)
        normal = Normal.from_raw(mu, self._raw_log_sigma)
        self.mean, self.sigma = normal.mu, normal.sigma

    def sample(self, eps_x: Tensor) -> Tensor:
        """clamp(mu + sigma * eps_x, -1, 1) / 2 + 1/2; `eps_x` [N, C, H, W], standard normal."""
        return torch.clamp(self.mean + self.sigma * eps_x, -1.0, 1.0) / 2 + 0.5

    def log_prob(self, x: Tensor, log_sigma_floor: float | None = VAEBM_LOG_SIGMA_FLOOR) -> Tensor:
        """log p(x|z) per image, [N], in nats and [-1, 1] units.

        VAEBM floors log sigma at -2 before the exponential; `log_sigma_floor=None` gives NVAE's likelihood.
        """
        log_sigma = soft_clamp5(self._raw_log_sigma)
        if log_sigma_floor is not None:
            log_sigma = log_sigma.clamp(min=log_sigma_floor)
        return _sum_per_image(Normal(self.mean, torch.exp(log_sigma) + SIGMA_MIN).log_prob(2 * x - 1))

    def mean_image(self) -> Tensor:
        """The mean as an image in [0, 1]: what VAEBM reports as the result of a chain."""
        return self.mean.clamp(-1, 1) / 2 + 0.5


class LogisticMixturePixels:
    """Discretised mixture of M logistics; green depends on red, blue on both.

    Channels of `logits`: M mixture logits, then per colour M means, M log-scales, M coefficients. [-1, 1] units.
    """

    LOG_SCALE_MIN = -7.0

    def __init__(self, logits: Tensor, num_mixtures: int, num_bits: int) -> None:
        mixture, rest = logits.split([num_mixtures, 9 * num_mixtures], dim=1)
        means, log_scales, coefficients = rest.unflatten(1, (3, 3, num_mixtures)).unbind(2)  # [N, 3, M, H, W] each
        self._mixture_logits = mixture
        self._means = means
        self._log_scales = log_scales.clamp(min=self.LOG_SCALE_MIN)
        self._k_red, self._k_green, self._k_blue = torch.tanh(coefficients).unbind(1)
        self._half_bin = 1.0 / (2**num_bits - 1)

    @property
    def mean(self) -> Tensor:
        """Mean of the (unclamped, continuous) mixture in [-1, 1] units, [N, 3, H, W]."""
        red = self._means[:, 0]
        green = self._means[:, 1] + self._k_red * red
        blue = self._means[:, 2] + self._k_green * red + self._k_blue * green
        weights = torch.softmax(self._mixture_logits, dim=1)[:, None]
        return (weights * torch.stack([red, green, blue], dim=1)).sum(2)

    @property
    def sigma(self) -> Tensor:
        """Raises NotImplementedError: the coupled mixture has no single standard deviation."""
        raise NotImplementedError("A logistic mixture has no single sigma; sample it instead.")

    def sample(self, u_mixture: Tensor, u_logistic: Tensor) -> Tensor:
        """An image in [0, 1] from uniforms in [1e-5, 1 - 1e-5]: `u_mixture` [N, M, H, W], `u_logistic` [N, 3, H, W]."""
        gumbel = -torch.log(-torch.log(u_mixture))
        index = (self._mixture_logits + gumbel).argmax(dim=1, keepdim=True)  # [N, 1, H, W]

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, index).squeeze(1)

        noise = torch.log(u_logistic) - torch.log(1 - u_logistic)
        draws = [chosen(self._means[:, c]) + torch.exp(chosen(self._log_scales[:, c])) * noise[:, c] for c in range(3)]
        red = draws[0].clamp(-1, 1)
        green = (draws[1] + chosen(self._k_red) * red).clamp(-1, 1)
        blue = (draws[2] + chosen(self._k_green) * red + chosen(self._k_blue) * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x|z) of the 2^bits grey levels, summed over pixels, per image, [N], in nats."""
        pixel = (2 * x - 1)[:, :, None]  # [N, 3, 1, H, W]
        red, green = pixel[:, 0], pixel[:, 1]
        means = torch.stack(
            [
                self._means[:, 0],
                self._means[:, 1] + self._k_red * red,
                self._means[:, 2] + self._k_green * red + self._k_blue * green,
            ],
            dim=1,
        )
        log_bins = self._log_bin_mass(pixel, means)
        return _sum_per_image(torch.logsumexp(log_bins.sum(1) + F.log_softmax(self._mixture_logits, dim=1), dim=1))

    def _log_bin_mass(self, pixel: Tensor, means: Tensor) -> Tensor:
        """Log mass of the grey level around `pixel` under each logistic, [N, 3, M, H, W]; open bins at both ends."""
        inverse_scale = torch.exp(-self._log_scales)
        centred = pixel - means
        upper = inverse_scale * (centred + self._half_bin)
        lower = inverse_scale * (centred - self._half_bin)
        middle = inverse_scale * centred
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # Nearly empty bins: density at the centre times the bin's width, which keeps a gradient.
        log_density = middle - self._log_scales - 2 * F.softplus(middle) + math.log(2 * self._half_bin)
        inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), log_density)
        inside_or_top = torch.where(pixel > 0.99, -F.softplus(lower), inside)
        return torch.where(pixel < -0.999, F.logsigmoid(upper), inside_or_top)

    def mean_image(self) -> Tensor:
        """The mean as an image in [0, 1]."""
        return self.mean.clamp(-1, 1) / 2 + 0.5


class BernoulliPixels:
    """Independent binary pixels; `mean` is the probability of 1, in [0, 1]. `border` pixels per side are padding."""

    def __init__(self, logits: Tensor, border: int = 0) -> None:
        self._logits = logits
        self._border = border
        self.mean = torch.sigmoid(logits)

    @property
    def sigma(self) -> Tensor:
        """sqrt(p (1 - p)), in [0, 1] units."""
        return torch.sqrt(self.mean * (1 - self.mean))

    def sample(self, u: Tensor) -> Tensor:
        """1 where `u` < p, else 0; `u` [N, C, H, W] uniform in (0, 1)."""
        return (u < self.mean).to(u.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x|z) per image, [N], in nats, excluding the border."""
        inner = slice(self._border, self._logits.shape[-1] - self._border)
        logits, target = self._logits[..., inner, inner], x[..., inner, inner]
        return -_sum_per_image(F.binary_cross_entropy_with_logits(logits, target, reduction="none"))

    def mean_image(self) -> Tensor:
        """The probabilities as an image in [0, 1]."""
        return self.mean


PixelDistribution = GaussianPixels | LogisticMixturePixels | BernoulliPixels
