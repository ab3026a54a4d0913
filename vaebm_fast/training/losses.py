"""Training scalars: KL annealing and balancing, regulariser weights, learning rate, finiteness check.

Pure functions of steps and tensors. Source: NVAE (arXiv:2007.03898), section 3.3 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vaebm_fast.config import VAETraining
from vaebm_fast.models.nvae import Elbo
from vaebm_fast.runtime.errors import NonFiniteError


def kl_coeff(step: int, total_steps: int, anneal_portion: float, const_portion: float, const_coeff: float) -> float:
    """max(min((step - const_portion T) / (anneal_portion T), 1), const_coeff)."""
    ramp = (step - const_portion * total_steps) / (anneal_portion * total_steps)
    return max(min(ramp, 1.0), const_coeff)


def kl_alpha(groups_per_scale: Sequence[int]) -> Tensor:
    """Balancing weights [G], top first: (2^i)^2 / (groups of scale i), i = 0 at the top, divided by their minimum.

    `groups_per_scale` has the highest resolution first, as in `NVAEConfig.groups_per_scale`.
    """
    weights: list[float] = []
    for scale, groups in enumerate(reversed(groups_per_scale)):
        weights += [4.0**scale / groups] * groups
    alpha = torch.tensor(weights, dtype=torch.float32, device="cpu")
    return alpha / alpha.min()


def kl_balance(kl: Tensor, alpha: Tensor) -> Tensor:
    """Detached per-group factors c [G] with mean 1: c_g ~ (mean_n |KL_g| + 0.01) / alpha_g; `kl` is [N, G]."""
    c = (kl.detach().abs().mean(dim=0) + 0.01) / alpha
    return c / c.mean()


def balanced_kl(kl: Tensor, coeff: float, alpha: Tensor) -> Tensor:
    """coeff * sum_g c_g KL_g per image, [N]: balanced while coeff < 1; plain sum afterwards."""
    if coeff < 1.0:
        return coeff * (kl_balance(kl, alpha) * kl).sum(1)
    return coeff * kl.sum(1)


def regulariser_coeff(kl_coefficient: float, training: VAETraining) -> float:
    """Weight of the spectral and BN regularisers: constant, or annealed geometrically with the KL coefficient."""
    final = training.weight_decay_norm
    if not training.weight_decay_norm_anneal:
        return final
    return math.exp((1 - kl_coefficient) * math.log(training.weight_decay_norm_init) + kl_coefficient * math.log(final))


def batchnorm_loss(module: nn.Module) -> Tensor:
    """Sum of max |gamma| over batch normalisation layers."""
    gammas = [m.weight for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    if not gammas:
        return next(module.parameters()).new_zeros(())
    return torch.stack([gamma.abs().max() for gamma in gammas]).sum()


def learning_rate(step: int, total_steps: int, steps_per_epoch: int, training: VAETraining) -> float:
    """Linear warm-up over `warmup_epochs`, then cosine decay from `learning_rate` to `learning_rate_min`."""
    warmup = min(training.warmup_epochs * steps_per_epoch, total_steps)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    span = training.learning_rate - training.learning_rate_min
    return training.learning_rate_min + span * 0.5 * (1 + math.cos(math.pi * progress))


def reconstruction_and_kl(elbo: Elbo, coeff: float, alpha: Tensor) -> Tensor:
    """NVAE's loss without regularisers: mean over images of reconstruction + balanced KL, in nats."""
    return (elbo.reconstruction_loss + balanced_kl(elbo.kl, coeff, alpha)).mean()


@torch.no_grad()
def weight_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all parameters; non-finite if any parameter is."""
    return torch.nn.utils.get_total_norm([parameter.detach() for parameter in module.parameters()])


def finite(scalars: Mapping[str, Tensor | float], done: int) -> dict[str, float]:
    """The scalars after `done` steps as floats; raises FloatingPointError naming the first non-finite one."""
    values = {name: float(value) for name, value in scalars.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteError(f"{name} is {value} at step {done}; lower the learning rate.")
    return values
