"""Baseline: the plain modules under torch.compile with its best settings, without this project's kernels.

Checks that every setting has taken effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import synchronize
from vaebm_fast import VAEBM

PotentialAndGrad = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]

WARM_UP_CALLS = 3  # with CUDA graphs the second records and the third is the first replay


def compiled(model: VAEBM, eps_z: Sequence[Tensor], eps_x: Tensor, *, is_bf16: bool) -> tuple[PotentialAndGrad, float]:
    """(`potential_and_grad` compiled by torch.compile for noise of this shape, seconds of compilation).

    Freezing folds weights only without autograd, so `torch.func.grad`, traced into one graph with the forward pass,
    replaces the backward pass. Casts to bfloat16 are folded with the weights. Raises RuntimeError, because the baseline
    would be unfair, if weights were not folded or if no CUDA graph is replayed on a GPU.
    """
    device = eps_x.device

    def potential(noise: list[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            u = model.potential(noise[:-1], noise[-1], "official")
        return u.sum(), u

    function = torch.compile(torch.func.grad_and_value(potential, has_aux=True), fullgraph=True, dynamic=False)

    def call(eps_z: Sequence[Tensor], eps_x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        torch.compiler.cudagraph_mark_step_begin()  # a replay overwrites the previous result
        with torch.no_grad():
            gradients, (_, u) = function([*eps_z, eps_x])
        return u, gradients

    on_gpu = device.type == "cuda"
    options = {"freezing": True, "force_layout_optimization": True}
    options |= {"triton.cudagraphs": on_gpu, "triton.cudagraph_or_error": on_gpu}
    # Without prepare_freezing weights become inputs of the graph, because autograd is on inside `torch.func.grad`.
    with torch._dynamo.config.patch(prepare_freezing=True), torch._inductor.config.patch(options):
        began = time.perf_counter()
        call(eps_z, eps_x)
        synchronize(device)
        compile_s = time.perf_counter() - began
        for _ in range(WARM_UP_CALLS - 1):
            u = call(eps_z, eps_x)[0].clone()
    _require_folded(model, lambda: torch.equal(call(eps_z, eps_x)[0], u))
    return call, compile_s


def _require_folded(model: VAEBM, gives_the_same: Callable[[], bool]) -> None:
    """Raise RuntimeError if editing a weight of `model` changes the result; restores the weight."""
    variance = next(norm.running_var for norm in model.vae.post_process.modules() if isinstance(norm, nn.BatchNorm2d))
    assert variance is not None
    kept = variance.clone()
    variance.data.mul_(2)  # through .data, which is not counted as a change: a pair frozen from this model stays fresh
    folded = gives_the_same()
    variance.data.copy_(kept)
    if not folded:
        raise RuntimeError("torch.compile did not fold batch normalisation into the graph; see how it is configured.")
