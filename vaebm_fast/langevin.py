"""Langevin chains over any potential, from counter-based noise: image i is a function of seed i alone.

`langevin_chain` is the algorithm on a flat [N, D] state; `LangevinSampler` binds it to a model's noise layout, to seeds
and to images. Neither knows what network is behind the potential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vaebm_fast.config import POTENTIALS, Potential
from vaebm_fast.noise import NoiseLayout, Stream, normal, seed_tensor

EnergyAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class ChainModel(Protocol):
    """What a chain needs of a model; `VAEBM` and its frozen form both have it."""

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def energy_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]: ...

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor: ...


class FrozenModel(ChainModel, Protocol):
    """A compiled form that follows its live model."""

    def refresh(self) -> None: ...


@runtime_checkable
class LiveModel(Protocol):
    """A model that has a compiled form, as `vaebm_fast.VAEBM` has."""

    def freeze(self) -> FrozenModel: ...


class NonFiniteChainError(RuntimeError):
    """Some chains left the finite numbers; `images` holds their positions in the batch."""

    def __init__(self, images: list[int], step: int) -> None:
        self.images = images
        super().__init__(
            f"{len(images)} chains became non-finite, the first at step {step} (positions {images[:8]}); "
            "use a smaller step size, or check the energy network's weights."
        )


def langevin_step(eps: Tensor, gradient: Tensor, noise: Tensor, step_size: float) -> Tensor:
    """eps - (h/2) dU/deps + sqrt(h) noise, elementwise (VAEBM, arXiv:2010.00654, equation 3)."""
    return eps - (step_size / 2) * gradient + math.sqrt(step_size) * noise


def langevin_chain(
    energy_and_grad: EnergyAndGrad,
    eps: Tensor,
    noise: Callable[[int], Tensor],
    *,
    steps: int,
    step_size: float,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `steps` Langevin steps from eps [N, D]; returns the final eps and U before each step, [T, N].

    `noise(k)` [N, D] is the noise of step k = 1, 2, ...; `on_step(k, eps)` sees the state after step k. The host waits
    once, at the end. Raises NonFiniteChainError when a state stopped being finite.
    """
    potentials, finite = [], []
    for k in range(1, steps + 1):
        u, gradient = energy_and_grad(eps)
        eps = langevin_step(eps, gradient, noise(k), step_size)
        potentials.append(u)
        finite.append(torch.isfinite(eps).all(dim=1))
        if on_step is not None:
            on_step(k, eps)
    if not potentials:
        return eps, eps.new_empty(0, eps.shape[0])
    _raise_if_not_finite(torch.stack(finite))
    return eps, torch.stack(potentials)


def _raise_if_not_finite(finite: Tensor) -> None:
    """`finite` [T, N]: was chain n finite after step t?"""
    if not bool(finite.all()):
        broken = ~finite.cpu()
        images = broken.any(dim=0).nonzero().flatten().tolist()
        raise NonFiniteChainError(images, step=int(broken.any(dim=1).nonzero()[0]) + 1)


@dataclass(frozen=True)
class Chains:
    """Finished chains: the state eps [N, D], U before each step [T, N], the mean images [N, C, H, W]."""

    eps: Tensor
    potentials: Tensor
    images: Tensor


class LangevinSampler:
    """Samples a model by `steps` Langevin steps of size h = `step_size`; `steps=0` gives the NVAE's own samples.

    A live model is frozen, in float32, and folded anew before a run when its weights changed meanwhile. For another
    precision or backend give it frozen: `model.freeze(...)`, whose `refresh` is then the caller's.
    """

    def __init__(
        self,
        model: ChainModel | LiveModel,
        *,
        steps: int,
        step_size: float,
        potential: Potential = "official",
        temperature: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if steps < 0:
            raise ValueError(f"steps is {steps}; a chain has 0 steps or more.")
        if not (step_size > 0 and math.isfinite(step_size)):
            raise ValueError(f"step_size is {step_size}; it must be a positive number.")
        if potential not in POTENTIALS:
            raise ValueError(f"Potential {potential!r} is not known; it is one of {', '.join(POTENTIALS)}.")
        self._followed: FrozenModel | None = None
        if isinstance(model, LiveModel):
            model = self._followed = model.freeze()
        self.model: ChainModel = model
        self.steps = steps
        self.step_size = step_size
        self.potential: Potential = potential
        self.temperature = temperature
        self.device = torch.device(device)
        self.layout = NoiseLayout(self.model.latent_shapes, self.model.image_shape)

    def _energy_and_grad(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        eps_z, eps_x = self.layout.split(eps)
        u, gradients = self.model.energy_and_grad(eps_z, eps_x, self.potential, self.temperature)
        return u, self.layout.join(gradients[:-1], gradients[-1])

    def start(self, seeds: Iterable[int] | Tensor, stream: Stream = Stream.CHAIN) -> Tensor:
        """The seeds' own starting states, N(0, I), [N, D]: draw 0 of their noise."""
        return normal(self._keys(seeds), 0, stream, self.layout.dim)

    def _keys(self, seeds: Iterable[int] | Tensor) -> Tensor:
        return seeds if isinstance(seeds, Tensor) else seed_tensor(seeds, self.device)

    def run(
        self,
        seeds: Iterable[int] | Tensor,
        *,
        start: Tensor | None = None,
        stream: Stream = Stream.CHAIN,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Chains:
        """One batch of chains from `start` [N, D], or from `self.start`; seeds as numbers or as `seed_tensor`'s [N].

        Raises ValueError when `start` has another shape, NonFiniteChainError as `langevin_chain` does.
        """
        if self._followed is not None:
            self._followed.refresh()
        keys = self._keys(seeds)
        needed = (keys.shape[0], self.layout.dim)
        if start is not None and tuple(start.shape) != needed:
            raise ValueError(f"start has shape {tuple(start.shape)}; {needed[0]} seeds of this model need {needed}.")

        def noise(k: int) -> Tensor:
            return normal(keys, k, stream, self.layout.dim)

        eps = self.start(keys, stream) if start is None else start
        eps, potentials = langevin_chain(
            self._energy_and_grad, eps, noise, steps=self.steps, step_size=self.step_size, on_step=on_step
        )
        with torch.no_grad():
            images = self.model.mean_image(self.layout.split(eps)[0], self.temperature)
        return Chains(eps, potentials, images)

    def sample(self, seeds: Iterable[int], batch_size: int = 64) -> Tensor:
        """Images uint8 [N, H, W, C], one per seed; image i depends on seed i alone, whatever the batch."""
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        everything = list(seeds)
        batches = [everything[at : at + batch_size] for at in range(0, len(everything), batch_size)]
        channels, height, width = self.model.image_shape
        images = [to_uint8(self.run(batch).images).cpu() for batch in batches]
        return torch.cat(images) if images else torch.empty(0, height, width, channels, dtype=torch.uint8)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [0, 1], [N, C, H, W], as uint8 [N, H, W, C]: round(255 x), never rescaled per image."""
    return torch.round(x.detach().clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
