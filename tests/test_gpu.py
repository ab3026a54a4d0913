"""On a GPU: every op of every backend beside its reference, and the whole frozen pair. Nothing here runs without one.

Tests named "sanitised" are small enough for compute-sanitizer (`make gpu`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from benchmarks.ops import cases
from benchmarks.step.sensitive import make_sensitive
from tests.helpers.sampling_jobs import options_for, save_networks, tiny_model
from vaebm_fast.chain.langevin import LangevinSampler, to_uint8
from vaebm_fast.chain.noise import draw_tensor, seed_tensor
from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.frozen import cells
from vaebm_fast.models import EnergyNetwork
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.ops.philox_normal import philox_normal, philox_words
from vaebm_fast.sampling import run_job

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")

# Of the norm. float32: approximate instructions have 2^-21. bfloat16: kernel and reference round at every step, and
# differ by 0.7% in emulation. uint8: not a byte.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.uint8: 1e-9}
PLAIN = NVAEConfig(
    image_size=16, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=4, num_channels_enc=16,
    num_channels_dec=32, num_preprocess_cells=1, num_postprocess_cells=2, num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _float32_means_float32() -> Iterator[None]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def tensors(result: object) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]


def error(actual: Tensor, expected: Tensor) -> float:
    """Of the norm."""
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("case", cases.SMALL_CASES, ids=lambda case: case.name)
def test_sanitised_op_agrees_with_its_reference(case: cases.Case, backend: Any) -> None:
    reason = why_not(case.op, DEVICE, backend)
    if reason is not None:
        pytest.skip(reason)
    run = case.make(DEVICE)
    results, slow_ones = tensors(run(backend=backend)), tensors(run(backend="reference"))
    assert len(results) == len(slow_ones) > 0
    for result, slow in zip(results, slow_ones, strict=True):
        assert result.dtype == slow.dtype and error(result, slow) < ALLOWED[result.dtype]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("D", [1, 6, 1001, 4112])
def test_sanitised_noise_and_update_have_the_bits_of_the_reference_on_a_cpu(D: int, backend: Any) -> None:
    """In PyTorch on a GPU too each operation is a kernel, but of these nobody promises the bits."""
    reason = why_not("langevin_update", DEVICE, backend)
    if reason is not None:
        pytest.skip(reason)
    eps, gradient = torch.randn(3, D), torch.randn(3, D)
    gradient[1, D // 2] = torch.nan

    def run(device: torch.device, backend: Any) -> list[Tensor]:
        seeds, draw = seed_tensor([0, 2**63, 2**64 - 1], device), draw_tensor(2**31, device)
        state, flags = eps.to(device, copy=True), torch.full_like(seeds, -1)
        noise = [op(seeds, draw, stream=1, numel=D, backend=backend) for op in (philox_words, philox_normal)]
        langevin_update(
            state, gradient.to(device), seeds, draw, flags, stream=1, step_size=0.3, prior=True, backend=backend
        )
        return [result.cpu() for result in (*noise, state.nan_to_num(), flags)]

    for result, expected in zip(run(DEVICE, backend), run(torch.device("cpu"), "reference"), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_the_frozen_pair_has_the_gradient_of_the_plain_modules(
    backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 to rounding; bfloat16 within twice the error of the same pair in plain PyTorch, and 1%.

    `test_sensitive.py` shows that these weights let no part be wrong.
    """
    monkeypatch.setattr(cells, "FUSED_SIDE", 8)  # for a small pair to have whole blocks, of 64 and 32 channels
    energy = EnergyNetwork(EnergyConfig(16, 3, 16, parse_blocks("1-1d 1-2d 2-2")))
    model = make_sensitive(vf.VAEBM(vf.NVAE(PLAIN).eval(), energy))
    layout = model.noise_layout
    eps = torch.randn(3, layout.dim)

    def gradient(fast: Any, eps: Tensor) -> Tensor:
        _, gradients = fast.potential_and_grad(*layout.split(eps), "official")
        return layout.join(gradients[:-1], gradients[-1])

    truth = gradient(vf.VAEBM(model.vae.double(), model.energy.double()), eps.double())
    model = vf.VAEBM(model.vae.float().to(DEVICE), model.energy.float().to(DEVICE))
    off = error(gradient(model.freeze(dtype, backend), eps.to(DEVICE)), truth)
    if dtype == torch.float32:
        assert off < 1e-5
    else:
        assert off < 2 * error(gradient(model.freeze(dtype, "reference"), eps.to(DEVICE)), truth) + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_a_frozen_step_has_the_same_bits_every_time(
    backend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sampling job runs it: no sum whose order is left to chance."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(cells, "FUSED_SIDE", 8)
    model = vf.VAEBM(vf.NVAE(PLAIN).eval(), EnergyNetwork(EnergyConfig(16, 3, 16, parse_blocks("1-1d 1-2d 2-2"))))
    layout, fast = model.noise_layout, model.to(DEVICE).freeze(dtype, backend)
    eps = torch.randn(32, layout.dim, device=DEVICE)
    first, *others = [fast.potential_and_grad(*layout.split(eps), "official")[1] for _ in range(8)]
    for gradients in others:
        assert all(torch.equal(a, b) for a, b in zip(gradients, first, strict=True))


def test_a_sampling_job_writes_the_bare_chains_images_whether_a_block_is_captured_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which blocks a process runs eagerly and which it replays, follows from how many processes there are."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = options_for(
        save_networks(tmp_path), tmp_path / "out", seeds="0-63", batch_size=None, device="cuda", processes=1,
        format="npy",
    )  # fmt: skip
    assert run_job(options) == 0
    assert json.loads((options.out / "manifest.json").read_text())["batch_size"] == 16  # so that there are four blocks
    eager = LangevinSampler(tiny_model().to(DEVICE), steps=3, step_size=0.05, capture=False)
    expected = torch.cat([to_uint8(eager.run(range(at, at + 16)).images).cpu() for at in range(0, 64, 16)])
    assert np.array_equal(np.load(options.out / "samples.npy"), expected.numpy())
    assert json.loads((options.out / "summary.json").read_text())["this_run"]["processes"][0]["memory_gib"] > 0
