"""Chains captured into CUDA graphs, on a GPU; `test_graphs.py` has what can be shown without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import vaebm_fast as vf
from tests.helpers.capturing import small_model
from vaebm_fast.chain.langevin import Chains, _Plan
from vaebm_fast.chain.noise import Stream
from vaebm_fast.frozen import cells
from vaebm_fast.ops._backend import why_absent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
OPTIONS: dict[str, Any] = dict(steps=4, step_size=[1e-2, 4e-2, 2e-2, 1e-2])


@pytest.fixture(autouse=True)
def _same_algorithms() -> Iterator[None]:
    """Convolutions that give the same bits twice."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def pair(dtype: torch.dtype = torch.float32, backend: Any = "reference", channels: int = 8) -> vf.FrozenVAEBM:
    reason = why_absent(backend) or (why_absent("triton") if backend == "cuda" else None)
    if reason is not None:
        pytest.skip(reason)
    return small_model(channels).to(DEVICE).freeze(dtype, backend)


def assert_equal(one: Chains, other: Chains, tolerance: float) -> None:
    """Relative to the norm."""
    assert one.trace is not None and other.trace is not None
    for name in ("eps", "potentials", "images"):
        assert_close(getattr(one, name), getattr(other, name), tolerance)
    for name in ("potentials", "gradient_norms", "images"):
        assert_close(getattr(one.trace, name), getattr(other.trace, name), tolerance)


def assert_close(one: Tensor, other: Tensor, tolerance: float) -> None:
    assert bool(one.isfinite().all())
    assert float((one.double() - other.double()).norm() / other.double().norm()) <= tolerance


@pytest.mark.parametrize("potential", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_capture_and_replay_are_the_eager_chain_with_fresh_noise(
    backend: Any, dtype: torch.dtype, potential: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "FUSED_SIDE", 4)  # for "cuda" in bfloat16 to have whole blocks
    model = pair(dtype, backend, channels=32)
    captured, eager = (
        vf.LangevinSampler(model, potential=potential, capture=capture, **OPTIONS) for capture in (True, False)
    )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3  # the same kernels; sums may come in another order
    results = []
    for call, seeds in enumerate((range(3), range(3), range(5, 8), range(3))):
        results.append((captured.run(seeds, trace_every=2), eager.run(seeds, trace_every=2)))
        assert captured._graphs is not None and len(captured._graphs._recordings) == min(call, 1)
    for result, expected in results:
        assert_equal(result, expected, tolerance)
    assert not torch.equal(results[1][0].eps, results[2][0].eps)


def test_a_replay_sees_weights_that_were_folded_anew() -> None:
    model = small_model().to(DEVICE)
    captured, eager = (vf.LangevinSampler(model, capture=capture, **OPTIONS) for capture in (True, False))
    before = [captured.run(range(2), trace_every=1) for _ in range(3)][-1]
    with torch.no_grad():
        model.energy.linear.weight.mul_(-5)
        model.vae.prior_ftr0.mul_(2)
    after = captured.run(range(2), trace_every=1)
    assert_equal(after, eager.run(range(2), trace_every=1), 1e-6)
    assert not torch.equal(after.eps, before.eps)


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_no_chain_waits_for_the_device(backend: Any) -> None:
    sampler = vf.LangevinSampler(pair(backend=backend), **OPTIONS)
    keys, plan = sampler._keys(range(2)), _Plan(int(Stream.CHAIN), sampler.step_sizes, trace_every=1)
    start = sampler.start(keys)
    for _ in range(2):
        sampler._run(keys, start, plan, None)
    assert sampler._graphs is not None and len(sampler._graphs._recordings) == 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler._run(keys, start, plan, None)
        sampler._chains(keys, start, plan)
        with pytest.raises(RuntimeError, match="synchroniz"):
            start.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Asking:
    """A model that asks the device for a number; everything else is the frozen pair's."""

    def __init__(self, model: vf.FrozenVAEBM) -> None:
        self._pair = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def potential_and_grad(self, *args: Any) -> tuple[Tensor, list[Tensor]]:
        u, gradients = self._pair.potential_and_grad(*args)
        return u * (1 if float(u.sum()) < 1e30 else 2), gradients


def test_a_chain_that_cannot_be_captured_runs_eagerly_and_leaves_the_device_fit_for_others() -> None:
    model = pair()
    asking, eager = (vf.LangevinSampler(Asking(model), capture=capture, **OPTIONS) for capture in (True, False))
    expected = eager.run(range(2), trace_every=1)
    results = [asking.run(range(2), trace_every=1)]
    with pytest.warns(UserWarning, match="could not be captured into a CUDA graph and runs eagerly: .") as caught:
        results.append(asking.run(range(2), trace_every=1))
    assert len(caught) == 1 and torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 0 <= float(torch.rand((), device=DEVICE)) < 1, "the generator is free again"
    torch.cuda.empty_cache()  # which fails while the allocator believes in a capture
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.append(asking.run(range(2), trace_every=1))
        healthy = vf.LangevinSampler(model, **OPTIONS)
        results += [healthy.run(range(2), trace_every=1) for _ in range(3)]
    assert healthy._graphs is not None and len(healthy._graphs._recordings) == 1
    for chains in results:
        assert_equal(chains, expected, 1e-6)
