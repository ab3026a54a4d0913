"""The candidates of `bench_pair`: ways to compute U and its gradient in a chain step, and how they are timed.

A step is U and its gradient with respect to all noise (official potential), and the update of all noise, at random
weights. Baselines: the plain modules; the same in NHWC; on a GPU also under bfloat16 autocast; and torch.compile with
its best settings (`torch_compile`): one graph through `torch.func.grad` with frozen weights, in NHWC, on a GPU in
bfloat16 and replayed as a CUDA graph. Plain modules in float32 use torch's default precision of products. On a GPU the
frozen pairs are replayed as CUDA graphs, as in the sampler, and one also runs eagerly; each row says how it was
launched.

    python -m benchmarks.step.pair PRESET N CANDIDATE     # one step in this process: its peak memory, as JSON
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.captured import EAGER, GRAPH, captured, launched_by
from benchmarks.gate import REPOSITORY
from benchmarks.gpu.sources import sources_of
from benchmarks.measure import default_device, peak_memory_mib, summary, synchronize, take_turns
from benchmarks.report import NHWC, PLAIN
from benchmarks.results_file import Keep, Row
from benchmarks.step.sensitive import make_sensitive
from benchmarks.step.torch_compile import PotentialAndGrad, compiled
from benchmarks.work import STEPS
from vaebm_fast import PRESETS, VAEBM
from vaebm_fast.chain.noise import Stream, draw_tensor, normal, seed_tensor
from vaebm_fast.models.layers import channels_last
from vaebm_fast.ops._backend import GPU_BACKENDS, Backend, why_absent
from vaebm_fast.ops._backend import why_not as op_why_not
from vaebm_fast.ops._measured import PAIR
from vaebm_fast.ops.langevin_update import langevin_update

COMPILED = f"{NHWC}, torch.compile"
NHWC_BF16, COMPILED_BF16 = f"{NHWC}, bf16", f"{NHWC}, bf16, torch.compile"
TO_COMPILE = (COMPILED, COMPILED_BF16)
FROZEN: dict[str, tuple[Backend, torch.dtype]] = {
    "frozen, reference": ("reference", torch.float32),
    "frozen, cpp": ("cpp", torch.float32),
    "frozen, triton": ("triton", torch.float32),
    "frozen, cuda": ("cuda", torch.float32),
    "frozen, triton, tf32": ("triton", torch.float32),
    "frozen, reference, bf16": ("reference", torch.bfloat16),
    "frozen, triton, bf16": ("triton", torch.bfloat16),
    "frozen, cuda, bf16": ("cuda", torch.bfloat16),
    "frozen, cuda, bf16, eager": ("cuda", torch.bfloat16),
}
# Precision of products. On a GPU float32 may mean TF32: everywhere or, by torch's default, in cuDNN only.
TORCHS_OWN = "tf32 in cuDNN"
# Relative error of the gradient above which a candidate is wrong and not timed; docs/performance.md on TF32.
AGREEMENT = {"float32": 1e-4, TORCHS_OWN: 5e-2, "tf32": 5e-2, "bf16": 5e-2}
CANDIDATES = (PLAIN, NHWC, NHWC_BF16, *FROZEN, *TO_COMPILE)
TESTS = ("tests/frozen/test_frozen.py", "tests/frozen/test_frozen_refresh.py", "tests/models/test_golden.py")
GPU_SECONDS = 0.5  # per candidate: nothing else runs on the GPU meanwhile


@dataclass(frozen=True)
class Candidate:
    """A step and its gradient [N, D], ready to call; the backend that computes them, and the time to compile it.

    launched: how `step` launches its work: GRAPH, EAGER, or EAGER with the reason why it was not captured.
    """

    step: Callable[[], object]
    gradient: Callable[[], Tensor]
    backend: str
    products: str
    compile_s: float | None = None
    launched: str = EAGER


def why_not(candidate: str, device: torch.device) -> str | None:
    """Why this machine cannot run a candidate, or None if it can."""
    if candidate not in CANDIDATES:
        raise ValueError(f"Candidate {candidate!r} is not known; there are {', '.join(CANDIDATES)}.")
    backend, dtype = FROZEN.get(candidate, ("reference", torch.float32))
    if (backend == "cpp") != (device.type == "cpu") and backend != "reference":
        return f"{backend} does not run on {device.type}"
    if (dtype == torch.bfloat16 or candidate in (NHWC_BF16, COMPILED_BF16)) and device.type == "cpu":
        return "half precision is for GPUs"
    if candidate == COMPILED and device.type == "cuda":
        return f"on a GPU {COMPILED_BF16!r} is the baseline"
    return why_absent(backend)


def build(candidate: str, preset: str, batch: int, device: torch.device, model: VAEBM | None = None) -> Candidate:
    """The candidate's step on N chains. model: plain modules in the candidate's layout, if they exist already."""
    if model is None:
        model = plain_model(preset, device, nhwc=candidate != PLAIN)
    layout = model.noise_layout
    seeds = seed_tensor(range(batch), device)
    start = normal(seeds, 0, Stream.CHAIN, layout.dim)
    products = products_of(candidate, device)
    with multiplying(products):
        call, backend, compile_s = potential_and_grad(candidate, model, *layout.split(start))

    def gradient() -> Tensor:
        with multiplying(products):
            _, gradients = call(*layout.split(start))
            return layout.join(gradients[:-1], gradients[-1])

    eps, draw, nonfinite_at = start.clone(), draw_tensor(1, device), torch.full_like(seeds, -1)
    step_size, stream = PRESETS[preset].sampling.step_sizes[0], int(Stream.CHAIN)
    update = partial(langevin_update, stream=stream, step_size=step_size, backend=backend_of_update(candidate, device))
    last: list[Tensor] = []  # the captured step's gradient; held so that its memory is not reused

    def step() -> None:
        """Uses the gradient at the start, so that every call does the same work."""
        last.clear()
        found = gradient()
        update(eps, found, seeds, draw, nonfinite_at)
        if is_captured(candidate, device):
            last.append(found)

    if not is_captured(candidate, device):
        launched = GRAPH if candidate in TO_COMPILE and device.type == "cuda" else EAGER
        return Candidate(step, gradient, backend, products, compile_s, launched)
    replayed = captured(step, device)

    def gradient_of_replay() -> Tensor:
        replayed()
        return last[0].clone()

    return Candidate(replayed, gradient_of_replay, backend, products, compile_s)


def backend_of_update(candidate: str, device: torch.device) -> Backend:
    """The candidate's own on a GPU, as in the sampler; plain PyTorch's steps, too, are updated by a kernel there."""
    own = FROZEN.get(candidate, ("reference", None))[0]
    names = (own,) if own in GPU_BACKENDS else GPU_BACKENDS[::-1]
    return next((name for name in names if op_why_not("langevin_update", device, name) is None), "auto")


def is_captured(candidate: str, device: torch.device) -> bool:
    """Whether the candidate's step is captured here; torch.compile uses its own CUDA graphs."""
    return device.type == "cuda" and candidate in FROZEN and not candidate.endswith(EAGER)


def potential_and_grad(
    candidate: str, model: VAEBM, eps_z: Sequence[Tensor], eps_x: Tensor
) -> tuple[PotentialAndGrad, str, float | None]:
    """(function to call, its backend, seconds to compile it for noise of this shape or None)."""
    if candidate in FROZEN:
        name, dtype = FROZEN[candidate]
        pair = model.freeze(dtype, name)
        return lambda eps_z, eps_x: pair.potential_and_grad(eps_z, eps_x, "official"), str(pair.backend), None
    if candidate in TO_COMPILE:
        call, compile_s = compiled(model, eps_z, eps_x, is_bf16=candidate == COMPILED_BF16)
        return call, "torch.compile", compile_s
    is_bf16 = candidate == NHWC_BF16

    def plain(eps_z: Sequence[Tensor], eps_x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        with torch.autocast(eps_x.device.type, torch.bfloat16, enabled=is_bf16):
            return model.potential_and_grad(eps_z, eps_x, "official")

    return plain, "plain modules, autocast" if is_bf16 else "plain modules", None


def products_of(candidate: str, device: torch.device) -> str:
    """The precision of the candidate's products: a key of AGREEMENT."""
    if candidate in (NHWC_BF16, COMPILED_BF16) or FROZEN.get(candidate, ("", None))[1] == torch.bfloat16:
        return "bf16"
    if device.type == "cpu":
        return "float32"
    if candidate not in FROZEN:
        return TORCHS_OWN
    return "tf32" if candidate.endswith("tf32") else "float32"


@contextmanager
def multiplying(products: str) -> Iterator[None]:
    """Context that sets torch's precision of float32 products to `products`; "bf16" keeps torch's setting."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = products != "float32"
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def plain_model(preset: str, device: torch.device, *, nhwc: bool) -> VAEBM:
    """The plain modules with the weights of `make_sensitive`, which make wrong parts visible; no weight gradients."""
    model = VAEBM.from_preset(preset).to(device)
    make_sensitive(model).requires_grad_(False)
    return channels_last(model) if nhwc else model


def measure_pair(
    preset: str,
    batch: int,
    candidates: Sequence[str],
    device: torch.device,
    *,
    rounds: int | None = None,
    keep: Keep = lambda name, row: None,
) -> dict[str, Row]:
    """A row per candidate, passed to `keep` as soon as it is measured; {"refused": why} if there is no figure.

    On a CPU the candidates take turns; on a GPU, whose memory does not hold all of them, they run one after another. A
    refused row also has "failed" unless memory ran out. Peak memory is measured on a CPU in separate processes, on a
    GPU by torch's counter.
    """
    layouts = {nhwc: plain_model(preset, device, nhwc=nhwc) for nhwc in {name != PLAIN for name in candidates}}
    truth = true_gradient(preset, batch, device, layouts[max(layouts)])
    on_gpu = device.type == "cuda"
    rows: dict[str, Row] = {}
    for group in [[name] for name in candidates] if on_gpu else [list(candidates)]:
        found = _measure_group(preset, batch, group, device, layouts, truth, rounds)
        for name, row in found.items():
            if not on_gpu and "refused" not in row:
                row |= peak_memory(preset, batch, name)
            keep(name, row)
        rows |= found
        release(device, compiled=not set(group).isdisjoint(TO_COMPILE))
    return rows


def _measure_group(
    preset: str,
    batch: int,
    group: Sequence[str],
    device: torch.device,
    layouts: dict[bool, VAEBM],
    truth: Tensor,
    rounds: int | None,
) -> dict[str, Row]:
    """Rows of candidates that are built together and take turns."""
    rows: dict[str, Row] = {
        name: {"preset": preset, "batch": batch, "candidate": name, **sources_of(PAIR, FROZEN.get(name, (name,))[0])}
        for name in group
    }
    built: dict[str, Candidate] = {}
    for name in group:
        try:
            synchronize(device)
        except RuntimeError as error:  # a kernel before this one
            rows[name] |= {"refused": f"the GPU had failed before: {error}"}
            continue
        try:
            candidate, memory = _built(name, preset, batch, device, layouts[name != PLAIN])
            rows[name] |= memory | {"gradient_error": agreement(name, candidate.gradient(), truth, candidate.products)}
            built[name] = candidate
        except Exception as error:  # other candidates may still run
            rows[name] |= refusal(error)
    if not built:
        return rows
    steps = {name: candidate.step for name, candidate in built.items()}
    try:
        samples = take_turns(steps, device, rounds=rounds, seconds=GPU_SECONDS if device.type == "cuda" else 2.0)
    except Exception as error:
        return rows | {name: rows[name] | refusal(error) for name in built}
    work = STEPS[preset]
    for name, candidate in built.items():
        rows[name] |= {
            "backend": candidate.backend,
            "launched": candidate.launched,
            "products": candidate.products,
            "dtype": "bfloat16" if candidate.products == "bf16" else "float32",
            "flops": batch * (work.frozen_flop if name in FROZEN else work.plain_flop),
            "bytes": work.least_bytes(batch, 2 if candidate.products == "bf16" else 4),
            "compile_s": candidate.compile_s,
            **summary(samples[name]),
        }
    return rows


def refusal(error: Exception) -> Row:
    """The reason for a missing figure; out of memory is a skip, anything else a failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"refused": f"it does not fit into memory: {str(error).splitlines()[0]}"}
    return {"refused": f"{type(error).__name__}: {error}", "failed": True}


def _built(
    name: str, preset: str, batch: int, device: torch.device, model: VAEBM
) -> tuple[Candidate, dict[str, float | None]]:
    """The candidate, on a GPU warmed up and captured if `is_captured`, and its memory [MiB], including `model`."""
    if device.type == "cpu":
        return build(name, preset, batch, device, model), {}
    others = torch.cuda.memory_allocated(device) - _bytes_of(model)
    torch.cuda.reset_peak_memory_stats(device)
    candidate = build(name, preset, batch, device, model)
    before = torch.cuda.memory_allocated(device)
    if candidate.compile_s is None:  # with torch.compile the peak is the warm-up's: a replay allocates nothing
        candidate.step()
        torch.cuda.reset_peak_memory_stats(device)
    if is_captured(name, device):  # this step captures and allocates the memory of all replays
        candidate = replace(candidate, launched=launched_by(candidate.step, device))
    else:
        candidate.step()
    peak = torch.cuda.max_memory_allocated(device)
    memory = {"peak_memory_mib": (peak - others) / 2**20, "memory_before_mib": (before - others) / 2**20}
    return candidate, dict(memory)


def _bytes_of(model: VAEBM) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()])


def release(device: torch.device, *, compiled: bool) -> None:
    """Free cached memory of deleted candidates, including torch.compile's graphs."""
    if device.type == "cuda":
        if compiled:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def true_gradient(preset: str, batch: int, device: torch.device, model: VAEBM) -> Tensor:
    """Gradient of the plain modules without TF32, [N, D]; computed image by image to save memory."""
    layout = model.noise_layout
    start = normal(seed_tensor(range(batch), device), 0, Stream.CHAIN, layout.dim)
    with multiplying("float32"):
        each = [model.potential_and_grad(*layout.split(row), "official")[1] for row in start.split(1)]
    return torch.cat([layout.join(gradients[:-1], gradients[-1]) for gradients in each])


def agreement(name: str, gradient: Tensor, truth: Tensor, products: str) -> float:
    """Relative error of the gradient (norm). Raises ValueError if the precision of products does not explain it."""
    error = float((gradient - truth).norm() / truth.norm())
    if not error < AGREEMENT[products]:
        raise ValueError(f"The gradients of {name} and of the plain modules differ by {error:.1e} of their norm.")
    return error


def peak_memory(preset: str, batch: int, candidate: str) -> dict[str, float | None]:
    """Memory [MiB] before a step and its peak, measured in a separate process on a CPU; None for torch.compile.

    The compiler runs in the same process, so the peak would be the compiler's.
    """
    if candidate in TO_COMPILE:
        return {"peak_memory_mib": None, "memory_before_mib": None}
    command = [sys.executable, "-m", "benchmarks.step.pair", preset, str(batch), candidate]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr}")
    measured: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main(arguments: Sequence[str]) -> None:
    """Run one step of one candidate and print this process's memory as JSON."""
    preset, batch, candidate = arguments
    device = default_device()
    built = build(candidate, preset, int(batch), device)
    before_mib = peak_memory_mib(device)
    built.step()
    print(json.dumps({"peak_memory_mib": peak_memory_mib(device), "memory_before_mib": before_mib}))


if __name__ == "__main__":
    main(sys.argv[1:])
