"""The candidates of `chains`, each a function that runs some blocks and returns the seconds."""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.captured import EAGER, GRAPH, launched_by
from benchmarks.measure import synchronize
from benchmarks.step.torch_compile import compiled
from vaebm_fast import VAEBM
from vaebm_fast.chain.langevin import LangevinSampler, to_uint8
from vaebm_fast.config import ChainConfig, NoiseLayout, Potential
from vaebm_fast.frozen import FrozenVAEBM
from vaebm_fast.models.layers import channels_last
from vaebm_fast.sampling import SampleOptions, run_job

BARE, COLD, JOB = "bare chain, frozen", "bare chain, frozen, capture included", "sampling job"


@dataclass(frozen=True)
class OtherPair:
    """A chain model whose U and gradient another function computes, at temperature 1."""

    model: VAEBM | FrozenVAEBM
    call: Callable[[Sequence[Tensor], Tensor, Potential], tuple[Tensor, Sequence[Tensor]]]

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def noise_layout(self) -> NoiseLayout:
        """The model's noise layout."""
        return self.model.noise_layout

    def potential_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Result of `call`, with a copy of U: a chain keeps U of all steps; torch.compile's replays overwrite it."""
        u, gradients = self.call(eps_z, eps_x, potential)
        return u.clone(), list(gradients)

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor:
        """The model's mean image."""
        return self.model.mean_image(eps_z, temperature)


@dataclass(frozen=True)
class Timed:
    """`call` returns the seconds of `blocks` blocks; backend, dtype and launch describe how they run."""

    call: Callable[[], float]
    blocks: int
    backend: str
    dtype: str
    launched: str


@dataclass
class Bench:
    """Shared by all candidates of a run.

    launched: how the frozen pair's chains are launched, known after `bare`. whole_job_s: seconds of each job so far.
    """

    device: torch.device
    model: VAEBM
    frozen: FrozenVAEBM
    chain: ChainConfig
    batch: int
    blocks: int
    options: SampleOptions
    launched: str = EAGER
    whole_job_s: list[float] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether chains are captured and candidates run one after another."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> str:
        """The frozen pair's dtype, without "torch."."""
        return str(self.frozen.dtype).removeprefix("torch.")

    def sampler(self) -> LangevinSampler:
        """The sampler of a job."""
        return LangevinSampler(self.frozen, **asdict(self.chain))

    def bare(self) -> Timed:
        """The bare chain; on a GPU already captured."""
        sampler = self.sampler()
        if self.on_gpu:
            sampler.run(range(self.batch))
            self.launched = launched_by(lambda: sampler.run(range(self.batch)), self.device)
        return self._frozen(partial(time_of_chain, sampler, self.batch, self.blocks))

    def cold(self) -> Timed:
        """A new sampler per call: its first block runs eagerly, its second is captured."""
        return self._frozen(lambda: time_of_chain(self.sampler(), self.batch, self.blocks))

    def job(self) -> Timed:
        """A sampling job, each in a fresh folder."""

        def call() -> float:
            seconds, whole_s = time_of_job(self.options)
            self.whole_job_s.append(whole_s)
            return seconds

        return self._frozen(call)

    def _frozen(self, call: Callable[[], float]) -> Timed:
        return Timed(call, self.blocks, self.frozen.backend, self.dtype, self.launched)

    def plain(self, *, nhwc: bool) -> Timed:
        """Chains of the plain modules, eager, in float32."""
        modules = channels_last(copy.deepcopy(self.model)) if nhwc else self.model
        pair = OtherPair(modules, modules.potential_and_grad)
        return Timed(self._other(pair), self._other_blocks, "plain modules", "float32", EAGER)

    def compiled(self) -> Timed:
        """Chains of torch.compile, which uses its own CUDA graphs."""
        modules, noise = channels_last(copy.deepcopy(self.model)), self.sampler().start(range(self.batch))
        call, compile_s = compiled(modules, *self.sampler().noise_layout.split(noise), is_bf16=self.dtype == "bfloat16")
        print(f"compiled in {compile_s:.0f} s", file=sys.stderr, flush=True)
        pair = OtherPair(self.frozen if self.on_gpu else modules, lambda eps_z, eps_x, _: call(eps_z, eps_x))
        launched = GRAPH if self.on_gpu else EAGER
        return Timed(self._other(pair), self._other_blocks, "torch.compile", self.dtype, launched)

    @property
    def _other_blocks(self) -> int:
        return 1 if self.on_gpu else self.blocks

    def _other(self, pair: OtherPair) -> Callable[[], float]:
        """A chain of `pair`; on a GPU after a warm-up step."""
        settings = {**asdict(self.chain), "capture": False}
        if self.on_gpu:
            LangevinSampler(pair, **{**settings, "steps": min(self.chain.steps, 1)}).run(range(self.batch))
        return partial(time_of_chain, LangevinSampler(pair, **settings), self.batch, self._other_blocks)


def time_of_chain(sampler: LangevinSampler, batch: int, blocks: int) -> float:
    """Seconds for `blocks` blocks, until their uint8 images are on the host."""
    began = time.perf_counter()
    for block in range(blocks):
        to_uint8(sampler.run(range(block * batch, (block + 1) * batch)).images).cpu()
    synchronize(sampler.device)
    return time.perf_counter() - began


def time_of_job(options: SampleOptions) -> tuple[float, float]:
    """(seconds of a job's blocks until all files are written, seconds of the whole job), in a fresh folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "samples")
        began = time.perf_counter()
        code = run_job(replace(options, out=out))
        whole_s = time.perf_counter() - began
        if code != 0:
            raise KeyboardInterrupt
        run = json.loads((out / "summary.json").read_text())["this_run"]
    return float(run["seconds"]), whole_s
