"""Langevin chains over any potential, from counter-based noise: image i is a function of seed i alone.

`langevin_chain` is the algorithm on a flat [N, D] state; `LangevinSampler` binds it to a model's noise layout, to seeds
and to images. Neither knows what network is behind the potential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from vaebm_fast.config import POTENTIALS, Potential
from vaebm_fast.noise import NoiseLayout, Stream, draw_tensor, normal, seed_tensor
from vaebm_fast.ops.langevin_update import langevin_update

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


class Update(Protocol):
    """A step of the chain in place: `langevin_update` bound to seeds, stream and step size, or one like it.

    draw: int64 [], the number k of the step. nonfinite_at: int64 [N], where -1 is to become k once a row of eps [N, D]
    is not finite.
    """

    def __call__(self, eps: Tensor, gradient: Tensor, *, draw: Tensor, nonfinite_at: Tensor) -> None: ...


def langevin_chain(
    energy_and_grad: EnergyAndGrad,
    start: Tensor,
    update: Update,
    *,
    steps: int,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `steps` steps from `start` [N, D]; returns the final state and U before each step, [T, N].

    `start` stays as it is. One other tensor holds the state, and each step writes over it: U must not be a view of it,
    and `on_step(k, eps)`, which sees it after step k = 1, 2, ..., clones what it keeps.
    The host waits once, at the end. Raises NonFiniteChainError when a state stopped being finite.
    """
    eps = start.detach().clone(memory_format=torch.contiguous_format)
    draw = draw_tensor(0, eps.device)
    nonfinite_at = torch.full((eps.shape[0],), -1, dtype=torch.int64, device=eps.device)
    potentials = []
    for k in range(1, steps + 1):
        u, gradient = energy_and_grad(eps)
        with torch.no_grad():
            update(eps, gradient, draw=draw.add_(1), nonfinite_at=nonfinite_at)
        potentials.append(u)
        if on_step is not None:
            on_step(k, eps)
    _raise_if_not_finite(nonfinite_at)
    return eps, torch.stack(potentials) if potentials else eps.new_empty(0, eps.shape[0])


def _raise_if_not_finite(nonfinite_at: Tensor) -> None:
    """`nonfinite_at` [N]: the step after which chain n first was not finite, -1 where it always was."""
    steps = nonfinite_at.cpu()
    images = (steps >= 0).nonzero().flatten()
    if len(images) > 0:
        raise NonFiniteChainError(images.tolist(), step=int(steps[images].min()))


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
        self._has_prior = potential == "paper"
        self.temperature = temperature
        self.device = torch.device(device)
        self.layout = NoiseLayout(self.model.latent_shapes, self.model.image_shape)

    def _energy_and_grad(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """U, and its gradient without the prior's part, which `langevin_update` adds on its way."""
        eps_z, eps_x = self.layout.split(eps)
        potential = "energy" if self._has_prior else self.potential
        u, gradients = self.model.energy_and_grad(eps_z, eps_x, potential, self.temperature)
        if self._has_prior:
            u = u + torch.linalg.vector_norm(eps, dim=1).square() / 2
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

        `on_step` as in `langevin_chain`: it clones what it keeps.
        Raises ValueError when `start` has another shape, NonFiniteChainError as `langevin_chain` does.
        """
        if self._followed is not None:
            self._followed.refresh()
        keys = self._keys(seeds)
        needed = (keys.shape[0], self.layout.dim)
        if start is not None and tuple(start.shape) != needed:
            raise ValueError(f"start has shape {tuple(start.shape)}; {needed[0]} seeds of this model need {needed}.")

        start = self.start(keys, stream) if start is None else start
        update = partial(
            langevin_update, seeds=keys, stream=int(stream), step_size=self.step_size, prior=self._has_prior
        )
        eps, potentials = langevin_chain(self._energy_and_grad, start, update, steps=self.steps, on_step=on_step)
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
