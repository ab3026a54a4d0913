"""How long does one chain step take, by who computes the energy and its gradient?

One step: U and its gradient with respect to all noise (official potential), the update of all noise. Random weights,
float32. Baselines: the plain modules as they are, the same in NHWC, and these compiled by torch.compile as well as it
can: one graph through `torch.func.grad`, weights frozen into it, NHWC kept.

    python -m benchmarks.pair PRESET N CANDIDATE     # one step in this process: peak memory, as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gate import REPOSITORY
from benchmarks.measure import default_device, peak_memory_mib, summary, take_turns
from vaebm_fast import PRESETS, VAEBM
from vaebm_fast.cost import pair_flops
from vaebm_fast.models.layers import channels_last
from vaebm_fast.noise import NoiseLayout, Stream, draw_tensor, normal, seed_tensor
from vaebm_fast.ops._backend import Backend, backend_for, why_absent
from vaebm_fast.ops.langevin_update import langevin_update

PLAIN, NHWC, COMPILED = "plain", "plain NHWC", "plain NHWC, torch.compile"
FROZEN: dict[str, tuple[Backend, torch.dtype]] = {
    "frozen, reference": ("reference", torch.float32),
    "frozen, cpu": ("cpu", torch.float32),
    "frozen, triton": ("triton", torch.float32),
    "frozen, cuda": ("cuda", torch.float32),
    "frozen, reference, bf16": ("reference", torch.bfloat16),
    "frozen, triton, bf16": ("triton", torch.bfloat16),
    "frozen, cuda, bf16": ("cuda", torch.bfloat16),
}
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the gradient's norm: a wrong one is not to be timed
CANDIDATES = (PLAIN, NHWC, COMPILED, *FROZEN)
TESTS = ("tests/test_frozen.py", "tests/test_golden.py")

EnergyAndGrad = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]


@dataclass(frozen=True)
class Candidate:
    """A step and its gradient [N, D], ready to be called; what computes them, and what it cost to make."""

    step: Callable[[], None]
    gradient: Callable[[], Tensor]
    backend: str
    compile_s: float | None = None


def why_not(candidate: str, device: torch.device) -> str | None:
    """Why this machine cannot run a candidate; None where it can."""
    if candidate not in CANDIDATES:
        raise ValueError(f"Candidate {candidate!r} is not known; there are {', '.join(CANDIDATES)}.")
    backend, dtype = FROZEN.get(candidate, ("reference", torch.float32))
    if (backend == "cpu") != (device.type == "cpu") and backend != "reference":
        return f"{backend} does not run on {device.type}"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "half precision is for GPUs"
    return why_absent(backend) or why_absent(backend_for("pointwise", backend))


def build(candidate: str, preset: str, batch: int, device: torch.device, model: VAEBM | None = None) -> Candidate:
    """The candidate's step on N chains; from `model`, a plain one in the candidate's layout, where that is there."""
    if model is None:
        model = plain_model(preset, device, nhwc=candidate != PLAIN)
    layout = NoiseLayout(model.latent_shapes, model.image_shape)
    seeds = seed_tensor(range(batch), device)
    start = normal(seeds, 0, Stream.CHAIN, layout.dim)
    compile_s = None
    if candidate in FROZEN:
        name, dtype = FROZEN[candidate]
        pair = model.freeze(dtype, name)
        call: EnergyAndGrad = lambda eps_z, eps_x: pair.energy_and_grad(eps_z, eps_x, "official")  # noqa: E731
        backend = str(pair.backend)
    elif candidate == COMPILED:
        call, compile_s = compiled(model, *layout.split(start))
        backend = "torch.compile"
    else:
        plain = model
        call = lambda eps_z, eps_x: plain.energy_and_grad(eps_z, eps_x, "official")  # noqa: E731
        backend = "plain modules"

    def gradient() -> Tensor:
        _, gradients = call(*layout.split(start))
        return layout.join(gradients[:-1], gradients[-1])

    eps, draw, nonfinite_at = start.clone(), draw_tensor(1, device), torch.full_like(seeds, -1)
    step_size = PRESETS[preset].sampling.step_size

    def step() -> None:
        """With the gradient at the start each time, so that every call does the same work."""
        langevin_update(eps, gradient(), seeds, draw, nonfinite_at, stream=int(Stream.CHAIN), step_size=step_size)

    return Candidate(step, gradient, backend, compile_s)


def plain_model(preset: str, device: torch.device, *, nhwc: bool) -> VAEBM:
    """The plain modules with weights that ask for no gradient."""
    model = VAEBM.from_preset(preset)
    assert isinstance(model, VAEBM)
    model.to(device).requires_grad_(False)
    return channels_last(model) if nhwc else model


def compiled(model: VAEBM, eps_z: Sequence[Tensor], eps_x: Tensor) -> tuple[EnergyAndGrad, float]:
    """`energy_and_grad` by torch.compile for noise like this, and the seconds that compiling took.

    Freezing folds weights only where autograd is off: hence `torch.func.grad`, traced into one graph with the forward
    pass, in place of a backward pass. Raises RuntimeError where weights were not folded: the baseline would be unfair.
    """

    def potential(noise: list[Tensor]) -> tuple[Tensor, Tensor]:
        u = model.potential(noise[:-1], noise[-1], "official")
        return u.sum(), u

    function = torch.compile(torch.func.grad_and_value(potential, has_aux=True), fullgraph=True, dynamic=False)

    def call(eps_z: Sequence[Tensor], eps_x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.no_grad():
            gradients, (_, u) = function([*eps_z, eps_x])
        return u, gradients

    began = time.perf_counter()
    # prepare_freezing: inside `torch.func.grad` autograd looks on, and weights would become inputs of the graph.
    with (
        torch._dynamo.config.patch(prepare_freezing=True),
        torch._inductor.config.patch(freezing=True, force_layout_optimization=True),
    ):
        u, _ = call(eps_z, eps_x)
    compile_s = time.perf_counter() - began
    variance = next(norm.running_var for norm in model.vae.post_process.modules() if isinstance(norm, nn.BatchNorm2d))
    assert variance is not None
    kept = variance.clone()
    variance.mul_(2)
    if not torch.equal(call(eps_z, eps_x)[0], u):
        raise RuntimeError("torch.compile did not fold batch normalisation into the graph; see how it is configured.")
    variance.copy_(kept)
    return call, compile_s


def measure_pair(
    preset: str, batch: int, candidates: Sequence[str], device: torch.device, *, rounds: int | None = None
) -> dict[str, dict[str, Any]]:
    """A row per candidate, all measured in turns in this process; peak memory comes from processes of their own."""
    layouts = {nhwc: plain_model(preset, device, nhwc=nhwc) for nhwc in {name != PLAIN for name in candidates}}
    built = {name: build(name, preset, batch, device, layouts[name != PLAIN]) for name in candidates}
    _require_agreement({name: candidate.gradient() for name, candidate in built.items()})
    samples = take_turns({name: candidate.step for name, candidate in built.items()}, device, rounds=rounds)
    plain_flops, frozen_flops = flops_of(preset)
    rows = {}
    for name, candidate in built.items():
        rows[name] = {
            "preset": preset,
            "batch": batch,
            "candidate": name,
            "backend": candidate.backend,
            "dtype": str(_dtype(name)).removeprefix("torch."),
            "flops": batch * (frozen_flops if name in FROZEN else plain_flops),
            "compile_s": candidate.compile_s,
            **summary(samples[name]),
        }
    del built, layouts
    for name, row in rows.items():
        row |= peak_memory(preset, batch, name)
    return rows


flops_of = cache(pair_flops)


def _dtype(candidate: str) -> torch.dtype:
    return FROZEN[candidate][1] if candidate in FROZEN else torch.float32


def _require_agreement(gradients: dict[str, Tensor]) -> None:
    """Raise ValueError unless all candidates have the gradient of the first, as far as their precision allows."""
    first, *others = gradients
    for name in others:
        error = float((gradients[name] - gradients[first]).norm() / gradients[first].norm())
        if not error < AGREEMENT[_dtype(name)]:
            raise ValueError(f"The gradients of {name} and of {first} differ by {error:.1e} of their norm.")


def peak_memory(preset: str, batch: int, candidate: str) -> dict[str, float | None]:
    """Peak memory [MiB] of a step in a process of its own, and before that step; None for torch.compile on a CPU.

    There the compiler works in the same process, and its own peak would be reported.
    """
    if candidate == COMPILED and default_device().type == "cpu":
        return {"peak_memory_mib": None, "memory_before_mib": None}
    command = [sys.executable, "-m", "benchmarks.pair", preset, str(batch), candidate]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr}")
    measured: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main(arguments: Sequence[str]) -> None:
    """One step of one candidate: print the memory of this process as JSON."""
    preset, batch, candidate = arguments
    device = default_device()
    built = build(candidate, preset, int(batch), device)
    before_mib = peak_memory_mib(device)
    built.step()
    print(json.dumps({"peak_memory_mib": peak_memory_mib(device), "memory_before_mib": before_mib}))


if __name__ == "__main__":
    main(sys.argv[1:])
