"""Langevin chains over any potential, from counter-based noise: image i depends only on seed i.

`langevin_chain` is the algorithm on a flat [N, D] state; `LangevinSampler` binds it to a model's noise layout, to seeds
and to images. Neither depends on the networks behind the potential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol, SupportsFloat, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from vaebm_fast import reference
from vaebm_fast.chain.graphs import Graphs
from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import ChainConfig, NoiseLayout, Potential, plain, whole_number
from vaebm_fast.ops._backend import GPU_BACKENDS, Backend
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.runtime.errors import NonFiniteError, UserError

OnNonFinite = Literal["raise", "redo"]
ON_NON_FINITE: tuple[OnNonFinite, ...] = get_args(OnNonFinite)
# An explicit step is unstable if h times the curvature of U exceeds 4. A tenth of h tolerates ten times the curvature,
# and its noise sqrt(h) is a third as large; a much smaller step would leave the chain near its start.
REDO_STEP_SCALE = 0.1

HALVES = (torch.bfloat16, torch.float16)

PotentialAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


@runtime_checkable
class Decoder(Protocol):
    """The interface that a chain of 0 steps needs."""

    @property
    def device(self) -> torch.device: ...

    @property
    def noise_layout(self) -> NoiseLayout: ...

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor: ...


@runtime_checkable
class ChainModel(Decoder, Protocol):
    """The interface that a chain needs; `VAEBM` and its frozen form implement it."""

    def potential_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]: ...


@runtime_checkable
class FrozenModel(Decoder, Protocol):
    """A compiled form of a live model, with weights at fixed addresses."""

    def refresh(self) -> None: ...

    def require_fresh(self) -> None: ...


@runtime_checkable
class LiveModel(Protocol):
    """A model with a compiled form, such as `VAEBM`."""

    def freeze(self) -> FrozenModel: ...


class NonFiniteChainError(NonFiniteError, RuntimeError):
    """Some chains are not finite: `images` are their positions among those requested, `seeds` their seeds."""

    def __init__(self, images: list[int], seeds: list[int], circumstance: str) -> None:
        self.images, self.seeds = images, seeds
        super().__init__(
            f"{len(images)} chains became non-finite{circumstance} (seeds {seeds[:8]}); "
            "use a smaller step size, or check the energy network's weights."
        )


class Update(Protocol):
    """One in-place step of the chain: `langevin_update` bound to seeds and stream, or an equivalent.

    draw: int64 [], the step number k. nonfinite_at: int64 [N]; -1 must become k when a row of eps [N, D] is not finite.
    step_size: h of this step.
    """

    def __call__(
        self, eps: Tensor, gradient: Tensor, *, draw: Tensor, nonfinite_at: Tensor, step_size: float
    ) -> None: ...


class Course(NamedTuple):
    """The result of a chain: the final eps [N, D], U before each step [T, N], and nonfinite_at, int64 [N].

    nonfinite_at: the first step after which chain n is not finite, -1 if it stayed finite.
    """

    eps: Tensor
    potentials: Tensor
    nonfinite_at: Tensor


def langevin_chain(
    potential_and_grad: PotentialAndGrad,
    start: Tensor,
    update: Update,
    *,
    step_sizes: Sequence[float],
    before_step: Callable[[int, Tensor, Tensor], None] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Course:
    """Langevin steps of sizes h_1, h_2, ... from `start` [N, D], which is not modified.

    Each step overwrites one state tensor: U must not be a view of it, and `before_step(k, eps, gradient)` and
    `on_step(k, eps)`, called before and after step k = 1, 2, ..., must clone what they keep. No host sync;
    `Course.nonfinite_at` reports chains that failed. A CUDA graph may capture it: the step number is a tensor, each
    step size a constant of its launch.
    """
    eps = start.detach().clone(memory_format=torch.contiguous_format)
    draw = torch.zeros((), dtype=torch.int64, device=eps.device)
    nonfinite_at = torch.full((eps.shape[0],), -1, dtype=torch.int64, device=eps.device)
    potentials = []
    for k, step_size in enumerate(step_sizes, start=1):
        u, gradient = potential_and_grad(eps)
        if before_step is not None:
            before_step(k, eps, gradient)
        with torch.no_grad():
            update(eps, gradient, draw=draw.add_(1), nonfinite_at=nonfinite_at, step_size=step_size)
        potentials.append(u)
        if on_step is not None:
            on_step(k, eps)
    return Course(eps, torch.stack(potentials) if potentials else eps.new_empty(0, eps.shape[0]), nonfinite_at)


@dataclass(frozen=True)
class Trace:
    """Measurements before the T' steps 1, 1 + every, 1 + 2 every, ...

    steps: their numbers. potentials: U [T', N]. gradient_norms: |dU/deps| [T', N]. images: the mean images
    [T', N, C, H, W].
    """

    steps: list[int]
    potentials: Tensor
    gradient_norms: Tensor
    images: Tensor


@dataclass(frozen=True)
class Chains:
    """Finished chains: the state eps [N, D], U before each step [T, N], the mean images [N, C, H, W].

    redone: positions of chains that became non-finite and ran again. failed: those that became non-finite again; their
    images are NaN. trace: None unless requested.
    """

    eps: Tensor
    potentials: Tensor
    images: Tensor
    redone: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    trace: Trace | None = None


class _Plan(NamedTuple):
    """Settings that all chains of a batch share; part of a captured batch's key."""

    stream: int
    step_sizes: tuple[float, ...]
    trace_every: int | None


class _Outcome(NamedTuple):
    """A batch of chains as tensors: `Course`, the mean images, and the trace's norms and images (T' may be 0)."""

    eps: Tensor
    potentials: Tensor
    nonfinite_at: Tensor
    images: Tensor
    traced_norms: Tensor
    traced_images: Tensor

    def with_chains(self, positions: list[int], others: _Outcome) -> _Outcome:
        """These chains with those at `positions` replaced by `others`; images of non-finite ones become NaN."""
        at = torch.tensor(positions, device=self.eps.device)
        others = others._replace(images=others.images.where(others.nonfinite_at.view(-1, 1, 1, 1) < 0, math.nan))
        image_dims = (0, 1, 0, 0, 1, 1)  # [N, ...] or [T, N, ...]
        merged = [mine.index_copy(dim, at, new) for dim, mine, new in zip(image_dims, self, others, strict=True)]
        return _Outcome(*merged)


class LangevinSampler:
    """Samples a model by `steps` Langevin steps of size h = `step_size`; `steps=0` gives the NVAE's samples.

    step_size: one number, or a schedule with one h_k per step k. start_temperature: standard deviation of the start
    drawn from a seed. temperature: scales the latents' noise in the decoder. One chain per seed.
    A live model is frozen in float32; before each run, changed weights are folded again. For another dtype or backend
    pass `model.freeze(...)`; the caller then calls its `refresh`.
    freeze: False runs the live model's own `potential_and_grad` and `mean_image`, more slowly and uncaptured: for
    subclasses, hooks and other code that freezing refuses.
    capture: on CUDA, the second batch of the same size and settings is captured into a CUDA graph, and later ones are
    replays (`vaebm_fast.chain.graphs`). Other models need fixed weight addresses, or `capture=False`.
    """

    def __init__(
        self,
        model: Decoder | LiveModel,
        *,
        steps: int,
        step_size: SupportsFloat | Sequence[SupportsFloat] | Tensor,
        potential: Potential = "official",
        temperature: float = 1.0,
        start_temperature: float = 1.0,
        freeze: bool = True,
        capture: bool = True,
    ) -> None:
        chain = ChainConfig(steps, plain(step_size), potential, temperature, start_temperature)
        self.step_sizes = chain.step_sizes
        self._followed: FrozenModel | None = None
        runs_live = isinstance(model, LiveModel) and not freeze
        if isinstance(model, LiveModel) and freeze:
            model = self._followed = model.freeze()
        if not isinstance(model, Decoder):
            raise UserError(f"{type(model).__name__} cannot be sampled: give a VAEBM, or its frozen form.")
        if chain.steps > 0 and not isinstance(model, ChainModel):
            raise UserError(
                "Langevin steps need an energy network, and this model is an NVAE alone; use steps=0, or a VAEBM."
            )
        self.model: Decoder = model
        self.steps = chain.steps
        self.potential = chain.potential
        self._has_prior = chain.potential == "paper" and not runs_live
        self.temperature = chain.temperature
        self.start_temperature = chain.start_temperature
        self.device = self.model.device
        self.noise_layout = self.model.noise_layout
        on_gpu, pairs = self.device.type == "cuda", getattr(model, "backend", "auto")
        self._noise_backend: Backend = pairs if on_gpu and pairs in GPU_BACKENDS else "auto"  # the bits are the same
        self._graphs = Graphs() if capture and not runs_live else None

    def start(self, seeds: Iterable[int] | Tensor, stream: Stream = Stream.CHAIN) -> Tensor:
        """Starting states drawn from the seeds, N(0, start_temperature^2 I), [N, D]: draw 0 of their noise."""
        keys, dim = self._keys(seeds), self.noise_layout.dim
        return normal(keys, 0, stream, dim, backend=self._noise_backend).mul_(self.start_temperature)

    def _keys(self, seeds: Iterable[int] | Tensor) -> Tensor:
        if not isinstance(seeds, Tensor):
            return seed_tensor(seeds, self.device)
        if seeds.is_floating_point() or seeds.is_complex():
            raise UserError(f"Seeds are {seeds.dtype}; they must be whole numbers.")
        return seeds.to(torch.int64)

    def run(
        self,
        seeds: Iterable[int] | Tensor,
        *,
        start: Tensor | None = None,
        stream: Stream = Stream.CHAIN,
        nonfinite: OnNonFinite = "raise",
        trace_every: int | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Chains:
        """One batch of chains from `start` [N, D] (default: `self.start`); seeds: integers, or `seed_tensor`'s [N].

        nonfinite: "raise" raises NonFiniteChainError if a chain is not finite. "redo" reruns such chains once from
        their starts with step sizes scaled by REDO_STEP_SCALE and lists them in `Chains`.
        trace_every: record a trace every so many steps, from the first; each record costs a decoder pass. on_step: as
        in `langevin_chain`; not called for redone chains.
        Synchronises with the device once, at the end. Raises ValueError for invalid arguments.
        """
        if nonfinite not in ON_NON_FINITE:
            raise ValueError(f"nonfinite is {nonfinite!r}; it must be one of {', '.join(ON_NON_FINITE)}.")
        trace_every = None if trace_every is None else whole_number("trace_every", trace_every)
        if trace_every is not None and trace_every < 1:
            raise ValueError(f"trace_every is {trace_every}; it must be at least 1.")
        keys = self._keys(seeds)
        needed = (keys.shape[0], self.noise_layout.dim)
        if start is not None and tuple(start.shape) != needed:
            raise ValueError(f"start has shape {tuple(start.shape)}; {needed[0]} seeds of this model need {needed}.")

        start = self.start(keys, stream) if start is None else start
        plan = _Plan(int(stream), self.step_sizes, trace_every)
        outcome = self._run(keys, start, plan, on_step)
        redone, failed = _positions_not_finite(outcome.nonfinite_at), []
        if redone and nonfinite == "raise":
            first = int(outcome.nonfinite_at[redone].min())
            raise NonFiniteChainError(redone, _numbers(keys[redone]), f", the first at step {first}")
        if redone:
            smaller = plan._replace(step_sizes=tuple(REDO_STEP_SCALE * step_size for step_size in self.step_sizes))
            outcome = outcome.with_chains(redone, self._chains(keys[redone], start[redone], smaller))
            failed = _positions_not_finite(outcome.nonfinite_at)
        trace = None if trace_every is None else _trace_of(outcome, trace_every)
        return Chains(outcome.eps, outcome.potentials, outcome.images, redone, failed, trace)

    def _run(self, keys: Tensor, start: Tensor, plan: _Plan, on_step: Callable[[int, Tensor], None] | None) -> _Outcome:
        """`_chains` with fresh weights, captured if possible."""
        if self._followed is not None:
            self._followed.refresh()
        elif isinstance(self.model, FrozenModel):
            self.model.require_fresh()  # a replay does not check
        elif isinstance(self.model, nn.Module):
            _require_sampled_as_is(self.model)
        if self._graphs is None or on_step is not None:
            return self._chains(keys, start, plan, on_step)
        key = (plan, self.potential, self.temperature)
        return _Outcome(*self._graphs(partial(self._chains, plan=plan), (keys, start), key))

    def _chains(
        self, keys: Tensor, start: Tensor, plan: _Plan, on_step: Callable[[int, Tensor], None] | None = None
    ) -> _Outcome:
        """The chains of `keys`, finite or not; the caller's autocast does not reach them."""
        every = plan.trace_every
        norms: list[Tensor] = []
        images: list[Tensor] = []

        @torch.no_grad()
        def look(k: int, eps: Tensor, gradient: Tensor) -> None:
            if every is not None and (k - 1) % every == 0:
                norms.append(torch.linalg.vector_norm(gradient + eps if self._has_prior else gradient, dim=1))
                images.append(self._mean_images(eps))

        update = partial(
            langevin_update, seeds=keys, stream=plan.stream, prior=self._has_prior, backend=self._noise_backend
        )
        with without_autocast(self.device):
            course = langevin_chain(
                self._potential_and_grad, start, update, step_sizes=plan.step_sizes, before_step=look, on_step=on_step
            )
            final = self._mean_images(course.eps)
        traced_norms = torch.stack(norms) if norms else course.potentials.new_empty(0, len(keys))
        traced_images = torch.stack(images) if images else final.new_empty(0, *final.shape)
        return _Outcome(*course, final, traced_norms, traced_images)

    def _potential_and_grad(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """U, and its gradient without the prior's term, which `langevin_update` adds."""
        eps_z, eps_x = self.noise_layout.split(eps)
        potential = "energy" if self._has_prior else self.potential
        model = cast(ChainModel, self.model)  # __init__ refuses steps without an energy network
        u, gradients = model.potential_and_grad(eps_z, eps_x, potential, self.temperature)
        if self._has_prior:
            u = u + reference.prior_potential(eps)
        return u, self.noise_layout.join(gradients[:-1], gradients[-1])

    @torch.no_grad()
    def _mean_images(self, eps: Tensor) -> Tensor:
        return self.model.mean_image(self.noise_layout.split(eps)[0], self.temperature)

    def sample(self, seeds: Iterable[int], batch_size: int = 64) -> Tensor:
        """Images uint8 [N, H, W, C], one per seed; image i depends only on seed i, not on the batch.

        batch_size: chains in memory at a time. Chains that become non-finite are redone as in `run`; raises
        NonFiniteChainError if they fail again.
        """
        batch_size = whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        everything = [whole_number("A seed", seed) for seed in seeds]
        channels, height, width = self.noise_layout.image_shape
        images = []
        for at in range(0, len(everything), batch_size):
            chains = self.run(everything[at : at + batch_size], nonfinite="redo")
            if chains.failed:
                positions = [at + position for position in chains.failed]
                failed = [everything[position] for position in positions]
                raise NonFiniteChainError(positions, failed, f" twice, the second time with {REDO_STEP_SCALE} h")
            images.append(to_uint8(chains.images).cpu())
        return torch.cat(images) if images else torch.empty(0, height, width, channels, dtype=torch.uint8, device="cpu")


def _require_sampled_as_is(model: nn.Module) -> None:
    """Raise UserError for half precision, and if an image would depend on its batch."""
    wrong = [f"{name} is {tensor.dtype}" for name, tensor in model.named_parameters() if tensor.dtype in HALVES]
    if wrong:
        raise UserError(f"{wrong[0]}; a model that is sampled as it is needs float32 or float64.")
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    if any(module.training for module in model.modules() if isinstance(module, kinds)):
        raise UserError(
            "The model is in training mode, where an image depends on its batch and batch statistics would be "
            "overwritten; call model.eval() first."
        )


def _positions_not_finite(nonfinite_at: Tensor) -> list[int]:
    positions: list[int] = (nonfinite_at.cpu() >= 0).nonzero().flatten().tolist()
    return positions


def _numbers(keys: Tensor) -> list[int]:
    """The seeds that `seed_tensor` turned into these keys."""
    return [key % 2**64 for key in keys.tolist()]


def _trace_of(outcome: _Outcome, every: int) -> Trace:
    steps = list(range(1, 1 + len(outcome.potentials), every))
    return Trace(steps, outcome.potentials[::every], outcome.traced_norms, outcome.traced_images)


def to_uint8(x: Tensor) -> Tensor:
    """Images in [0, 1], [N, C, H, W], as uint8 [N, H, W, C]: round(255 x), never rescaled per image."""
    return torch.round(x.detach().clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
