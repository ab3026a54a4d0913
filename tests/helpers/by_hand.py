"""The regularisers of both training stages and their optimisers, written out one parameter at a time in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vaebm_fast.training.energy import EnergyUpdate

Vectors = dict[str, dict[str, Tensor]]


def effective_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weight that each convolution applies, by the convolution's name."""
    weights = {}
    for name, conv in module.named_modules():
        if not isinstance(conv, nn.Conv2d):
            continue
        weights[name] = conv.weight
        if hasattr(conv, "log_weight_norm"):
            weight = conv.weight if conv.mask is None else conv.weight * conv.mask
            norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
            weights[name] = conv.log_weight_norm.exp() * weight / (norm + 1e-5)
    return weights


def start_vectors(module: nn.Module, seed: int = 0) -> Vectors:
    """Unit vectors u [Cout] and v [rest] per convolution, as `SpectralRegulariser.load_state_dict` takes them."""
    generator = torch.Generator().manual_seed(seed)

    def unit(size: int) -> Tensor:
        vector = torch.randn(size, generator=generator)
        return vector / vector.norm()

    weights = {name: weight.flatten(1) for name, weight in effective_weights(module).items()}
    return {
        "u": {name: unit(weight.shape[0]) for name, weight in weights.items()},
        "v": {name: unit(weight.shape[1]) for name, weight in weights.items()},
    }


def spectral_sum(module: nn.Module, vectors: Vectors) -> Tensor:
    """Sum of u'Wv after four power steps per convolution; `vectors` are moved on."""
    total = torch.zeros(())
    for name, weight in effective_weights(module).items():
        matrix, u, v = weight.flatten(1), vectors["u"][name], vectors["v"][name]
        with torch.no_grad():
            for _ in range(4):
                v = matrix.T @ u
                v = v / v.norm().clamp(min=1e-3)
                u = matrix @ v
                u = u / u.norm().clamp(min=1e-3)
        vectors["u"][name], vectors["v"][name] = u, v
        total = total + u @ matrix @ v
    return total


def batchnorm_sum(module: nn.Module) -> Tensor:
    """Sum of max |gamma| over batch normalisations."""
    total = torch.zeros(())
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            total = total + layer.weight.abs().amax()
    return total


class Adamax:
    """arXiv:1412.6980, algorithm 2, with betas (0.9, 0.999), eps inside the maximum and L2 weight decay."""

    def __init__(self, module: nn.Module, *, eps: float, weight_decay: float) -> None:
        self.parameters, self.eps, self.weight_decay = list(module.parameters()), eps, weight_decay
        self.m, self.u = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.t = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.t += 1
        for n, p in enumerate(self.parameters):
            assert p.grad is not None
            g = p.grad + self.weight_decay * p
            self.m[n] = 0.9 * self.m[n] + 0.1 * g
            self.u[n] = torch.maximum(0.999 * self.u[n], g.abs() + self.eps)
            p -= lr / (1 - 0.9**self.t) * self.m[n] / self.u[n]


class ClippedAdam:
    """Adam with L2 weight decay; before that, from the second step on, gradients within 3 sqrt(v / (1 - b2^t)) + 0.1.

    `clipped`: how many entries of each step's gradient were cut.
    """

    def __init__(self, module: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        self.parameters, self.lr, self.betas, self.weight_decay = list(module.parameters()), lr, betas, weight_decay
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))
        self.clipped: list[int] = []

    @torch.no_grad()
    def step(self) -> None:
        (b1, b2), t = self.betas, len(self.clipped)
        self.clipped.append(0)
        for n, p in enumerate(self.parameters):
            assert p.grad is not None
            g = p.grad
            if t > 0:
                bound = 3 * (self.v[n] / (1 - b2**t)).sqrt() + 0.1
                self.clipped[-1] += int((g.abs() > bound).sum())
                g = torch.minimum(torch.maximum(g, -bound), bound)
            g = g + self.weight_decay * p
            self.m[n] = b1 * self.m[n] + (1 - b1) * g
            self.v[n] = b2 * self.v[n] + (1 - b2) * g * g
            p -= self.lr * (self.m[n] / (1 - b1 ** (t + 1))) / ((self.v[n] / (1 - b2 ** (t + 1))).sqrt() + 1e-8)


def seen_by(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """The first argument of each call of `module` during `run`."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        run()
    finally:
        hook.remove()
    return seen


class _Seen:
    """Stands for a network and keeps its inputs, without a hook, which freezing refuses."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Any:
        self.inputs.append(x)
        return self._network(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def seen_by_energy_update(update: EnergyUpdate, run: Callable[[], object]) -> list[Tensor]:
    """The images of each call of the energy network by its update during `run`."""
    network = update.energy
    seen = _Seen(network)
    update.energy = seen  # type: ignore[assignment]
    try:
        run()
    finally:
        update.energy = network
    return seen.inputs


def largest_change_error(before: nn.Module, after: nn.Module, expected: nn.Module) -> float:
    """The largest |after - expected| / |expected - before| in norm over parameters and floating-point buffers."""

    def state(module: nn.Module) -> dict[str, Tensor]:
        named = module.state_dict().items()
        return {name: tensor.double() for name, tensor in named if tensor.is_floating_point()}

    old, new, wanted = state(before), state(after), state(expected)
    errors = {name: float((new[name] - wanted[name]).norm() / (wanted[name] - old[name]).norm()) for name in old}
    return max(errors.values())
